"""Counts of a frontend, which are reported to the hub as differences.

Label values are fixed names, routes, keys or served models, never data of a caller. So the number
of series is bounded.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from service.telemetry.context import current_request

DURATIONS = (
    0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075,
    0.1, 0.2, 0.5, 1, 2.5, 5, 10,
)  # fmt: skip
HEADS = (0, 1, 2, 4, 6, 8, 12, 18, 24, 30, 36, 48, 60, 72, 96, 144, 192, 288, 384)
TOKENS = (4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)

OUTCOMES = ("ok", "partial", "invalid", "rejected", "timeout", "cancelled", "error")
STAGES = ("tokenize", "budget", "queue", "compute", "respond")
REASONS = ("queue_full", "deadline", "draining", "too_large", "rate")
"""Reasons for refused requests."""
DENIALS = ("no_key", "wrong_key", "missing_scope")
"""Reasons for requests that are not authorized."""
BREAKS = ("too_many", "slow", "head_too_large", "malformed")
"""Reasons for connections that are closed before a request was received."""

SHADOW_OUTCOMES = ("agreed", "differed", "failed", "skipped")
"""Results of comparing a candidate's answer with that of the served version."""
SIDES = ("served", "candidate")

Series: TypeAlias = tuple[str, ...]
"""Name of a metric, without the common prefix, and the values of its labels."""
Exemplar: TypeAlias = dict[str, str] | None
"""Trace of an observation."""
Column: TypeAlias = Sequence[int] | NDArray[np.integer]


class Observations(msgspec.Struct, array_like=True):
    """Observations of one series of a histogram.

    Attributes:
        buckets: number of observations by index of the bucket, not cumulative; the bucket after
            the last bound holds larger values.
        sum: sum of the observed values.
        exemplars: newest observation with a trace, by bucket: the trace, the value, and the time in
            seconds since 1970.
    """

    buckets: dict[int, int] = {}
    sum: float = 0.0
    exemplars: dict[int, tuple[dict[str, str], float, float]] = {}

    def observe(
        self, bounds: Sequence[float], value: float, count: int = 1, exemplar: Exemplar = None
    ) -> None:
        """Count a value that was observed `count` times; `bounds` are the bounds of the buckets."""
        bucket = bisect_left(bounds, value)
        self.buckets[bucket] = self.buckets.get(bucket, 0) + count
        self.sum += value * count
        if exemplar:
            self.exemplars[bucket] = exemplar, value, time.time()

    def add(self, more: Observations) -> None:
        """Add later observations."""
        for bucket, count in more.buckets.items():
            self.buckets[bucket] = self.buckets.get(bucket, 0) + count
        self.sum += more.sum
        self.exemplars |= more.exemplars

    def cumulative(self, bounds: Sequence[float]) -> list[int]:
        """Return the number of values up to each bound, and of all values."""
        return list(accumulate(self.buckets.get(bucket, 0) for bucket in range(len(bounds) + 1)))


class Spent(NamedTuple):
    """Cost of the texts of a request: seconds of passes, multiply-adds, heads."""

    seconds: float
    macs: int
    heads: int


class Difference(msgspec.Struct, array_like=True):
    """Growth of each series since the last difference."""

    counters: dict[Series, float]
    histograms: dict[Series, Observations]


class Counts:
    """Counters and histograms of one frontend, until `take` returns and resets them.

    Exemplars name the trace of the request that is being served.
    """

    def __init__(self) -> None:
        self._counters: defaultdict[Series, float] = defaultdict(float)
        self._histograms: defaultdict[Series, Observations] = defaultdict(Observations)
        self.cache_bytes = 0

    def take(self) -> Difference:
        """Return the counts since the last call, and reset them."""
        grown = Difference(dict(self._counters), dict(self._histograms))
        self._counters.clear()
        self._histograms.clear()
        return grown

    def request_ended(
        self,
        route: str,
        outcome: str,
        seconds: float,
        *,
        refusal: str = "",
        denial: str = "",
        caller: str = "",
        served: tuple[str, int] | None = None,
    ) -> None:
        """Count a request.

        Args:
            route: template of its path.
            outcome: one of `OUTCOMES`.
            seconds: time from the first byte received to the last byte sent.
            refusal: reason, one of `REASONS`, if it was refused.
            denial: reason, one of `DENIALS`, if it was not authorized.
            caller: name of the caller's key, if known.
            served: model and version that classify its texts; None: the request is not for a served
                model.
        """
        counters, histograms = self._counters, self._histograms
        exemplar = current_request().exemplar
        counters["requests", route, outcome] += 1
        durations = histograms["request_duration_seconds", route]
        durations.observe(DURATIONS, seconds, exemplar=exemplar)
        if served is not None:
            key = served[0], str(served[1])
            counters["model_requests", *key, outcome] += 1
            durations = histograms["model_request_duration_seconds", *key]
            durations.observe(DURATIONS, seconds, exemplar=exemplar)
        if outcome == "cancelled":
            counters["cancelled",] += 1
        elif outcome == "timeout":
            counters["deadline_exceeded",] += 1
        elif refusal:
            counters["rejected", refusal] += 1
        if denial:
            counters["denied", denial] += 1
        if caller:
            counters["key_requests", caller, outcome] += 1

    def classified(
        self,
        model: str,
        version: int,
        *,
        budgets: Column,
        heads: Column,
        tokens: Column,
        macs: Column,
        dense_macs: Column,
        heads_of_one: int,
        expected: Mapping[int, float] | None,
        stages: Mapping[str, float],
        truncated: int,
    ) -> None:
        """Count the B answered texts of a request; M of them were computed, the others cached.

        Args:
            model, version: model version that answered.
            budgets: ladder step that answered each text, B integers.
            heads: heads computed for each computed text, M integers.
            tokens: tokens of each text, B integers.
            macs: multiply-adds computed for each computed text, M integers.
            dense_macs: multiply-adds of the dense network for the same texts, M integers.
            heads_of_one: number of heads of the dense network.
            expected: share of the texts that each ladder step answers in calibration; None: not
                known, and the observed steps count as expected, so the drift is zero.
            stages: seconds of each stage of the request.
            truncated: number of texts longer than the encoder reads.
        """
        exemplar = current_request().exemplar
        counters, histograms = self._counters, self._histograms
        for stage, seconds in stages.items():
            observations = histograms["stage_duration_seconds", stage]
            observations.observe(DURATIONS, seconds, exemplar=exemplar)
        counters["truncated",] += truncated

        key = model, str(version)
        answered, used = _tally(_integers(budgets)), _integers(heads)
        shares: Mapping[int, float] = answered if expected is None else expected
        scale = 1 if expected is None else len(budgets)
        for budget in answered.keys() | shares.keys():
            counters["items", *key, str(budget)] += answered.get(budget, 0)
            counters["items_expected", *key, str(budget)] += shares.get(budget, 0) * scale
        # Equal values are counted together, unless each may be the exemplar of a trace.
        counted = ((value, 1) for value in used) if exemplar else _tally(used).items()
        for value, count in counted:
            histograms["request_heads", *key].observe(HEADS, value, count, exemplar)
        for value, count in _tally(_integers(tokens)).items():
            histograms["item_tokens", *key].observe(TOKENS, value, count)
        counters["heads_used", *key] += sum(used)
        counters["heads", *key] += len(used) * heads_of_one
        counters["macs", *key] += sum(_integers(macs))
        counters["dense_macs", *key] += sum(_integers(dense_macs))

    def looked_up(self, model: str, version: int, hits: int, misses: int) -> None:
        """Count the texts of a request with an answer in the cache, and those without."""
        self._counters["cache_hits", model, str(version)] += hits
        self._counters["cache_misses", model, str(version)] += misses

    def cache_holds(self, cache_bytes: int) -> None:
        """Set the present size of the answer cache, in bytes."""
        self.cache_bytes = cache_bytes

    def items_failed(self, model: str, version: int, items: int) -> None:
        """Count the texts of a request that a model version failed to answer."""
        self._counters["model_items_failed", model, str(version)] += items

    def shadowed(
        self, model: str, version: int, outcomes: Mapping[str, int], spent: Mapping[str, Spent]
    ) -> None:
        """Count the texts of a request that a candidate computed too.

        Args:
            model, version: the candidate.
            outcomes: number of texts by outcome, each one of `SHADOW_OUTCOMES`.
            spent: cost of the texts, by side: `served` and `candidate`.
        """
        key, counters = (model, str(version)), self._counters
        for outcome, texts in outcomes.items():
            counters["shadow_items", *key, outcome] += texts
        for side, cost in spent.items():
            counters["shadow_seconds", *key, side] += cost.seconds
            counters["shadow_macs", *key, side] += cost.macs
            counters["shadow_heads", *key, side] += cost.heads

    def texts_asked(self, caller: str, texts: int) -> None:
        """Count texts in requests of a caller, given by the name of its key."""
        self._counters["key_texts", caller] += texts

    def job_rows_answered(self, caller: str, rows: int) -> None:
        """Count answered rows of a job, also as texts of its caller."""
        self._counters["job_rows",] += rows
        self._counters["key_texts", caller] += rows

    def connection_ended(self, reason: str) -> None:
        """Count a connection closed before a request was received; `reason` is one of `BREAKS`."""
        self._counters["broken_connections", reason] += 1


def quantile(cumulative: Sequence[float], share: float) -> float:
    """Return a quantile of durations (s), linear within its bucket, as Prometheus does.

    Args:
        cumulative: number of durations up to each bound of `DURATIONS`, and of all.
        share: the quantile, 0..1.
    """
    rank = share * cumulative[-1]
    bucket = bisect_left(cumulative, rank)
    if bucket >= len(DURATIONS):
        return DURATIONS[-1]
    low, before = (DURATIONS[bucket - 1], cumulative[bucket - 1]) if bucket else (0.0, 0)
    inside = cumulative[bucket] - before
    return low + (DURATIONS[bucket] - low) * (rank - before) / inside if inside else low


def _tally(values: Sequence[int]) -> Mapping[int, int]:
    """Count how often each value occurs."""
    return {values[0]: 1} if len(values) == 1 else Counter(values)


def _integers(column: Column) -> Sequence[int]:
    """Return Python integers, which do not overflow and are faster to iterate over."""
    return column.tolist() if isinstance(column, np.ndarray) else column
