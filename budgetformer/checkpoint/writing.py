"""Write the weights, configuration and tokenizer of a checkpoint folder."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from budgetformer.checkpoint.manifest import CONFIG, Manifest, file_entries
from budgetformer.model.modeling import BudgetFormerForSequenceClassification, silence_transformers

_SPECIAL_TOKENS = {
    "pad_token": ("[PAD]", "<pad>"),
    "unk_token": ("[UNK]", "<unk>"),
    "cls_token": ("[CLS]", "<s>"),
    "sep_token": ("[SEP]", "</s>"),
}


def write_network(
    model: BudgetFormerForSequenceClassification,
    tokenizer: Tokenizer,
    folder: Path,
    max_tokens: int,
    truncation_side: Literal["right", "left"],
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write weights, configuration and tokenizer to a checkpoint folder.

    Args:
        model: network in float32; its weights are rounded to `dtype`.
        tokenizer: tokenizer, written without padding and truncation.
        folder: checkpoint folder.
        max_tokens: longest input of the encoder.
        truncation_side: the end at which longer inputs are truncated.
        dtype: data type of the weights in the file.
    """
    with silence_transformers():
        nn.Module.to(model, dtype)
        model.save_pretrained(folder)
    _write_labels(folder / CONFIG, model.config.id2label)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_tokens,
        "truncation_side": truncation_side,
    }
    for name, spellings in _SPECIAL_TOKENS.items():
        present = [token for token in spellings if tokenizer.token_to_id(token) is not None]
        if present:
            settings[name] = present[0]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")
    for path in folder.iterdir():
        path.chmod(0o644)  # the server may run as another user
    model.float()


def describe(folder: Path, target: Path, **fields: Any) -> Manifest:
    """Return a manifest, dated today, for a folder with a written network.

    Args:
        folder: folder with the written network.
        target: path of the folder in its store, which ends with name and version.
        fields: the other fields of the manifest.
    """
    return Manifest(
        name=target.parent.name,
        version=int(target.name),
        created=datetime.datetime.now(datetime.UTC).date().isoformat(),
        files=file_entries(folder),
        **fields,
    )


def _write_labels(path: Path, names: dict[int, str]) -> None:
    """Add the label names, which Transformers omits for two labels with its default names."""
    config = json.loads(path.read_text())
    if "id2label" not in config:
        config["id2label"] = {str(i): name for i, name in names.items()}
        config["label2id"] = {name: i for i, name in names.items()}
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def smallest_dtype(weights: dict[str, Tensor]) -> torch.dtype:
    """Return the smallest data type that represents float32 weights exactly."""
    for dtype in (torch.float16, torch.bfloat16):
        if all(torch.equal(weight.to(dtype).float(), weight) for weight in weights.values()):
            return dtype
    return torch.float32
