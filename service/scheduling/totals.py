"""Running totals that do not drift."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Self

NANOSECONDS = 10**9


class TotalSeconds:
    """Exact sum of durations.

    Whole nanoseconds are added, so the total is exactly zero when everything added has been
    subtracted, after any number of operations.

    Args:
        durations: first durations, in seconds.
    """

    __slots__ = ("_nanoseconds",)

    def __init__(self, durations: Iterable[float] = ()) -> None:
        self._nanoseconds = sum([int(seconds * NANOSECONDS) for seconds in durations])

    def __iadd__(self, other: TotalSeconds) -> Self:
        self._nanoseconds += other._nanoseconds
        return self

    def __isub__(self, other: TotalSeconds) -> Self:
        self._nanoseconds -= other._nanoseconds
        return self

    @property
    def seconds(self) -> float:
        """The total, in seconds."""
        return self._nanoseconds / NANOSECONDS
