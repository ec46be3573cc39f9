"""How fast a queue really drains: what else takes the device's time than its passes."""

from __future__ import annotations

import math

MEMORY_SECONDS = 1.0
"""Prices follow what batches take, too: what both have seen should not count twice for long."""
DOUBT_SECONDS = 0.02
"""So much time without a word against it is believed to have gone as prices say."""
MAX_STRETCH = 4.0


class Drain:
    """Compare the time that went by while there was work with the price of what was done.

    A core that an engine shares, batches smaller than expected, answers to write: whatever it is,
    the queue lasts longer by that ratio than its prices add up to.
    """

    def __init__(self) -> None:
        self._seconds = self._priced = 0.0

    @property
    def stretch(self) -> float:
        """Seconds that a second of priced work takes."""
        ratio = (self._seconds + DOUBT_SECONDS) / (max(self._priced, 0.0) + DOUBT_SECONDS)
        return min(max(ratio, 1.0), MAX_STRETCH)

    def observe(self, seconds: float, priced: float) -> None:
        """Learn that in so many seconds, all of them busy, work of that price was done."""
        kept = math.exp(-seconds / MEMORY_SECONDS)
        self._seconds = kept * self._seconds + seconds
        self._priced = kept * self._priced + priced
