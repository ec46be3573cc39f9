"""Calibrated rules that decide the budget of a text, as plain data and pure functions.

A policy is a chain of ladder steps with one confidence threshold per quality level. Step 0, if
there is one, answers first. Its confidence must reach the threshold plus the exit margin, which is
the same for all levels. A text whose answer is not confident enough goes to the link of the chain
that f_o's s selects, and from there link by link until an answer reaches the threshold; the answer
of the last link is always final. Only the threshold depends on the level. So the steps that a text
runs at one level are the first of those that it runs at a higher one, and its cost can only rise
with the level.

Older checkpoints have operating points instead: bands and one escalation for each level. Both forms
become a `BudgetRule`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from budgetformer.errors import PolicyError
from budgetformer.model.tfidf import Array

Measure = Literal["accuracy", "agreement"]
"""What a policy was calibrated for: correct answers, or agreement with the full network."""
QualityName = Literal["fast", "balanced", "best"]
QUALITY_NAMES: tuple[QualityName, ...] = ("fast", "balanced", "best")
Interval = tuple[float, float]
Shares = Mapping[int, float]
"""Share of the texts by ladder step."""


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class EntryBand(_Data):
    """Texts whose s is at most `upto` (and above the band before) start at ladder step `step`."""

    upto: float = Field(ge=0, le=1)
    step: int = Field(ge=0)


class Level(_Data):
    """A confidence threshold, with figures measured on texts not used to choose it.

    Attributes:
        name: quality level with this threshold, if any.
        threshold: an answer is final if its confidence is at least this.
        accuracy: share of correct answers; None without labels.
        interval: 95 % interval of `accuracy`.
        agreement: share of answers that equal those of the full network; None if not measured.
        agreement_interval: 95 % interval of `agreement`.
        points_lost: drop of the policy's measure against the full network, in percentage points;
            negative if it is better.
        macs_share: mean multiply-adds as a share of the dense network's.
        macs_interval: 95 % interval of `macs_share`.
        mean_heads: mean heads computed per text, summed over layers and passes.
        budgets: share of the texts that ended at each step.
        runs: share of the texts that ran each step >= 1; a text may run several.
    """

    name: QualityName | None = None
    threshold: float = Field(ge=0, le=1)
    accuracy: float | None = None
    interval: Interval | None = None
    agreement: float | None = None
    agreement_interval: Interval | None = None
    points_lost: float
    macs_share: float
    macs_interval: Interval | None = None
    mean_heads: float
    budgets: dict[int, float] = {}
    runs: dict[int, float] = {}

    def reached(self, measure: Measure) -> tuple[float, Interval]:
        """Return the share for a measure with its 95 % interval, (0, 1) if unknown."""
        if measure == "accuracy":
            share, interval = self.accuracy, self.interval
        else:
            share, interval = self.agreement, self.agreement_interval
        return (0.0 if share is None else share), interval or (0.0, 1.0)


class Policy(_Data):
    """A chain of steps, f_o's bands over it, and one threshold per level.

    Attributes:
        measure: measure of the levels' `points_lost`.
        chain: rising ladder steps, beginning with 0 if the checkpoint has a step 0.
        entry: bands over f_o's s, the same for all levels, in rising order with the last up to 1.
            They select the link for texts that step 0 did not answer.
        exit_margin: step 0's answer is final if its confidence is at least the threshold plus
            this; never if that exceeds 1.
        levels: levels in order of rising threshold; those with a name are quality levels.
    """

    measure: Measure = "accuracy"
    chain: tuple[int, ...] = Field(min_length=1)
    entry: tuple[EntryBand, ...] = Field(min_length=1)
    exit_margin: float = Field(default=0.0, ge=0, le=1)
    levels: tuple[Level, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _fits_together(self) -> Policy:
        if self.chain[0] < 0 or any(b <= a for a, b in pairwise(self.chain)):
            raise ValueError("the steps of a chain must rise, from 0 or above")
        _check_bands(self.entry)
        links = set(self.chain) - {0} or {0}
        if not {band.step for band in self.entry} <= links:
            raise ValueError(f"entry bands must name steps of the chain: {sorted(links)}")
        if any(b.threshold < a.threshold for a, b in pairwise(self.levels)):
            raise ValueError("levels must be in order of rising threshold")
        named = [level.name for level in self.levels if level.name]
        if named != [name for name in QUALITY_NAMES if name in named]:
            raise ValueError(f"named levels must be in order, each once: {', '.join(named)}")
        return self

    def level(self, quality: str | float) -> Level:
        """Return the level with this name, or the cheapest with at most this accuracy drop.

        A drop is in percentage points. Between two levels, the threshold and all figures are
        interpolated linearly, so a larger drop never gives a higher threshold. If every level has a
        larger drop, the one with the smallest drop is returned.

        Raises:
            PolicyError: there is no level with that name.
        """
        if isinstance(quality, str):
            return _named(self.levels, quality)
        low = self.levels[0]
        for level in self.levels[1:]:
            if low.points_lost <= quality:
                break
            if level.points_lost >= low.points_lost:
                continue  # a higher threshold without a smaller drop is useless
            if level.points_lost <= quality:
                return _between(low, level, quality)
            low = level
        return low

    def rule_at(
        self, level: Level, num_steps: int, fixed: int | None = None, ceiling: int | None = None
    ) -> BudgetRule:
        """Return the rule for a level from `level`; see `BudgetRule`."""
        return BudgetRule(
            num_steps=num_steps,
            entry=self.entry,
            chain=self.chain,
            exit_margin=self.exit_margin,
            level=level,
            fixed=fixed,
            ceiling=ceiling,
        )


class Escalation(_Data):
    """Run `step` for answers of earlier steps whose confidence is under `below`."""

    below: float = Field(ge=0, le=1)
    step: int = Field(ge=1)


class OperatingPoint(_Data):
    """A level of older checkpoints, which has its own bands and escalation.

    Networks whose layers decide the budgets still use it, without bands and escalation.

    Attributes:
        entry: bands over s that select the first step (0 allowed), in rising order with the last up
            to 1; empty: ceil(s * S).
        escalation: the second pass for uncertain answers, if any.
        name, accuracy, interval, points_lost, macs_share, mean_heads, budgets: see `Level`.
    """

    name: QualityName | None = None
    entry: tuple[EntryBand, ...] = ()
    escalation: Escalation | None = None
    accuracy: float
    interval: Interval | None = None
    points_lost: float
    macs_share: float
    mean_heads: float
    budgets: dict[int, float] = {}

    @model_validator(mode="after")
    def _bands_cover(self) -> OperatingPoint:
        if self.entry:
            _check_bands(self.entry)
        return self

    @property
    def level(self) -> Level:
        """The same figures as a `Level`, with estimated `runs`."""
        figures = self.model_dump(exclude={"entry", "escalation"})
        below = self.escalation.below if self.escalation else 0.0
        return Level(**figures, threshold=below, runs=self._runs())

    def rule(
        self, num_steps: int, fixed: int | None = None, ceiling: int | None = None
    ) -> BudgetRule:
        """Return the equivalent rule: the escalation becomes a chain with one link."""
        return BudgetRule(
            num_steps=num_steps,
            entry=self.entry,
            chain=(self.escalation.step,) if self.escalation else (),
            level=self.level,
            fixed=fixed,
            ceiling=ceiling,
        )

    def _runs(self) -> dict[int, float]:
        runs = {step: share for step, share in self.budgets.items() if step}
        if self.escalation is None or self.escalation.step not in runs:
            return runs
        # Assume that texts that ended at the escalation's step came from the highest band.
        first = max((band.step for band in self.entry), default=0)
        if 0 < first < self.escalation.step:
            runs[first] = runs.get(first, 0.0) + runs[self.escalation.step]
        return runs


class BudgetRule(_Data):
    """The rule that decides the budgets of one request's texts.

    Attributes:
        num_steps: steps S of the ladder.
        entry: bands over s; empty: ceil(s * S).
        chain: rising steps. Step 0, if included, runs first; an answer that is not confident enough
            is followed by the next higher step.
        exit_margin: see `Policy`.
        level: threshold and calibrated figures; None: every answer is final.
        fixed: the only step to run; overrides all else.
        ceiling: highest step that may run.
    """

    num_steps: int
    entry: tuple[EntryBand, ...] = ()
    chain: tuple[int, ...] = ()
    exit_margin: float = 0.0
    level: Level | None = None
    fixed: int | None = None
    ceiling: int | None = None

    @property
    def constant(self) -> int | None:
        """The first step of every text, or None if it depends on the text."""
        if self.fixed is None and len(self.entry) != 1 and self.chain[:1] != (0,):
            return None
        return self.first_step(0.0)

    @property
    def uses_f_o(self) -> bool:
        """Whether the steps of a text depend on f_o."""
        return self.fixed is None and len(self.entry) != 1

    def path(self, s: float) -> tuple[int, ...]:
        """Return the rising steps that a text with this `s` runs until an answer is final."""
        return self._path_from(self._band(s))

    def _path_from(self, start: int) -> tuple[int, ...]:
        """Return the path of a text for which f_o selects step `start`."""
        if self.fixed is not None:
            return (self.fixed,)
        steps = [start, *(step for step in self.chain if step > start)]
        if self.chain[:1] == (0,) and start > 0:
            steps.insert(0, 0)
        if self.ceiling is None:
            return tuple(steps)
        return tuple(sorted({min(step, self.ceiling) for step in steps}))

    def first_step(self, s: float) -> int:
        """Return the first step of a text with this `s`."""
        return self.path(s)[0]

    def next_step(self, step: int, confidence: float, s: float) -> int | None:
        """Return the step to run after `step` answered with `confidence`; None if it is final."""
        if self.level is None or confidence >= self.required_confidence(step):
            return None
        return next((later for later in self.path(s) if later > step), None)

    def required_confidence(self, step: int) -> float:
        """Return the confidence from which an answer of `step` is final."""
        if self.level is None:
            return 0.0
        return threshold_at(step, self.level.threshold, self.exit_margin)

    def next_link(self, step: int) -> int | None:
        """Return the step after uncertain answers of `step` >= 1, which does not depend on s.

        None: every answer of `step` is final.
        """
        if self.level is None or self.fixed is not None:
            return None
        later = next((link for link in self.chain if link > step), None)
        if later is None or self.ceiling is None or later <= self.ceiling:
            return later
        return self.ceiling if self.ceiling > step else None

    def first_steps(self, s: Array, confidence: Array | None = None) -> tuple[Array, Array]:
        """Decide B texts before the encoder runs.

        Args:
            s: f_o's outputs, [B].
            confidence: of step 0's answers, [B]; None: there is no step 0.

        Returns:
            The first step of the encoder for each text [B], 0 if step 0's answer is final; and
            whether the rule used step 0's answer [B].
        """
        if not self.uses_f_o:
            return self._first_steps(self._band(0.0), len(s), confidence)
        starts = self._bands(s)
        distinct = set(starts.tolist())
        if len(distinct) == 1:
            return self._first_steps(distinct.pop(), len(s), confidence)
        steps, asked = np.zeros(len(s), np.int32), np.zeros(len(s), bool)
        for start in distinct:
            here = starts == start
            own = None if confidence is None else confidence[here]
            steps[here], asked[here] = self._first_steps(start, int(here.sum()), own)
        return steps, asked

    def _first_steps(self, start: int, count: int, confidence: Array | None) -> tuple[Array, Array]:
        """Decide `count` texts for which f_o selects step `start`; see `first_steps`."""
        first, *later = self._path_from(start)
        steps = np.full(count, first, np.int32)
        asked = np.full(count, not first and confidence is not None)
        if not first and later and self.level is not None and confidence is not None:
            # Compared in double precision, as after every other step.
            steps[confidence.astype(np.float64) < self.required_confidence(0)] = later[0]
        return steps, asked

    def expected_budgets(self) -> Shares | None:
        """Return the calibrated share of texts that end at each step; None if not calibrated."""
        if self.fixed is not None:
            return {self.fixed: 1.0}
        if self.level is None or not self.level.budgets:
            return None
        if self.ceiling is None:
            return self.level.budgets
        shares: dict[int, float] = {}
        for budget, share in self.level.budgets.items():
            step = min(budget, self.ceiling)
            shares[step] = shares.get(step, 0.0) + share
        return shares

    def expected_runs(self) -> Shares | None:
        """Return the calibrated share of texts that run each step >= 1; None if not calibrated.

        A text may run several steps.
        """
        ends = self.expected_budgets()
        if ends is None or self.level is None or self.fixed is not None:
            return ends and {step: share for step, share in ends.items() if step}
        if self.ceiling is None:
            return self.level.runs
        runs = {step: share for step, share in self.level.runs.items() if step < self.ceiling}
        if ends.get(self.ceiling) and self.ceiling:
            runs[self.ceiling] = ends[self.ceiling]
        return runs

    def _band(self, s: float) -> int:
        for band in self.entry:
            if s <= band.upto:
                return band.step
        return min(max(math.ceil(s * self.num_steps), 1), self.num_steps)

    def _bands(self, s: Array) -> Array:
        """Return the step that f_o selects for each s, [B]."""
        s = s.astype(np.float64)
        if not self.entry:
            own: Array = np.clip(np.ceil(s * self.num_steps), 1, self.num_steps).astype(np.int32)
            return own
        bounds = np.array([band.upto for band in self.entry])
        places = np.searchsorted(bounds, s).clip(max=len(bounds) - 1)
        steps: Array = np.array([band.step for band in self.entry], np.int32)[places]
        return steps


def threshold_at(step: int, threshold: float, exit_margin: float) -> float:
    """Return the confidence from which the answer of a step is final."""
    return threshold if step else threshold + exit_margin


def choose_point(points: Sequence[OperatingPoint], quality: str | float) -> OperatingPoint:
    """Return the operating point with this name, or with at most this accuracy drop in points.

    A number selects the cheapest point with at most this drop against the full budget; if every
    point has a larger drop, the one with the smallest.

    Raises:
        PolicyError: the checkpoint has no such level.
    """
    if isinstance(quality, str):
        return _named(points, quality)
    if not points:
        raise PolicyError(
            "this checkpoint has no operating points: run `budgetformer calibrate` on it"
        )
    good = [p for p in points if p.points_lost <= quality]
    if good:
        return min(good, key=lambda p: p.macs_share)
    return min(points, key=lambda p: p.points_lost)


def _check_bands(bands: Sequence[EntryBand]) -> None:
    bounds = [band.upto for band in bands]
    if bounds != sorted(bounds) or bounds[-1] != 1:
        raise ValueError("entry bands must rise and end at 1")


_Named = TypeVar("_Named", "Level", "OperatingPoint")


def _named(levels: Sequence[_Named], name: str) -> _Named:
    for level in levels:
        if level.name == name:
            return level
    named = ", ".join(level.name for level in levels if level.name) or "none"
    raise PolicyError(f"this checkpoint has no quality level {name!r}, only: {named}")


def _between(low: Level, high: Level, points_lost: float) -> Level:
    """Interpolate two levels at an accuracy drop; `high` has the smaller drop."""
    weight = (low.points_lost - points_lost) / (low.points_lost - high.points_lost)

    def mix(a: float, b: float) -> float:
        # Clamped, so that rounding cannot put thresholds out of order.
        return min(max(a + (b - a) * weight, min(a, b)), max(a, b))

    def mix_known(a: float | None, b: float | None) -> float | None:
        return None if a is None or b is None else mix(a, b)

    def mix_interval(a: Interval | None, b: Interval | None) -> Interval | None:
        return None if a is None or b is None else (mix(a[0], b[0]), mix(a[1], b[1]))

    def mix_shares(a: Shares, b: Shares) -> dict[int, float]:
        return {step: mix(a.get(step, 0.0), b.get(step, 0.0)) for step in sorted({*a, *b})}

    return Level(
        threshold=mix(low.threshold, high.threshold),
        accuracy=mix_known(low.accuracy, high.accuracy),
        interval=mix_interval(low.interval, high.interval),
        agreement=mix_known(low.agreement, high.agreement),
        agreement_interval=mix_interval(low.agreement_interval, high.agreement_interval),
        points_lost=mix(low.points_lost, high.points_lost),
        macs_share=mix(low.macs_share, high.macs_share),
        macs_interval=mix_interval(low.macs_interval, high.macs_interval),
        mean_heads=mix(low.mean_heads, high.mean_heads),
        budgets=mix_shares(low.budgets, high.budgets),
        runs=mix_shares(low.runs, high.runs),
    )
