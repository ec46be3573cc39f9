"""What the states of a network lie between, seen on texts."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from budgetformer.compact.linear import Linear, float32_linear
from budgetformer.compact.packed import PackedPass, PackedTokens
from budgetformer.modules import SequenceClassifier
from budgetformer.ranges import LayerRanges, MapName, Range


class Observed:
    """One layer's maps in float32, which note the range of what they read."""

    def __init__(self) -> None:
        self._seen: dict[MapName, Range] = {}

    def lay_out(self, name: MapName, weight: Tensor, bias: Tensor | None) -> Linear:
        """Lay out a map that notes; see `LayOut`."""
        run = float32_linear(weight, bias)

        def apply(states: Tensor) -> Tensor:
            if states.numel():
                low, high = torch.stack(states.aminmax()).tolist()
                self._note(name, low, high)
            return run(states)

        return apply

    def ranges(self) -> LayerRanges:
        """Return what was seen; a map that never ran has read nothing but 0."""
        names: tuple[MapName, ...] = ("qkv", "output", "up", "down")
        return LayerRanges(**{name: _short(self._seen.get(name, (0.0, 0.0))) for name in names})

    def _note(self, name: MapName, low: float, high: float) -> None:
        least, most = self._seen.get(name, (0.0, 0.0))
        self._seen[name] = min(least, low), max(most, high)


def _short(bounds: Range) -> Range:
    """Return a range in five digits, finer than any scale that is made of it."""
    low, high = (float(f"{bound:.5g}") for bound in bounds)
    return low, high


def measure_ranges(
    model: SequenceClassifier, batches: Iterable[PackedTokens]
) -> tuple[LayerRanges, ...]:
    """Return the ranges of each layer's states, over all steps of the ladder.

    Few numbers are far from all others, and clipping them costs more labels than the finer scale
    of what is left would save: so nothing is left out.

    Args:
        model: the network, on a CPU.
        batches: texts of the kind that it will classify.
    """
    layers = [Observed() for _ in range(model.config.num_hidden_layers)]
    network = PackedPass(model, lay_outs=[layer.lay_out for layer in layers])
    for tokens in batches:
        for step in range(1, model.config.num_steps + 1):
            network.run_at(step, tokens)
    return tuple(layer.ranges() for layer in layers)
