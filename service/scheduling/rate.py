"""Limits of a key, counted by several frontends together."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

Numbers: TypeAlias = "memoryview[float]"
"""One number (type "d") for each frontend, in memory that all of them map."""


class SharedUsage:
    """Requests in flight and the rate of one key, over all frontends.

    Each frontend writes its own numbers only, and reads those of all. So no lock is needed: a
    frontend that is stopped or killed never blocks another, and the hub is not asked. Counting
    takes microseconds, and the limits hold whichever frontends a caller's connections go to.

    The rate is a token bucket, measured in seconds of the rate. It holds
    `burst + now - spent - idle`. `spent` is the sum of what all frontends took. `idle` is the time
    in which the bucket was full and gained nothing: the highest value that any frontend has seen.
    Whenever the bucket is full, `idle` equals `now - spent`.

    Frontends that count at the same instant do not see each other's numbers. Of requests, each
    counts its own before it reads the others, so both may be refused the last free place. Both get
    it only if neither processor has seen the other's write: at worst, there is one request too many
    for each other frontend. Of the rate, each may take all that is left; the bucket is then in
    debt, so the mean rate still holds.

    Args:
        requests: number of requests in flight at each frontend.
        spent: seconds of the rate that each frontend took.
        idle: seconds in which the bucket was full, as each frontend has seen it.
        row: index of this frontend.
        release: sets `requests` to 0 for frontends that no longer run.
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

    def begin(self, limit: int | None) -> bool:
        """Count a request; return False if `limit` requests are in flight already.

        Args:
            limit: most requests in flight; None: no limit.
        """
        self._requests[self._row] += 1
        if limit is None or sum(self._requests) <= limit:
            return True
        self._release(self._requests)
        if sum(self._requests) <= limit:
            return True
        self._requests[self._row] -= 1
        return False

    def end(self) -> None:
        """Count the end of a request."""
        self._requests[self._row] -= 1

    def take(self, seconds: float, burst: float, now: float) -> float:
        """Take seconds of the rate.

        More than `burst` can be taken only from a full bucket, which is then in debt. So a large
        request waits instead of being refused for ever, and the mean rate still holds.

        Args:
            seconds: number of texts divided by texts per second.
            burst: size of the bucket, in seconds.
            now: time on the system's monotonic clock, which all frontends share.

        Returns:
            0 if the seconds were taken; else the time until they can be.
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
        """Return seconds that were taken and not used."""
        self._spent[self._row] -= seconds
