"""Which budget an input gets: f_o's calibrated rule, as plain data and pure functions.

A decision is made where something new is known. On arrival f_o gives s, and the operating point's
entry bands turn it into a first ladder step (0 answers from the embeddings). After a step has run,
an answer that is not sure enough is run once more at a larger one (escalation).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from budgetformer.errors import PolicyError

QualityName = Literal["fast", "balanced", "best"]
QUALITY_NAMES: tuple[QualityName, ...] = ("fast", "balanced", "best")


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class EntryBand(_Data):
    """Inputs whose s is at most `upto` (and above the band before) start at ladder step `step`."""

    upto: float = Field(ge=0, le=1)
    step: int = Field(ge=0)


class Escalation(_Data):
    """An answer less sure than `below`, from a smaller step than `step`, is run again at `step`."""

    below: float = Field(ge=0, le=1)
    step: int = Field(ge=1)


class OperatingPoint(_Data):
    """One calibrated rule, and what it reached on data that training never saw.

    Attributes:
        name: the quality level that this point stands for, if any.
        entry: bands over s, in rising order, the last one up to 1; empty: f_o's own ceil(s * S).
        escalation: the second look at unsure answers, if any.
        accuracy: share of right answers, 0..1.
        interval: its 95 % confidence interval, if known.
        points_lost: accuracy points (of 100) below the full budget; negative when above.
        macs_share: mean multiply-adds as a share of the dense network's.
        mean_heads: mean heads computed per input, summed over layers.
        budgets: share of the inputs that ended at each ladder step.
    """

    name: QualityName | None = None
    entry: tuple[EntryBand, ...] = ()
    escalation: Escalation | None = None
    accuracy: float
    interval: tuple[float, float] | None = None
    points_lost: float
    macs_share: float
    mean_heads: float
    budgets: dict[int, float] = {}

    @model_validator(mode="after")
    def _bands_cover(self) -> OperatingPoint:
        bounds = [band.upto for band in self.entry]
        if self.entry and (bounds != sorted(bounds) or bounds[-1] != 1):
            raise ValueError("entry bands must rise and end at 1")
        return self

    @property
    def top_entry(self) -> int:
        """The highest step at which an input starts; 0 where f_o's own rule holds."""
        return max((band.step for band in self.entry), default=0)

    def first_step(self, s: float) -> int | None:
        """Return the step at which an input with f_o's `s` starts; None: f_o's own rule holds."""
        return next((band.step for band in self.entry if s <= band.upto), None)

    def next_step(self, step: int, confidence: float) -> int | None:
        """Return the step to run after `step` answered with `confidence`.

        None: the answer stands.
        """
        escalation = self.escalation
        if escalation is None or step >= escalation.step or confidence >= escalation.below:
            return None
        return escalation.step


class BudgetRule(_Data):
    """An operating point as one request asks for it, with its ceiling or its fixed step."""

    point: OperatingPoint | None
    num_steps: int
    fixed: int | None = None
    ceiling: int | None = None

    @property
    def constant(self) -> int | None:
        """The step that this rule gives to every input, if it needs no f_o for that."""
        if self.fixed is None and self.point is not None and len(self.point.entry) == 1:
            return self.first_step(0.0)
        return self.fixed

    def first_step(self, s: float) -> int:
        """Return the step at which an input with f_o's `s` starts."""
        if self.fixed is not None:
            return self.fixed
        step = self.point.first_step(s) if self.point else None
        if step is None:
            step = min(max(math.ceil(s * self.num_steps), 1), self.num_steps)
        return step if self.ceiling is None else min(step, self.ceiling)

    def next_step(self, step: int, confidence: float) -> int | None:
        """Return the step to run after `step`; None: the answer stands."""
        if self.fixed is not None or self.point is None:
            return None
        following = self.point.next_step(step, confidence)
        if following is None or self.ceiling is None:
            return following
        following = min(following, self.ceiling)
        return following if following > step else None

    def expected_budgets(self) -> Mapping[int, float] | None:
        """Return the share of inputs that calibration saw end at each step under this rule.

        None: nothing was calibrated for it.
        """
        if self.fixed is not None:
            return {self.fixed: 1.0}
        if self.point is None or not self.point.budgets:
            return None
        if self.ceiling is None:
            return self.point.budgets
        shares: dict[int, float] = {}
        for budget, share in self.point.budgets.items():
            step = min(budget, self.ceiling)
            shares[step] = shares.get(step, 0.0) + share
        return shares


def choose_point(points: Sequence[OperatingPoint], quality: str | float) -> OperatingPoint:
    """Return the operating point for a quality level's name, or for the accuracy points given up.

    A number chooses the cheapest point that loses at most so many points against the full budget;
    when every point loses more, the most accurate one.

    Raises:
        PolicyError: the checkpoint has no such level.
    """
    if isinstance(quality, str):
        for point in points:
            if point.name == quality:
                return point
        named = ", ".join(p.name for p in points if p.name) or "none"
        raise PolicyError(f"no quality level {quality!r} in this checkpoint (it has: {named})")
    if not points:
        raise PolicyError("this checkpoint is not calibrated: it has no operating points")
    good = [p for p in points if p.points_lost <= quality]
    if good:
        return min(good, key=lambda p: p.macs_share)
    return min(points, key=lambda p: p.points_lost)
