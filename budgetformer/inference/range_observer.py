"""What the states of a network lie between, seen on texts."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from budgetformer.cost.macs import Sizes
from budgetformer.inference.backends.linear import Linear, Product, Weights
from budgetformer.inference.packed import PackedPass, PackedTokens
from budgetformer.inference.ranges import MAX_OUTLIERS, LayerRanges, MapName, StateRange
from budgetformer.model.encoder import SequenceClassifier

NARROWER = 0.85
"""A column stands apart if the range without it is less than so many times as wide."""


class RangeObserver:
    """One layer's maps in float32, which note the bounds of what they read.

    Args:
        sizes: the network's.
    """

    def __init__(self, sizes: Sizes) -> None:
        inside = sizes.heads * sizes.head_size
        widths: dict[MapName, int] = {
            "qkv": sizes.width,
            "output": inside,
            "up": sizes.width,
            "down": sizes.neurons,
        }
        self._bounds = {name: torch.zeros(2, width) for name, width in widths.items()}

    def pack_linear(self, some: Weights) -> Linear:
        """Return a map that records the ranges of its inputs; see `PackLinear`."""
        run = Product(some.weight, some.bias)
        low, high = self._bounds[some.name]

        def apply(states: Tensor) -> Tensor:
            if len(states):
                least, most = states.float().cpu().aminmax(dim=0)
                low[some.columns] = low[some.columns].minimum(least)
                high[some.columns] = high[some.columns].maximum(most)
            return run(states)

        return apply

    def ranges(self) -> LayerRanges:
        """Return what was seen; a map that never ran has read nothing but 0."""
        return LayerRanges(**{name: _range(*bounds) for name, bounds in self._bounds.items()})


def _range(low: Tensor, high: Tensor) -> StateRange:
    """Return the range of columns whose bounds are given, [D] each, but for those far beyond."""
    low, high = low.clone(), high.clone()
    outliers: list[int] = []
    found: list[StateRange] = []
    for _ in range(min(MAX_OUTLIERS, len(low)) + 1):
        least, most = (float(f"{bound:.5g}") for bound in (low.min().item(), high.max().item()))
        found.append(StateRange(low=least, high=most, outliers=tuple(sorted(outliers))))
        ends = [int(low.argmin()), int(high.argmax())]
        column = min(ends, key=lambda end: _width_without(low, high, end))
        outliers.append(column)
        low[column] = high[column] = 0.0
    return min(found, key=lambda one: (one.high - one.low) / NARROWER ** len(one.outliers))


def _width_without(low: Tensor, high: Tensor, column: int) -> float:
    others = torch.arange(len(low)) != column
    return float((high * others).max() - (low * others).min())


def measure_ranges(
    model: SequenceClassifier, batches: Iterable[PackedTokens]
) -> tuple[LayerRanges, ...]:
    """Return the ranges of each layer's states, over all steps of the ladder.

    Args:
        model: the network.
        batches: texts of the kind that it will classify.
    """
    sizes = Sizes.of(model.config)
    layers = [RangeObserver(sizes) for _ in range(sizes.layers)]
    network = PackedPass(model, packers=[layer.pack_linear for layer in layers])
    for tokens in batches:
        for step in range(1, model.config.num_steps + 1):
            network.run_at(step, tokens)
    return tuple(layer.ranges() for layer in layers)
