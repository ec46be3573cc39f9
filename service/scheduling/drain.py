"""Measure how much slower a queue drains than its prices say."""

from __future__ import annotations

import math

MEMORY_SECONDS = 1.0
"""Time constant of the measurement. It is short since prices adapt to slow batches too, and the
same slowness must not count twice for long."""
DOUBT_SECONDS = 0.02
"""Amount of work assumed to have taken its price, so that short measurements count little."""
MAX_STRETCH = 4.0


class Drain:
    """Ratio of the busy time to the price of the work that was done in it.

    A queue takes longer than the sum of its prices if other processes share the core, if batches
    are smaller than expected, or because of the time for writing answers.
    """

    def __init__(self) -> None:
        self._seconds = self._priced = 0.0

    @property
    def stretch(self) -> float:
        """Real seconds per second of price, from 1 to `MAX_STRETCH`."""
        ratio = (self._seconds + DOUBT_SECONDS) / (max(self._priced, 0.0) + DOUBT_SECONDS)
        return min(max(ratio, 1.0), MAX_STRETCH)

    def observe(self, seconds: float, priced: float) -> None:
        """Note that work of the price `priced` was done in `seconds` of busy time."""
        kept = math.exp(-seconds / MEMORY_SECONDS)
        self._seconds = kept * self._seconds + seconds
        self._priced = kept * self._priced + priced
