"""Counts of a frontend: added up where they occur, and taken as differences.

Every label value comes from a fixed list, the routes, the keys or the models served, never from a
caller, so the number of series is bounded.
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
"""Why requests are refused."""
DENIALS = ("no_key", "wrong_key", "missing_scope")
"""Why callers are turned away."""
BREAKS = ("too_many", "slow", "head_too_large", "malformed")
"""Why connections are ended before a request was there."""

SHADOW_OUTCOMES = ("agreed", "differed", "failed", "skipped")
"""How a candidate's answer compares with that of the served version."""
SIDES = ("served", "candidate")

Series: TypeAlias = tuple[str, ...]
"""A metric's name, without the prefix of all metrics, and the values of its labels."""
Exemplar: TypeAlias = dict[str, str] | None
"""The trace that an observation points to."""
Column: TypeAlias = Sequence[int] | NDArray[np.integer]


class Observations(msgspec.Struct, array_like=True):
    """Observations of one series of a histogram.

    Attributes:
        buckets: number of observations by index of the bucket, not cumulative; the bucket after
            the last bound holds larger values.
        sum: of the observed values.
        exemplars: by bucket, the newest observation with a trace: the trace, the value, and its
            time in seconds since 1970.
    """

    buckets: dict[int, int] = {}
    sum: float = 0.0
    exemplars: dict[int, tuple[dict[str, str], float, float]] = {}

    def observe(
        self, bounds: Sequence[float], value: float, count: int = 1, exemplar: Exemplar = None
    ) -> None:
        """Count a value that was observed `count` times; `bounds` are those of the buckets."""
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
        """Return, for every bound and for infinity, the number of values up to it."""
        return list(accumulate(self.buckets.get(bucket, 0) for bucket in range(len(bounds) + 1)))


class Spent(NamedTuple):
    """What the texts of a request took: seconds of passes, multiply-adds, heads."""

    seconds: float
    macs: int
    heads: int


class Difference(msgspec.Struct, array_like=True):
    """By how much the series have grown since the difference before."""

    counters: dict[Series, float]
    histograms: dict[Series, Observations]


class Counts:
    """Add up what one frontend counts until it is taken.

    Exemplars name the trace of the request that is being served.
    """

    def __init__(self) -> None:
        self._counters: defaultdict[Series, float] = defaultdict(float)
        self._histograms: defaultdict[Series, Observations] = defaultdict(Observations)
        self.cache_bytes = 0

    def take(self) -> Difference:
        """Return what was counted since the last time."""
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
            route: its template.
            outcome: how it ended, one of `OUTCOMES`.
            seconds: from the first byte to the last.
            refusal: why it was rejected, if it was: one of `REASONS`.
            denial: why its caller was turned away, if so: one of `DENIALS`.
            caller: name of the caller's key, where it is known.
            served: model and version that were to classify its texts; None: it asks for none, or
                for one that is not served.
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
            model, version: that answered them.
            budgets: ladder step that answered each text, B integers.
            heads: heads computed for each that was computed, M integers.
            tokens: of each text, B integers.
            macs, dense_macs: multiply-adds executed, and those of the dense network; M integers.
            heads_of_one: heads of the dense network.
            expected: share of the texts that calibration answers at each ladder step; None: it is
                not known, and the observed steps count as expected, so the drift is zero.
            stages: seconds of each stage of the request.
            truncated: texts that were longer than the encoder reads.
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
        # Equal values are counted together; with a trace each one may replace the exemplar.
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
        """Count the texts of a request that had an answer in the cache, and those that had none."""
        self._counters["cache_hits", model, str(version)] += hits
        self._counters["cache_misses", model, str(version)] += misses

    def cache_holds(self, cache_bytes: int) -> None:
        """Note the bytes that the answers in the cache take now."""
        self.cache_bytes = cache_bytes

    def items_failed(self, model: str, version: int, items: int) -> None:
        """Count the texts of a request that a model version failed to answer."""
        self._counters["model_items_failed", model, str(version)] += items

    def shadowed(
        self, model: str, version: int, outcomes: Mapping[str, int], spent: Mapping[str, Spent]
    ) -> None:
        """Count the texts of a request that a candidate computed, too.

        Args:
            model, version: of the candidate.
            outcomes: number of texts by one of `SHADOW_OUTCOMES`.
            spent: what they took of the `served` version, and of the `candidate`.
        """
        key, counters = (model, str(version)), self._counters
        for outcome, texts in outcomes.items():
            counters["shadow_items", *key, outcome] += texts
        for side, took in spent.items():
            counters["shadow_seconds", *key, side] += took.seconds
            counters["shadow_macs", *key, side] += took.macs
            counters["shadow_heads", *key, side] += took.heads

    def texts_asked(self, caller: str, texts: int) -> None:
        """Count the texts that a caller, by the name of its key, asked for."""
        self._counters["key_texts", caller] += texts

    def job_rows_answered(self, caller: str, rows: int) -> None:
        """Count rows of a job, which are texts that its caller, by name of the key, asked for."""
        self._counters["job_rows",] += rows
        self._counters["key_texts", caller] += rows

    def connection_ended(self, reason: str) -> None:
        """Count a connection that was ended before a request was there, for one of `BREAKS`."""
        self._counters["broken_connections", reason] += 1


def _tally(values: Sequence[int]) -> Mapping[int, int]:
    """Count how often each value stands there."""
    return {values[0]: 1} if len(values) == 1 else Counter(values)


def _integers(column: Column) -> Sequence[int]:
    """Return Python's integers: they do not overflow, and are faster one by one."""
    return column.tolist() if isinstance(column, np.ndarray) else column
