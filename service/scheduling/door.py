"""How much a front holds, and what it turns away unread while that is too much."""

from __future__ import annotations

import math

REOPEN_SHARE = 0.25
"""The door opens again when so much of what the front held as it closed has been answered."""
RATE_SECONDS = 5.0
"""Over how long the rate of answers is taken."""
LONGEST_RETRY = 60
PATIENCE_SECONDS = 60.0
"""How long a deadline counts as one of those that callers give, fading meanwhile."""
PATIENT_SHARE = 0.9
LATE_SHARE = 0.1
"""The front is late when what has come waits for so much of the longest deadline to be begun."""


class Door:
    """Count the texts of a front, and learn from refusals what need not be read.

    To read, check and tokenize what is refused then would take from those who are admitted. So a
    refusal closes the door to bodies of that size and larger ones, until a quarter of what was here
    has been answered. Smaller ones come in all the while: where a thousand texts have no room, one
    may. A deadline that cannot be met tells of others only if it was as late as theirs. When the
    door opens, whoever comes next is asked about in full.

    It also closes, to everyone, when the front itself is late, and for as long as it was late.
    """

    def __init__(self) -> None:
        self.texts = 0
        """Texts that are here, from their arrival to their answer."""
        self._least = math.inf
        self._missing = 0.0
        self._answered = 0.0
        self._counted = 0.0
        self._longest = 0.0
        self._noted = 0.0
        self._late_until = -math.inf

    def closed_to(self, size: int, now: float) -> bool:
        """Say whether a body of so many bytes is turned away unread."""
        return size >= self._least or now < self._late_until

    def refuse(self, size: int | None, others: int) -> None:
        """Close to bodies like one that was refused for what is here.

        Args:
            size: its bytes, as they travelled; None: they are not known, and nothing is learned.
            others: texts here without its own.
        """
        if size is None or not others:
            return
        if self._least == math.inf:
            self._missing = REOPEN_SHARE * others
        self._least = min(self._least, size)

    def patient(self, seconds: float) -> bool:
        """Say whether hardly any caller of late gave more seconds than these."""
        return seconds >= PATIENT_SHARE * self._longest

    def begun(self, waited: float, now: float) -> None:
        """Learn how many seconds passed until what came was begun."""
        if waited > LATE_SHARE * self._longest > 0:
            self._late_until = now + waited

    def enter(self, count: int, seconds: float, now: float) -> None:
        """Take texts in, with so many seconds to their deadline."""
        self.texts += count
        faded = self._longest * math.exp((self._noted - now) / PATIENCE_SECONDS)
        self._longest, self._noted = max(seconds, faded), now

    def leave(self, count: int, answered: bool, now: float) -> None:
        """Let texts go, answered or not."""
        self.texts -= count
        if answered:
            self._answered = self._recent(now) + count
            self._counted = now
            self._missing -= count
        if self._missing <= 0 or not self.texts:
            self._least = math.inf

    def retry_after(self, excess: float, now: float) -> int:
        """Return the whole seconds in which so many of the texts here are answered."""
        rate = self._recent(now) / RATE_SECONDS
        if not rate:
            return 1
        return min(max(1, math.ceil(excess / rate)), LONGEST_RETRY)

    def until_open(self, now: float) -> int:
        """Return the whole seconds in which the door may be expected to open."""
        return self.retry_after(self._missing, now)

    def _recent(self, now: float) -> float:
        return self._answered * math.exp((self._counted - now) / RATE_SECONDS)
