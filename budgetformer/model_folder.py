"""The folders of models that Transformers saved: recognise, download and name them.

Nothing here loads torch or Transformers, which takes seconds.
"""

from __future__ import annotations

import re
from pathlib import Path

from budgetformer.errors import CheckpointError, one_line

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILES = ["*.json", "*.txt", "*.model", "model*.safetensors"]
"""Files to download, without code."""
_OLD_WEIGHTS = ["pytorch_model*.bin"]
"""Weights to download if there are no others. Only tensors are read from them."""

_OTHER_KINDS = {
    "config_setfit.json": "a SetFit model, whose head is pickled code, which is never run",
    "model_head.pkl": "a model whose head is pickled code (model_head.pkl), which is never run",
    "modules.json": "a sentence-transformers model, which has no Transformers head",
}
"""Marker files of models whose head Transformers cannot load, with a description."""


def is_model(folder: Path) -> bool:
    """Return whether a folder has a model, even one that cannot be converted."""
    names = ("config.json", "adapter_config.json", *_OTHER_KINDS)
    return any((folder / name).exists() for name in names)


def files_of(folder: Path) -> list[Path]:
    """Return the configuration, tokenizer and weights of a model, sorted by name."""
    patterns = _FILES + _OLD_WEIGHTS
    return sorted({path for pattern in patterns for path in folder.glob(pattern)})


def describe_headless(folder: Path) -> str | None:
    """Return a description of a model whose head Transformers cannot load, with advice, or None."""
    kind = next((kind for name, kind in _OTHER_KINDS.items() if (folder / name).exists()), None)
    return kind and (
        f"{kind}; train a head on its encoder (`budgetformer import` on the folder with the "
        "encoder's config.json, with --data)"
    )


def _is_hub_id(source: str) -> bool:
    """Return whether a source is the id of a model on the hub, and no file or folder here."""
    return not Path(source).exists() and _ID.fullmatch(source) is not None


def model_folder(source: str) -> Path:
    """Return the folder of a model, given that folder or an id, whose model is downloaded.

    Raises:
        CheckpointError: the hub does not have the model, or cannot be reached.
    """
    if not _is_hub_id(source):
        return Path(source)
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(source, allow_patterns=_FILES))
        if not any(folder.glob("*.safetensors")):
            snapshot_download(source, allow_patterns=_OLD_WEIGHTS)
    except Exception as error:  # the hub's client and its libraries raise many types
        reason = one_line(error)[:200] or type(error).__name__
        raise CheckpointError(
            f"{source}: no such file or folder, and loading it from the Hugging Face hub failed: "
            f"{reason}"
        ) from None
    return folder


def model_name(folder: Path) -> str:
    """Return the name of a model's folder: its id if it was downloaded from the hub."""
    folder = folder.resolve()
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return "/".join(repository.split("--")[1:])
    return folder.name
