"""When requests come: rates over time, made up or read from what a server has kept."""

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
"""The requests of a log that are traffic."""


@dataclass(frozen=True)
class Traffic:
    """Requests whose rate changes from slot to slot, and is Poisson within one.

    Attributes:
        slot: its seconds.
        rates: requests a second in each slot.
        sizes: texts of a request, with the share of the requests that has so many.
    """

    slot: float
    rates: np.ndarray
    sizes: Sequence[tuple[float, int]] = ((1.0, 1),)

    @property
    def seconds(self) -> float:
        """How long it lasts."""
        return self.slot * len(self.rates)

    @property
    def mean_rate(self) -> float:
        """Requests a second on average."""
        return float(self.rates.mean())

    @property
    def mean_texts(self) -> float:
        """Texts of a request on average."""
        return sum(share * texts for share, texts in self.sizes)

    def times(self, factor: float) -> Traffic:
        """Return the same with every rate multiplied."""
        return replace(self, rates=self.rates * factor)

    def at_mean(self, rate: float) -> Traffic:
        """Return the same with so many requests a second on average."""
        return self.times(rate / self.mean_rate)

    def of_texts(self, bulk_share: float, bulk_texts: int = 512) -> Traffic:
        """Return the same texts a second, a share of them in large requests, the others alone."""
        single, bulk = 1 - bulk_share, bulk_share / bulk_texts
        requests = single + bulk
        sizes = [(single / requests, 1), (bulk / requests, bulk_texts)]
        texts = self.rates * self.mean_texts
        kept = tuple((share, size) for share, size in sizes if share)
        return replace(self, rates=texts * requests, sizes=kept)

    def draw(self, seed: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Draw the times at which requests come, rising, and the texts of each."""
        counts = seed.poisson(self.rates * self.slot)
        begin = np.repeat(np.arange(len(self.rates)) * self.slot, counts)
        times = np.sort(begin + seed.random(len(begin)) * self.slot)
        shares = [share for share, _ in self.sizes]
        sizes = seed.choice([texts for _, texts in self.sizes], size=len(times), p=shares)
        return times, sizes


def steady(rate: float, seconds: float) -> Traffic:
    """Return requests at an even rate."""
    return Traffic(seconds, np.array([rate]))


def diurnal(rate: float, seconds: float, swing: float = 0.8, slots: int = 96) -> Traffic:
    """Return a day and its night within `seconds`: the rate swings around `rate` by that share."""
    phases = 2 * math.pi * (np.arange(slots) + 0.5) / slots
    return Traffic(seconds / slots, rate * (1 - swing * np.cos(phases)))


def bursts(
    rate: float, seconds: float, seed: int = 0, factor: float = 4.0, share: float = 0.1
) -> Traffic:
    """Return bursts of `factor` times the rate between them, some three seconds each.

    Args:
        rate: on average.
        seconds: in all.
        seed: of when they come.
        factor: how much more comes in a burst.
        share: of the time that is one.
    """
    slot, lasts = 0.25, 3.0
    draw = np.random.default_rng(seed)
    ends, begins = slot / lasts, slot / lasts * share / (1 - share)
    burst, slots = False, max(1, round(seconds / slot))
    rates = np.empty(slots)
    for place in range(slots):
        burst = draw.random() >= ends if burst else draw.random() < begins
        rates[place] = factor if burst else 1.0
    return Traffic(seconds / slots, rate * rates / (1 + share * (factor - 1)))


def read_traffic(path: Path, log_share: float = 1.0) -> Traffic:
    """Read the traffic of a server: its log in JSON, or what `/playground/recent` answered.

    A log says how many requests came in each second, and nothing of their texts: they count as
    single ones. Within a second, or a slot of `/playground/recent`, requests come at random.

    Args:
        path: of the file.
        log_share: the `access_log` of the server that wrote the log.

    Raises:
        DataError: it is neither, or shows no request.
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
            found = _from_slots(values["slots"])
        else:
            found = _from_log(content.splitlines(), log_share)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: neither a log in JSON nor recent slots: {error!r}") from error
    if found is None or not found.rates.any():
        raise DataError(f"{path}: no request to {ROUTE} in it")
    return found


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
    came = []
    for line in lines:
        if ROUTE not in line:
            continue
        event = json.loads(line)
        if event.get("event") == "request" and event.get("route") == ROUTE:
            ended = datetime.fromisoformat(event["timestamp"]).timestamp()
            came.append(ended - event["ms"] / 1000)
    if not came:
        return None
    seconds = np.floor(np.array(came) - min(came)).astype(int)
    return Traffic(1.0, np.bincount(seconds) / share)
