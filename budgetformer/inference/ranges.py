"""State ranges for the scales of int8 products; this module does not import torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

MapName = Literal["qkv", "output", "up", "down"]
"""The linear maps of a layer: queries, keys and values; attention output; feed-forward up, down."""
MAX_OUTLIERS = 4
"""Maximum outlier columns per map."""


class StateRange(BaseModel):
    """The range of the states that a map reads, on calibration texts.

    Attributes:
        low: minimum, but at most 0.
        high: maximum, but at least 0.
        outliers: columns whose states go far beyond the range, which leaves them out; named `apart`
            in older checkpoints.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    low: float = Field(le=0)
    high: float = Field(ge=0)
    outliers: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        default=(), max_length=MAX_OUTLIERS, validation_alias=AliasChoices("outliers", "apart")
    )


class LayerRanges(BaseModel):
    """The ranges of the states that each map of a layer reads."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    qkv: StateRange
    output: StateRange
    up: StateRange
    down: StateRange

    def of(self, name: MapName) -> StateRange:
        """Return the range of the states that one map reads."""
        state_range: StateRange = getattr(self, name)
        return state_range
