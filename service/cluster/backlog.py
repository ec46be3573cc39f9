"""How much an engine elsewhere has to do, between two of its own words of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Backlog:
    """Seconds of device time that wait in an engine, as one who sends it work can tell.

    Its own word counts, and from then on what was sent to it meanwhile; it does a second's work
    every second. All times are on one monotonic clock.
    """

    word: object = None
    _seconds: float = 0.0
    _since: float = 0.0

    def hear(self, word: object, seconds: float, now: float) -> None:
        """Take the engine's word, unless it is the one taken last."""
        if word != self.word:
            self.word, self._seconds, self._since = word, seconds, now

    def send(self, seconds: float, now: float) -> None:
        """Count work that it is sent."""
        self._seconds, self._since = self.seconds(now) + seconds, now

    def seconds(self, now: float) -> float:
        """Return what waits now."""
        return max(0.0, self._seconds - (now - self._since))
