"""Ranges of a network's states, which its int8 products scale by; importing this is light."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

MapName = Literal["qkv", "output", "up", "down"]
"""The linear maps of a layer: to queries, keys and values, of contexts, of the feed-forward net."""
MAX_OUTLIERS = 4


class StateRange(BaseModel):
    """What the states that a map reads lie between, on calibration texts.

    Attributes:
        low, high: the least and the greatest number, or 0.
        outliers: columns that go far beyond, which are no part of the range; `apart` in older
            checkpoints.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    low: float = Field(le=0)
    high: float = Field(ge=0)
    outliers: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        default=(), max_length=MAX_OUTLIERS, validation_alias=AliasChoices("outliers", "apart")
    )


class LayerRanges(BaseModel):
    """The ranges of what each map of a layer reads."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    qkv: StateRange
    output: StateRange
    up: StateRange
    down: StateRange

    def of(self, name: MapName) -> StateRange:
        """Return the range of what one map reads."""
        found: StateRange = getattr(self, name)
        return found
