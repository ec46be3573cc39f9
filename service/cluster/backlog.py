"""Estimate of the work that waits in a remote engine, between two of its reports."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Backlog:
    """Estimated device time (s) that waits in an engine, as seen by a router.

    It starts from the engine's last report, adds the work that was sent since then, and subtracts
    one second of work per second. All times are on one monotonic clock.

    Attributes:
        report: identity of the last report.
    """

    report: object = None
    _seconds: float = 0.0
    _since: float = 0.0

    def update(self, report: object, seconds: float, now: float) -> None:
        """Set the waiting time from a report of the engine, unless it was the last one already."""
        if report != self.report:
            self.report, self._seconds, self._since = report, seconds, now

    def send(self, seconds: float, now: float) -> None:
        """Add work that was sent to the engine."""
        self._seconds, self._since = self.seconds(now) + seconds, now

    def seconds(self, now: float) -> float:
        """Return the estimate."""
        return max(0.0, self._seconds - (now - self._since))
