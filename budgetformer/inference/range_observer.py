"""Measure the ranges of a network's states on calibration texts."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from budgetformer.cost.macs import Sizes
from budgetformer.inference.backends.linear import Linear, Product, Weights
from budgetformer.inference.packed import PackedPass, PackedTokens
from budgetformer.inference.ranges import MAX_OUTLIERS, LayerRanges, MapName, StateRange
from budgetformer.model.encoder import SequenceClassifier

OUTLIER_WIDTH_RATIO = 0.85
"""A column is an outlier if the range without it is narrower by this factor."""


class RangeObserver:
    """Pack one layer's maps in float32, and record the ranges of their inputs.

    Args:
        sizes: sizes of the network.
    """

    def __init__(self, sizes: Sizes) -> None:
        widths: dict[MapName, int] = {
            "qkv": sizes.width,
            "output": sizes.heads * sizes.head_size,
            "up": sizes.width,
            "down": sizes.neurons,
        }
        self._bounds = {name: torch.zeros(2, width) for name, width in widths.items()}

    def pack_linear(self, part: Weights) -> Linear:
        """Return a map that records the range of its inputs; see `PackLinear`."""
        run = Product(part.weight, part.bias)
        low, high = self._bounds[part.name]

        def apply(states: Tensor) -> Tensor:
            if len(states):
                minimum, maximum = states.float().cpu().aminmax(dim=0)
                low[part.columns] = low[part.columns].minimum(minimum)
                high[part.columns] = high[part.columns].maximum(maximum)
            return run(states)

        return apply

    def ranges(self) -> LayerRanges:
        """Return the recorded ranges; (0, 0) for a map that never ran."""
        return LayerRanges(**{name: _range(*bounds) for name, bounds in self._bounds.items()})


def _range(low: Tensor, high: Tensor) -> StateRange:
    """Choose the outliers among columns with these bounds, [D] each; return the range."""
    low, high = low.clone(), high.clone()
    outliers: list[int] = []
    candidates: list[StateRange] = []
    for _ in range(min(MAX_OUTLIERS, len(low)) + 1):
        bounds = (float(f"{bound:.5g}") for bound in (low.min().item(), high.max().item()))
        minimum, maximum = bounds
        candidates.append(StateRange(low=minimum, high=maximum, outliers=tuple(sorted(outliers))))
        ends = [int(low.argmin()), int(high.argmax())]
        column = min(ends, key=lambda end: _width_without(low, high, end))
        outliers.append(column)
        low[column] = high[column] = 0.0
    return min(candidates, key=lambda r: (r.high - r.low) / OUTLIER_WIDTH_RATIO ** len(r.outliers))


def _width_without(low: Tensor, high: Tensor, column: int) -> float:
    others = torch.arange(len(low)) != column
    return float((high * others).max() - (low * others).min())


def measure_ranges(
    model: SequenceClassifier, batches: Iterable[PackedTokens]
) -> tuple[LayerRanges, ...]:
    """Run texts at all steps of the ladder, and return the state ranges of each layer.

    Args:
        model: network to observe.
        batches: texts similar to production traffic.
    """
    sizes = Sizes.of(model.config)
    layers = [RangeObserver(sizes) for _ in range(sizes.layers)]
    network = PackedPass(model, packers=[layer.pack_linear for layer in layers])
    for tokens in batches:
        for step in range(1, model.config.num_steps + 1):
            network.run_at(step, tokens)
    return tuple(layer.ranges() for layer in layers)
