"""How much a caller may ask for, counted by several frontends together."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

Numbers: TypeAlias = "memoryview[float]"
"""One number ("d") for each frontend, in memory that all of them map."""


class SharedUsage:
    """Requests under way and the rate of one key, over all frontends.

    Each frontend writes only its own numbers and reads those of all. So there is no lock: a
    frontend that is stopped or killed at any moment keeps none of the others waiting, and nobody
    asks the hub. Counting costs microseconds, and it does not matter which frontend a connection
    goes to.

    The rate is a token bucket, in seconds of its rate, written as sums that can be kept apart:
    it holds `burst + now - spent - idle`. `spent` adds up what all frontends took; `idle` is the
    time in which the bucket was full and gained nothing, the highest value that any frontend has
    seen. Time and `spent` alone decide `idle`: whenever the bucket is full, it is `now - spent`.

    Frontends that count at the same instant do not see each other yet. For requests, each counts
    itself before it looks, so that both may be refused the last place; both get it only if neither
    processor has seen the other's write, at worst one request too many for each other frontend. For
    the rate, each may take what is there once; the bucket is then in debt, and the rate holds.

    Args:
        requests: requests under way at each frontend.
        spent: seconds of the rate taken at each frontend.
        idle: seconds in which the bucket was full, as far as each frontend knows.
        row: the place of this frontend.
        release: sets `requests` to 0 at frontends that no longer run.
    """

    def __init__(
        self,
        requests: Numbers,
        spent: Numbers,
        idle: Numbers,
        row: int = 0,
        release: Callable[[Numbers], None] = lambda _: None,
    ) -> None:
        self._requests = requests
        self._spent = spent
        self._idle = idle
        self._row = row
        self._release = release

    def begin(self, most: int | None) -> bool:
        """Count a request and return True, or False if `most` are under way; None: no limit."""
        self._requests[self._row] += 1
        if most is None or sum(self._requests) <= most:
            return True
        self._release(self._requests)
        if sum(self._requests) <= most:
            return True
        self._requests[self._row] -= 1
        return False

    def end(self) -> None:
        """Count a request no longer."""
        self._requests[self._row] -= 1

    def take(self, seconds: float, burst: float, now: float) -> float:
        """Take seconds of the rate and return 0, or the seconds until they can be taken.

        What is larger than `burst` is given out when the bucket is full and leaves it in debt: a
        large request waits instead of never being served, and the mean rate holds all the same.

        Args:
            seconds: to take, texts divided by texts per second.
            burst: that the bucket holds.
            now: on the system's monotonic clock, which all frontends share.
        """
        gained = now - sum(self._spent)
        idle = max(gained, *self._idle)
        self._idle[self._row] = idle
        missing = min(seconds, burst) - (burst + (gained - idle))
        if missing > 0:
            return missing
        self._spent[self._row] += seconds
        return 0.0

    def give_back(self, seconds: float) -> None:
        """Return what was taken and not used."""
        self._spent[self._row] -= seconds
