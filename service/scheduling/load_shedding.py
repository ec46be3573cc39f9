"""How much a front holds, and what it turns away unread while that is too much."""

from __future__ import annotations

import math

GROWTH = 0.1
"""With every answered text a window widens by so many texts."""
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

    To read, check and tokenize what is refused then would take from those who are admitted. So
    there are windows, as TCP has one: a refusal says that what is here is all that there is room
    for, and from then on bodies as large come in only while less than that is here. Every answer
    widens the window a little, until somebody is refused again; when nobody is here, it is
    forgotten. Smaller bodies come in all the while: where a thousand texts have no room, one may.
    Sizes are told apart by their powers of two. A deadline that cannot be met tells of others only
    if it was as late as theirs.

    The door also closes, to everyone, when the front itself is late, and for as long as it was.

    Args:
        usual_seconds: later deadlines count as this one, so that no request can hide the lateness
            from the others.
    """

    def __init__(self, usual_seconds: float = math.inf) -> None:
        self._usual = usual_seconds
        self.texts = 0
        """Texts that are here, from their arrival to their answer."""
        self._windows: dict[int, float] = {}
        """Texts that may be here when a body comes, by the least of its size in bits."""
        self._answered = 0.0
        self._counted = 0.0
        self._longest = 0.0
        self._noted = 0.0
        self._late_until = -math.inf

    def closed_to(self, size: int, now: float) -> bool:
        """Say whether a body of so many bytes is turned away unread."""
        return now < self._late_until or self.texts >= self._window(size)

    def refuse(self, size: int | None, others: int) -> None:
        """Close to bodies like one that was refused for what is here.

        Args:
            size: its bytes, as they travelled; None: they are not known, and nothing is learned.
            others: texts here without its own.
        """
        if size is None or not others:
            return
        self._windows[size.bit_length()] = others

    def patient(self, seconds: float) -> bool:
        """Say whether hardly any caller of late gave more seconds than these."""
        return min(seconds, self._usual) >= PATIENT_SHARE * self._longest

    def begun(self, waited: float, now: float) -> None:
        """Learn how many seconds passed until what came was begun."""
        if waited > LATE_SHARE * self._longest > 0:
            self._late_until = now + waited

    def enter(self, count: int, seconds: float, now: float) -> None:
        """Take texts in, with so many seconds to their deadline."""
        self.texts += count
        faded = self._longest * math.exp((self._noted - now) / PATIENCE_SECONDS)
        self._longest, self._noted = max(min(seconds, self._usual), faded), now

    def leave(self, count: int, answered: bool, now: float) -> None:
        """Let texts go, answered or not."""
        self.texts -= count
        if answered:
            self._answered = self._recent(now) + count
            self._counted = now
            for bits in self._windows:
                self._windows[bits] += GROWTH * count
        if not self.texts:
            self._windows.clear()

    def retry_after(self, excess: float, now: float) -> int:
        """Return the whole seconds in which so many of the texts here are answered."""
        rate = self._recent(now) / RATE_SECONDS
        if excess <= 0 or not rate:
            return 1
        return min(math.ceil(excess / rate), LONGEST_RETRY)

    def until_open(self, size: int, now: float) -> int:
        """Return the whole seconds in which a body of so many bytes may be expected to come in."""
        return self.retry_after(self.texts - self._window(size), now)

    def _window(self, size: int) -> float:
        most = size.bit_length()
        return min([room for bits, room in self._windows.items() if bits <= most], default=math.inf)

    def _recent(self, now: float) -> float:
        return self._answered * math.exp((self._counted - now) / RATE_SECONDS)
