"""How much a caller may ask for in a stretch of time."""

from __future__ import annotations


class TokenBucket:
    """A store that fills at `rate` per second up to `burst`, and is drawn from.

    What is larger than the store is given out when it is full and leaves it in debt, so that a
    large request waits instead of never being served, and the mean rate holds all the same.

    Args:
        rate: what comes in, per second.
        burst: what the store holds; it starts full.
    """

    def __init__(self, rate: float, burst: float) -> None:
        self.rate = rate
        self.burst = burst
        self._level = burst
        self._filled: float | None = None

    def take(self, count: float, now: float) -> float:
        """Take `count` at `now` seconds and return 0, or the seconds until it can be taken."""
        if self._filled is not None:
            grown = self._level + self.rate * max(0.0, now - self._filled)
            self._level = min(self.burst, grown)
        self._filled = now
        missing = min(count, self.burst) - self._level
        if missing > 0:
            return missing / self.rate
        self._level -= count
        return 0.0

    def give_back(self, count: float) -> None:
        """Return what was taken and not used."""
        self._level = min(self.burst, self._level + count)
