"""Running totals that do not drift."""

from __future__ import annotations

NANOSECONDS = 10**9


class TotalSeconds:
    """A sum of durations that is updated as they come and go.

    Whole nanoseconds are added, so that the total is exact: zero when everything added has been
    subtracted, however many operations lie between.
    """

    def __init__(self) -> None:
        self._nanoseconds = 0

    @property
    def seconds(self) -> float:
        """The total."""
        return self._nanoseconds / NANOSECONDS

    def add(self, seconds: float) -> None:
        """Add a duration."""
        self._nanoseconds += int(seconds * NANOSECONDS)

    def subtract(self, seconds: float) -> None:
        """Subtract a duration that was added before."""
        self._nanoseconds -= int(seconds * NANOSECONDS)
