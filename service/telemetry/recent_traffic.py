"""The last minutes in short, for a page to draw: totals of the metrics, read at even intervals."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client import Counter

from service.telemetry.counts import DURATIONS
from service.telemetry.metrics import Metrics

SLOT_SECONDS = 5.0
SLOTS = 120
ROUTE = "/classify"
"""Whose latency is told."""


@dataclass(frozen=True)
class _Totals:
    """What the metrics said at one moment.

    `items` counts texts by model, version and ladder step; `spent` holds heads and multiply-adds,
    used and dense, by model and version.
    """

    at: float
    durations: tuple[float, ...]
    items: dict[tuple[str, str, int], float]
    spent: dict[tuple[str, str], tuple[float, ...]]


class Recent:
    """Remember the totals of the last `SLOTS` intervals of `SLOT_SECONDS`.

    Args:
        metrics: which are read.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._duration = metrics.request_duration.labels(ROUTE)
        self._seen: deque[_Totals] = deque(maxlen=SLOTS + 1)

    async def keep(self) -> None:
        """Read the metrics at even intervals, until cancelled."""
        while True:
            self.sample(time.time())
            await asyncio.sleep(SLOT_SECONDS)

    def sample(self, now: float) -> None:
        """Read the metrics at `now`, in seconds since 1970."""
        durations = tuple(self._duration.cumulative(DURATIONS))
        items = {
            (labels["model"], labels["version"], int(labels["budget"])): value
            for labels, value in _samples(self._metrics.items)
        }
        counters = (
            self._metrics.heads_used, self._metrics.heads,
            self._metrics.macs, self._metrics.dense_macs,
        )  # fmt: skip
        values = [
            {(labels["model"], labels["version"]): value for labels, value in _samples(counter)}
            for counter in counters
        ]
        spent = {key: tuple(by[key] for by in values) for key in values[0]}
        self._seen.append(_Totals(now, durations, items, spent))

    def tell(self, model: str) -> dict[str, Any]:
        """Return what a model's texts took and how long requests lasted, as plain data.

        `slots` holds the intervals, oldest first, `window` all of them together. In each, `at` is
        its end in seconds since 1970, `seconds` its length, `budgets` counts texts by ladder step,
        `heads_share` and `macs_share` are parts of the dense network's, `requests` counts those
        to `ROUTE` and `p50_ms` and `p99_ms` are their quantiles in milliseconds; None: nothing to
        tell.
        """
        seen = list(self._seen)
        return {
            "model": model,
            "slots": [_between(a, b, model) for a, b in zip(seen, seen[1:], strict=False)],
            "window": _between(seen[0], seen[-1], model) if len(seen) > 1 else None,
        }


def _samples(counter: Counter) -> list[tuple[dict[str, str], float]]:
    (metric,) = counter.collect()
    return [(sample.labels, sample.value) for sample in metric.samples]


def _between(before: _Totals, after: _Totals, model: str) -> dict[str, Any]:
    # A series that is new began at 0, as did one that is smaller than before: it was removed, and
    # its version is served again. One that was removed has not grown.
    budgets: dict[int, int] = {}
    for (name, version, step), count in sorted(after.items.items()):
        grown = int(_growth(before.items.get((name, version, step), 0), count))
        if name == model and grown > 0:
            budgets[step] = budgets.get(step, 0) + grown
    spent = [0.0] * 4
    for key, totals in after.spent.items():
        if key[0] == model:
            earlier = before.spent.get(key, (0.0,) * 4)
            grew = map(_growth, earlier, totals)
            spent = [a + b for a, b in zip(spent, grew, strict=True)]
    counts = [b - a for a, b in zip(before.durations, after.durations, strict=True)]
    return {
        "at": round(after.at, 3),
        "seconds": round(after.at - before.at, 3),
        "texts": sum(budgets.values()),
        "budgets": dict(sorted(budgets.items())),
        "heads_share": spent[0] / spent[1] if spent[1] else None,
        "macs_share": spent[2] / spent[3] if spent[3] else None,
        "requests": int(counts[-1]),
        "p50_ms": _quantile_ms(0.5, counts),
        "p99_ms": _quantile_ms(0.99, counts),
    }


def _growth(before: float, after: float) -> float:
    return after - before if after >= before else after


def _quantile_ms(share: float, counts: Sequence[float]) -> float | None:
    """Return a quantile of the durations, even within a bucket, as Prometheus estimates it.

    `counts` are cumulative, by the buckets of `DURATIONS` and one for all that took longer.
    """
    wanted = share * counts[-1]
    if not wanted:
        return None
    place = next(place for place, count in enumerate(counts) if count >= wanted)
    if place == len(DURATIONS):
        return DURATIONS[-1] * 1000
    below, low = (counts[place - 1], DURATIONS[place - 1]) if place else (0.0, 0.0)
    within = (wanted - below) / (counts[place] - below)
    return round((low + within * (DURATIONS[place] - low)) * 1000, 3)
