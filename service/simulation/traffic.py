"""Traffic: request rates over time, generated or read from a server's log or recent figures."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from budgetformer.errors import DataError

ROUTE = "/classify"
"""Route whose requests in a log are read."""


@dataclass(frozen=True)
class Traffic:
    """Poisson arrivals of requests, with a constant rate in each time slot.

    Attributes:
        slot: length of a slot, in seconds.
        rates: requests per second in each slot.
        sizes: distribution of the texts of a request, as (share of the requests, number of texts).
    """

    slot: float
    rates: np.ndarray
    sizes: Sequence[tuple[float, int]] = ((1.0, 1),)

    @property
    def seconds(self) -> float:
        """Length of the traffic, in seconds."""
        return self.slot * len(self.rates)

    @property
    def mean_rate(self) -> float:
        """Mean requests per second."""
        return float(self.rates.mean())

    @property
    def mean_texts(self) -> float:
        """Mean number of texts in a request."""
        return sum(share * texts for share, texts in self.sizes)

    def times(self, factor: float) -> Traffic:
        """Return this traffic with all rates multiplied."""
        return replace(self, rates=self.rates * factor)

    def at_mean(self, rate: float) -> Traffic:
        """Return this traffic scaled to a mean rate of requests per second."""
        return self.times(rate / self.mean_rate)

    def of_texts(self, bulk_share: float, bulk_texts: int = 512) -> Traffic:
        """Return traffic with as many texts per second, a share of them in large requests.

        The other texts come in requests of one text.
        """
        single, bulk = 1 - bulk_share, bulk_share / bulk_texts
        requests = single + bulk
        sizes = [(single / requests, 1), (bulk / requests, bulk_texts)]
        texts = self.rates * self.mean_texts
        kept = tuple((share, size) for share, size in sizes if share)
        return replace(self, rates=texts * requests, sizes=kept)

    def draw(self, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Draw the sorted arrival times of requests, and the number of texts of each."""
        counts = generator.poisson(self.rates * self.slot)
        begin = np.repeat(np.arange(len(self.rates)) * self.slot, counts)
        times = np.sort(begin + generator.random(len(begin)) * self.slot)
        shares = [share for share, _ in self.sizes]
        sizes = generator.choice([texts for _, texts in self.sizes], size=len(times), p=shares)
        return times, sizes


def steady(rate: float, seconds: float) -> Traffic:
    """Return traffic with a constant rate."""
    return Traffic(seconds, np.array([rate]))


def diurnal(rate: float, seconds: float, swing: float = 0.8, slots: int = 96) -> Traffic:
    """Return the traffic of one day, compressed to `seconds`.

    The rate follows a cosine around `rate`, between `1 - swing` and `1 + swing` times of it.
    """
    phases = 2 * math.pi * (np.arange(slots) + 0.5) / slots
    return Traffic(seconds / slots, rate * (1 - swing * np.cos(phases)))


def bursts(
    rate: float, seconds: float, seed: int = 0, factor: float = 4.0, share: float = 0.1
) -> Traffic:
    """Return traffic with random bursts of about three seconds.

    Args:
        rate: mean requests per second.
        seconds: length of the traffic.
        seed: random seed of the bursts.
        factor: rate in a burst, divided by the rate outside of bursts.
        share: share of the time in bursts.
    """
    slot, burst_seconds = 0.25, 3.0
    draw = np.random.default_rng(seed)
    end_chance = slot / burst_seconds
    begin_chance = end_chance * share / (1 - share)
    burst, slots = False, max(1, round(seconds / slot))
    rates = np.empty(slots)
    for index in range(slots):
        burst = draw.random() >= end_chance if burst else draw.random() < begin_chance
        rates[index] = factor if burst else 1.0
    return Traffic(seconds / slots, rate * rates / (1 + share * (factor - 1)))


def read_traffic(path: Path, log_share: float = 1.0) -> Traffic:
    """Read the traffic of a server from its JSON log or from a response of `/playground/recent`.

    A log gives the number of requests in each second, but not of their texts: each counts as one
    text. Within a second, or a slot of `/playground/recent`, requests arrive at random.

    Args:
        path: path of the file.
        log_share: setting `access_log` of the server that wrote the log.

    Raises:
        DataError: the file is in neither format, or has no requests.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    try:
        values = json.loads(content)
    except ValueError:
        values = None
    try:
        if isinstance(values, dict) and "slots" in values:
            traffic = _from_slots(values["slots"])
        else:
            traffic = _from_log(content.splitlines(), log_share)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path}: neither a JSON log nor a response of /playground/recent: {error!r}"
        ) from error
    if traffic is None or not traffic.rates.any():
        raise DataError(f"{path}: there is no request to {ROUTE}")
    return traffic


def _from_slots(slots: Sequence[dict[str, Any]]) -> Traffic | None:
    requests = [slot["requests"] for slot in slots]
    if not sum(requests):
        return None
    length = sum(slot["seconds"] for slot in slots) / len(slots)
    mean = sum(slot["texts"] for slot in slots) / sum(requests)
    below = max(1, math.floor(mean))
    above = max(0.0, mean - below)
    sizes = tuple((p, n) for p, n in ((1 - above, below), (above, below + 1)) if p)
    return Traffic(length, np.array(requests) / length, sizes)


def _from_log(lines: Sequence[str], share: float) -> Traffic | None:
    arrivals = []
    for line in lines:
        if ROUTE not in line:
            continue
        event = json.loads(line)
        if event.get("event") == "request" and event.get("route") == ROUTE:
            ended = datetime.fromisoformat(event["timestamp"]).timestamp()
            arrivals.append(ended - event["ms"] / 1000)
    if not arrivals:
        return None
    seconds = np.floor(np.array(arrivals) - min(arrivals)).astype(int)
    return Traffic(1.0, np.bincount(seconds) / share)
