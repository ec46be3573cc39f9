"""Ranges of a network's states, which its int8 products scale by; importing this is light."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict

MapName = Literal["qkv", "output", "up", "down"]
"""The linear maps of a layer: to queries, keys and values, of contexts, of the feed-forward net."""


def _around_zero(bounds: tuple[float, float]) -> tuple[float, float]:
    low, high = bounds
    if not low <= 0 <= high:
        raise ValueError(f"a range must hold 0, {low:g} to {high:g} does not")
    return bounds


Range = Annotated[tuple[float, float], AfterValidator(_around_zero)]
"""The least and the greatest of some numbers, 0 among them."""


class LayerRanges(BaseModel):
    """What the states that each map of a layer reads lie between, on calibration texts."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    qkv: Range
    output: Range
    up: Range
    down: Range

    def of(self, name: MapName) -> Range:
        """Return the range of what one map reads."""
        bounds: Range = getattr(self, name)
        return bounds
