"""The last minutes in short, for a page to draw: totals of the metrics, read at even intervals."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client import Counter

from service.observability.metrics import DURATIONS, Metrics

SLOT_SECONDS = 5.0
SLOTS = 120
ROUTE = "/classify"
"""Whose latency is told."""


@dataclass(frozen=True)
class _Totals:
    """What the metrics said at one moment; sums are by model, over its versions."""

    at: float
    durations: tuple[float, ...]
    items: dict[str, dict[int, float]]
    spent: dict[str, tuple[float, ...]]


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
        (duration,) = self._duration.collect()
        counts = [s.value for s in duration.samples if s.name.endswith("_bucket")]
        items: dict[str, dict[int, float]] = {}
        for labels, value in _samples(self._metrics.items):
            steps = items.setdefault(labels["model"], {})
            step = int(labels["budget"])
            steps[step] = steps.get(step, 0) + value
        spent: dict[str, tuple[float, ...]] = {}
        counters = (
            self._metrics.heads_used, self._metrics.heads,
            self._metrics.macs, self._metrics.dense_macs,
        )  # fmt: skip
        for place, counter in enumerate(counters):
            for labels, value in _samples(counter):
                sums = list(spent.get(labels["model"], (0.0,) * len(counters)))
                sums[place] += value
                spent[labels["model"]] = tuple(sums)
        self._seen.append(_Totals(now, tuple(counts), items, spent))

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
    earlier = before.items.get(model, {})
    budgets = {
        step: int(count - earlier.get(step, 0))
        for step, count in sorted(after.items.get(model, {}).items())
        if count > earlier.get(step, 0)
    }
    none = (0.0,) * 4
    spent = [
        b - a
        for a, b in zip(before.spent.get(model, none), after.spent.get(model, none), strict=True)
    ]
    counts = [b - a for a, b in zip(before.durations, after.durations, strict=True)]
    return {
        "at": round(after.at, 3),
        "seconds": round(after.at - before.at, 3),
        "texts": sum(budgets.values()),
        "budgets": budgets,
        "heads_share": spent[0] / spent[1] if spent[1] else None,
        "macs_share": spent[2] / spent[3] if spent[3] else None,
        "requests": int(counts[-1]),
        "p50_ms": _quantile_ms(0.5, counts),
        "p99_ms": _quantile_ms(0.99, counts),
    }


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
