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
    """Map one family of encoders to our names, sizes and options.

    Names are module names, without `weight` and `bias`. A bias that the family does not have is 0.
    Every conversion compares the result with Transformers' network, so a wrong description fails.

    Attributes:
        model_type: its value in `config.json`.
        architecture: Transformers' class of its classifiers.
        prefix: of the encoder's weights in a classifier.
        layers: module name of the layers, below the prefix.
        names, layer: our names by theirs, of modules outside the layers and in each layer.
        head: our names by theirs, of modules on top of the encoder; with prefix.
        sizes: their configuration's names by ours.
        choices: further fields of our configuration, computed from theirs.
        head_choices: likewise for a classifier's head.
        adapt: split, copy or rename their weights (names below the prefix) before `names` apply.
        refuse: a reason not to convert a configuration, or None.
        extra_keys: keys of `config.json` that its network reads but its class does not list.
        positions_after_padding: whether a text's first position is `pad_token_id` + 1.
        has_types: whether its network reads token types.
        first_layer: module name of its first layer below the prefix; None: `layers`.0.
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
        """Their names of the head's weights and biases by ours, including biases it may lack."""
        kinds = ("weight", "bias")
        return {f"{o}.{kind}": f"{t}.{kind}" for t, o in self.head.items() for kind in kinds}

    def our_name(self, name: str) -> str | None:
        """Return our name of a weight (named below the prefix); None if we do not use it."""
        place, _, kind = name.rpartition(".")
        if not place.startswith(f"{self.layers}."):
            ours = self.names.get(place)
        else:
            index, _, part = place.removeprefix(f"{self.layers}.").partition(".")
            ours = f"layers.{index}.{self.layer[part]}" if part in self.layer else None
        return None if ours is None else f"{ours}.{kind}"


def same(*names: str) -> dict[str, str]:
    """Return `Family.sizes` for sizes whose names are the same."""
    return {name: name for name in names}


def cls_head(activation: str) -> Callable[[Any], dict[str, Any]]:
    """Return `head_choices` for a dense layer with an activation on the first token's state."""
    return lambda _: {"pooling": "cls", "head_activation": activation}


def rotary_base(parameters: Mapping[str, Any]) -> float:
    """Return the base of rotary positions.

    Raises:
        ValueError: it is a variant of rotary positions that cannot be converted.
    """
    kind, part = parameters.get("rope_type", "default"), parameters.get("partial_rotary_factor")
    if kind != "default" or part not in (None, 1.0):
        raise ValueError(f"rotary positions of type {kind!r} cannot be converted")
    return float(parameters["rope_theta"])


def split_rows(weights: Weights, fused: str, parts: list[str]) -> Weights:
    """Split each weight of a module named `fused` into equal parts by rows, named `parts`."""
    found: Weights = {}
    for name, weight in weights.items():
        place, _, kind = name.rpartition(".")
        if not place.endswith(f".{fused}"):
            found[name] = weight
            continue
        place = place.removesuffix(fused)
        for part, rows in zip(parts, weight.chunk(len(parts)), strict=True):
            found[f"{place}{part}.{kind}"] = rows
    return found
