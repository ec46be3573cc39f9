"""Download models of the Hugging Face hub, and name their folders."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import snapshot_download

from budgetformer.errors import CheckpointError, one_line

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILES = ["*.json", "*.txt", "*.model", "model*.safetensors"]
"""Files to download, without code."""
_OLD_WEIGHTS = ["pytorch_model*.bin"]
"""Weights to download if there are no others. Only tensors are read from them."""


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
