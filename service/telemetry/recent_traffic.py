"""Figures of the last minutes for the playground, from metrics that are read at even intervals."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

from prometheus_client import Counter

from service.telemetry.counts import DURATIONS, quantile
from service.telemetry.metrics import Metrics

SLOT_SECONDS = 5.0
SLOTS = 120
ROUTE = "/classify"
"""Route whose latency is reported."""


@dataclass(frozen=True)
class _Totals:
    """Totals of the metrics at one moment.

    Attributes:
        at: time in seconds since 1970.
        durations: number of requests up to each bound of `DURATIONS`, and of all requests.
        items: number of texts by model, version and ladder step.
        spent: used heads, dense heads, used and dense multiply-adds, by model and version.
    """

    at: float
    durations: tuple[float, ...]
    items: dict[tuple[str, str, int], float]
    spent: dict[tuple[str, str], tuple[float, ...]]


class RecentTraffic:
    """Totals of the last `SLOTS` intervals of `SLOT_SECONDS`.

    Args:
        metrics: metrics to read.
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

    def report(self, model: str) -> dict[str, Any]:
        """Return the cost of a model's texts and the duration of requests, as JSON types.

        `slots` holds the intervals, oldest first; `window` is the total. In each of them, `at` is
        the end in seconds since 1970, `seconds` the length, `budgets` the number of texts by ladder
        step, `heads_share` and `macs_share` the shares of the dense network's heads and
        multiply-adds, `requests` the number of requests to `ROUTE`, and `p50_ms` and `p99_ms` the
        quantiles of their duration in milliseconds. A value is None if there is no data for it.
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
    # A new series began at 0. So did a series that is smaller than before: it was removed, and then
    # its version was served again. A series that was only removed has not grown.
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
        "p50_ms": round(1000 * quantile(counts, 0.5), 3) if counts[-1] else None,
        "p99_ms": round(1000 * quantile(counts, 0.99), 3) if counts[-1] else None,
    }


def _growth(before: float, after: float) -> float:
    return after - before if after >= before else after
