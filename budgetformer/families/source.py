"""Read an encoder or classifier from a folder that Transformers saved.

Transformers loads the weights (one file or several, safetensors or `.bin`, any precision, old
names), and reports missing and unexpected ones. Pickled code is never run.
"""

from __future__ import annotations

import json
import math
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from budgetformer.errors import CheckpointError, one_line
from budgetformer.families import FAMILIES
from budgetformer.families.family import Family, Weights
from budgetformer.model.architecture import MULTI_LABEL
from budgetformer.model.modeling import silence_transformers
from budgetformer.model_folder import describe_headless

_ONLY: dict[str, Any] = {
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "quantization_config": None,
    "pruned_heads": {},
}
"""Keys of `config.json` that change an encoder's function, with the only supported value."""

_NO_FUNCTION = {
    *("_name_or_path", "_num_labels", "architectures", "dtype", "finetuning_task", "torch_dtype"),
    *("gradient_checkpointing", "output_past", "embedding_size", "num_labels", "model_max_length"),
    *("directionality", "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers"),
    *("pooler_size_per_head", "pooler_type", "tie_weights_"),
}
"""Keys of old files that do not change the function, or are checked separately."""

_OTHER_HEADS = (
    *("cls.", "lm_head.", "qa_outputs.", "pooler.", "classifier.", "pre_classifier."),
    *("vocab_transform.", "vocab_layer_norm.", "vocab_projector."),
)
"""Prefixes of weights of other tasks' heads, which a classifier does not need."""


@dataclass(frozen=True)
class Source:
    """An encoder or classifier, loaded by Transformers in float32.

    Attributes:
        folder: folder that was read.
        family: family of the encoder.
        network: classifier of Transformers; its head is random if the folder has none.
        has_head: whether the folder has a classification head.
        architectures: Transformers classes from which the folder was saved; may be empty.
        notes: messages about unused parts, one line each.
    """

    folder: Path
    family: Family
    network: PreTrainedModel
    has_head: bool
    architectures: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def label_names(self) -> list[str]:
        """The names of the head's labels, in the order of its outputs."""
        config: Any = self.network.config
        return [str(config.id2label.get(i, f"LABEL_{i}")) for i in range(config.num_labels)]

    @property
    def problem_type(self) -> str:
        """`problem_type` of the configuration, single-label by default."""
        return self.network.config.problem_type or "single_label_classification"

    @property
    def weights(self) -> Weights:
        """The weights by Transformers' names, without a random head."""
        unused = () if self.has_head else self.family.head_names.values()
        state: Weights = self.network.state_dict()
        return {name: weight for name, weight in state.items() if name not in unused}

    @property
    def encoder_weights(self) -> Weights:
        """The encoder's weights by our names."""
        prefix, config = self.family.prefix, self.network.config
        below = {
            name.removeprefix(prefix): weight
            for name, weight in self.network.state_dict().items()
            if name.startswith(prefix)
        }
        adapted = self.family.adapt(below, config)
        named = {self.family.our_name(name): weight for name, weight in adapted.items()}
        return {name: weight for name, weight in named.items() if name is not None}

    @property
    def first_layer(self) -> nn.Module:
        """The encoder's first layer."""
        name = self.family.first_layer or f"{self.family.layers}.0"
        return self.network.base_model.get_submodule(name)

    @property
    def first_position(self) -> int:
        """Row of the position table for a text's first token."""
        pad = self.network.config.pad_token_id
        return pad + 1 if self.family.positions_after_padding else 0


def read_encoder(folder: Path) -> Source:
    """Load an encoder or classifier, and check that all weights and settings can be converted.

    Args:
        folder: folder with a `config.json` and weights of one of `FAMILIES`.

    Raises:
        CheckpointError: the folder has no such network; a weight is missing, unexpected, of another
            shape or not finite; or the configuration has a setting that cannot be converted.
    """
    config = _read_config(folder)
    family = FAMILIES[config["model_type"]]
    network, report = _load(folder)
    head = set(family.head_names.values()) & network.state_dict().keys()
    architectures = config.get("architectures") or ()
    declared = family.architecture in architectures
    missing, unexpected = set(report["missing_keys"]), set(report["unexpected_keys"])
    mismatched = {name: shapes for name, *shapes in report["mismatched_keys"]}
    has_head = declared or not (architectures or head & missing)
    if not has_head:
        missing -= head
        mismatched = {name: shapes for name, shapes in mismatched.items() if name not in head}
    if missing:
        raise CheckpointError(f"{folder}: missing weights: {_first_of(missing)}")
    for name, (found, wanted) in sorted(mismatched.items()):
        raise CheckpointError(
            f"{folder}: {name} has shape {list(found)}, but config.json requires {list(wanted)}"
        )
    other_heads = {n for n in unexpected if n.removeprefix(family.prefix).startswith(_OTHER_HEADS)}
    if unexpected - other_heads:
        raise CheckpointError(
            f"{folder}: unexpected weights for {family.architecture}: "
            f"{_first_of(unexpected - other_heads)}"
        )
    known = type(network.config)().to_dict().keys() | _ONLY.keys() | _NO_FUNCTION
    known |= family.extra_keys
    ignored = sorted(config.keys() - known)
    notes = []
    if other_heads:
        notes.append(f"weights of another task are not used: {_first_of(other_heads)}")
    if ignored:
        notes.append(f"keys of config.json that Transformers ignores: {', '.join(ignored)}")
    if reason := family.refuse(network.config):
        raise CheckpointError(f"{folder}: {reason}")
    source = Source(folder, family, network, has_head, tuple(architectures), tuple(notes))
    _check_finite(source)
    _check_outputs(source)
    return source


def _read_config(folder: Path) -> dict[str, Any]:
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(
            f"{folder}: this is a PEFT adapter; merge it into its model first "
            "(AutoPeftModelForSequenceClassification: merge_and_unload, then save_pretrained)"
        )
    try:
        config = json.loads((folder / "config.json").read_text())
    except FileNotFoundError as error:
        kind = describe_headless(folder) or "not an encoder folder: it has no config.json"
        raise CheckpointError(f"{folder}: {kind}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: not an encoder folder: {one_line(error)}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder}: not an encoder folder: config.json is not a JSON object")
    if config.get("auto_map"):
        raise CheckpointError(
            f"{folder}: the model requires its own code (auto_map in config.json), which is never "
            "run; save it with a model class of Transformers"
        )
    if config.get("model_type") == "budgetformer":
        raise CheckpointError(
            f"{folder}: already a BudgetFormer; add it with `budgetformer models add`"
        )
    if str(config.get("model_type")) not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise CheckpointError(
            f"{folder}: model_type {config.get('model_type')!r} cannot be converted; "
            f"supported: {known}"
        )
    for key, only in _ONLY.items():
        if config.get(key) not in (only, None):
            raise CheckpointError(
                f"{folder}: {key} in config.json is {one_line(config[key])[:80]!r}, "
                f"but only {only!r} can be converted"
            )
    return config


def _load(folder: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a folder as a classifier, with Transformers' report on its weights."""
    try:
        with silence_transformers(), torch.random.fork_rng(devices=[]):
            network, report = AutoModelForSequenceClassification.from_pretrained(
                folder,
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=False,
                weights_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are in the report
                chunk_size_feed_forward=0,  # chunks would restrict the lengths
            )
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{folder}: not an encoder folder: the .bin file is damaged or holds more than tensors"
        ) from error
    except Exception as error:  # Transformers, safetensors and torch raise many types
        reason = one_line(error)[:300] or type(error).__name__
        raise CheckpointError(f"{folder}: not an encoder folder: {reason}") from error
    return network.eval(), report


def _first_of(names: set[str]) -> str:
    first, *others = sorted(names)
    return f"{first} and {len(others)} more" if others else first


def _check_finite(source: Source) -> None:
    for name, weight in source.weights.items():
        largest = max(map(abs, torch.stack(weight.aminmax()).tolist()))
        if not math.isfinite(largest):
            raise CheckpointError(f"{source.folder}: {name} has a number that is not finite")
        if largest > torch.finfo(torch.float16).max:
            raise CheckpointError(
                f"{source.folder}: {name} exceeds the range of float16, the type of checkpoints"
            )


def _check_outputs(source: Source) -> None:
    config = source.network.config
    one_output = config.num_labels == 1 and config.problem_type != MULTI_LABEL
    if source.has_head and (one_output or config.problem_type == "regression"):
        raise CheckpointError(
            f"{source.folder}: a regression model; only classifiers can be converted "
            "(to train a new head, save only its encoder with AutoModel)"
        )
