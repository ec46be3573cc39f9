"""The description of one family of pretrained encoders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

Weights = dict[str, Tensor]


def refuse_narrow_embeddings(config: Any) -> str | None:
    """Refuse embeddings narrower than the encoder, which the family's networks do not support."""
    width = config.hidden_size
    narrow = getattr(config, "embedding_size", width) != width
    return "embedding_size differs from hidden_size" if narrow else None


def accept(_: Any) -> None:
    """Refuse nothing."""


def _no_choices(_: Any) -> dict[str, Any]:
    return {}


def _unchanged(weights: Weights, _: Any) -> Weights:
    return weights


@dataclass(frozen=True)
class Family:
    """The mapping of a family of encoders in Transformers to our names, sizes and options.

    Names are module names, without `weight` and `bias`. "Below the prefix" means without `prefix`.
    A bias that the family does not have is 0. Every conversion compares the result with the network
    of Transformers, so a wrong mapping fails.

    Attributes:
        model_type: value of `model_type` in `config.json`.
        architecture: Transformers class of the family's classifiers.
        prefix: prefix of the encoder's weights in a classifier.
        layers: module name of the layers, below the prefix.
        names: our names of modules outside the layers, by their names below the prefix.
        layer: our names of the modules in a layer, by their names in the layer.
        head: our names of modules on top of the encoder, by their names with the prefix.
        sizes: names in the family's configuration, by our names.
        choices: returns further fields of our configuration from the family's configuration.
        head_choices: returns the fields of our configuration for a classifier's head.
        adapt: splits, copies or renames weights (by names below the prefix) before `names` apply.
        refuse: returns the reason why a configuration cannot be converted, or None.
        extra_keys: keys of `config.json` that the network reads but its class does not list.
        positions_after_padding: whether a text's first position is `pad_token_id` + 1.
        has_types: whether the network reads token types.
        first_layer: module name of the first layer, below the prefix; None: `layers`.0.
    """

    model_type: str
    architecture: str
    prefix: str
    layers: str
    names: Mapping[str, str]
    layer: Mapping[str, str]
    head: Mapping[str, str]
    sizes: Mapping[str, str]
    choices: Callable[[Any], dict[str, Any]] = _no_choices
    head_choices: Callable[[Any], dict[str, Any]] = _no_choices
    adapt: Callable[[Weights, Any], Weights] = _unchanged
    refuse: Callable[[Any], str | None] = refuse_narrow_embeddings
    extra_keys: frozenset[str] = field(default=frozenset())
    positions_after_padding: bool = False
    has_types: bool = True
    first_layer: str | None = None

    @property
    def head_names(self) -> dict[str, str]:
        """The family's names of the head's weights and biases, by our names.

        It includes biases that the family may not have.
        """
        return {
            f"{ours}.{kind}": f"{theirs}.{kind}"
            for theirs, ours in self.head.items()
            for kind in ("weight", "bias")
        }

    def our_name(self, name: str) -> str | None:
        """Return our name of a weight from its name below the prefix; None: we do not use it."""
        module, _, kind = name.rpartition(".")
        if not module.startswith(f"{self.layers}."):
            ours = self.names.get(module)
        else:
            index, _, part = module.removeprefix(f"{self.layers}.").partition(".")
            ours = f"layers.{index}.{self.layer[part]}" if part in self.layer else None
        return None if ours is None else f"{ours}.{kind}"


def same(*names: str) -> dict[str, str]:
    """Return `Family.sizes` for sizes that have the same name in both configurations."""
    return {name: name for name in names}


def cls_head(activation: str) -> Callable[[Any], dict[str, Any]]:
    """Return `head_choices` for a dense layer with an activation on the first token's state."""
    return lambda _: {"pooling": "cls", "head_activation": activation}


def rotary_base(parameters: Mapping[str, Any]) -> float:
    """Return the base of rotary positions.

    Raises:
        ValueError: this variant of rotary positions cannot be converted.
    """
    kind, part = parameters.get("rope_type", "default"), parameters.get("partial_rotary_factor")
    if kind != "default" or part not in (None, 1.0):
        raise ValueError(f"rotary positions of type {kind!r} cannot be converted")
    return float(parameters["rope_theta"])


def split_rows(weights: Weights, fused: str, parts: list[str]) -> Weights:
    """Split each weight of a module named `fused` into equal parts by rows, named `parts`."""
    split: Weights = {}
    for name, weight in weights.items():
        module, _, kind = name.rpartition(".")
        if not module.endswith(f".{fused}"):
            split[name] = weight
            continue
        parent = module.removesuffix(fused)
        for part, rows in zip(parts, weight.chunk(len(parts)), strict=True):
            split[f"{parent}{part}.{kind}"] = rows
    return split
