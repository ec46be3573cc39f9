"""What there is to say about one family of pretrained encoders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

Weights = dict[str, Tensor]


def refuse_narrow_embeddings(config: Any) -> str | None:
    """Refuse embeddings that the family's networks do not bring to their width."""
    width = config.hidden_size
    narrow = getattr(config, "embedding_size", width) != width
    return "embedding_size differs from hidden_size" if narrow else None


def accept(_: Any) -> None:
    """Refuse nothing."""


def _no_more(_: Any) -> dict[str, Any]:
    return {}


def _as_they_are(weights: Weights, _: Any) -> Weights:
    return weights


@dataclass(frozen=True)
class Family:
    """How one family of encoders names its weights and sizes, and what it computes.

    Names are those of modules: `weight` and `bias` follow. A bias that a family does not have is 0.
    What is said here of a function is not believed but compared with Transformers' own network at
    every conversion.

    Attributes:
        model_type: in `config.json`.
        architecture: Transformers' class of its classifiers.
        prefix: of the encoder's weights inside a classifier.
        layers: where its layers are, below the prefix.
        names, layer: our names by theirs, of what is outside layers, and of what is in each.
        head: our names by theirs, of what is on top of the encoder; whole names.
        sizes: theirs by our configuration's names.
        choices: further fields of our configuration, from theirs.
        head_choices: the same of a classifier's head.
        adapt: split, copy or rename weights before they are named; theirs below the prefix.
        refuse: a reason not to convert a configuration, or None.
        extra_keys: keys of `config.json` that its class does not list, and its network reads.
        positions_after_padding: whether a text's first position is the one after `pad_token_id`.
        has_types: whether its network reads token types.
        first_layer: its first layer's module below the prefix, where that is not `layers` and 0.
    """

    model_type: str
    architecture: str
    prefix: str
    layers: str
    names: Mapping[str, str]
    layer: Mapping[str, str]
    head: Mapping[str, str]
    sizes: Mapping[str, str]
    choices: Callable[[Any], dict[str, Any]] = _no_more
    head_choices: Callable[[Any], dict[str, Any]] = _no_more
    adapt: Callable[[Weights, Any], Weights] = _as_they_are
    refuse: Callable[[Any], str | None] = refuse_narrow_embeddings
    extra_keys: frozenset[str] = field(default=frozenset())
    positions_after_padding: bool = False
    has_types: bool = True
    first_layer: str | None = None

    @property
    def head_names(self) -> dict[str, str]:
        """The names of a head's weights and biases by ours; it may lack a bias."""
        kinds = ("weight", "bias")
        return {f"{o}.{kind}": f"{t}.{kind}" for t, o in self.head.items() for kind in kinds}

    def our_name(self, name: str) -> str | None:
        """Return our name of a weight below the prefix; None: it is not part of the encoder."""
        place, _, kind = name.rpartition(".")
        if not place.startswith(f"{self.layers}."):
            ours = self.names.get(place)
        else:
            index, _, part = place.removeprefix(f"{self.layers}.").partition(".")
            ours = f"layers.{index}.{self.layer[part]}" if part in self.layer else None
        return None if ours is None else f"{ours}.{kind}"


def same(*names: str) -> dict[str, str]:
    """Return sizes that a family calls as we do."""
    return {name: name for name in names}


def cls_head(activation: str) -> Callable[[Any], dict[str, Any]]:
    """Return the head of most families: a dense map of the first token's state, and a function."""
    return lambda _: {"pooling": "cls", "head_activation": activation}


def rotary_base(parameters: Mapping[str, Any]) -> float:
    """Return the base of rotary positions.

    Raises:
        ValueError: they are of another kind.
    """
    kind, part = parameters.get("rope_type", "default"), parameters.get("partial_rotary_factor")
    if kind != "default" or part not in (None, 1.0):
        raise ValueError(f"rotary positions of the kind {kind!r} cannot be converted")
    return float(parameters["rope_theta"])


def split_rows(weights: Weights, fused: str, parts: list[str]) -> Weights:
    """Cut each weight whose module's name ends with `fused` into parts of equally many rows."""
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
