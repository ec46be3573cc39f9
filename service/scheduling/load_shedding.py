"""How much a frontend holds, and which requests it refuses unread while that is too much."""

from __future__ import annotations

import math

GROWTH = 0.1
"""Every answered text widens a window by so many texts."""
RATE_SECONDS = 5.0
"""Time constant of the rate of answers."""
LONGEST_RETRY = 60
PATIENCE_SECONDS = 60.0
"""Time constant at which the longest recent deadline fades."""
PATIENT_SHARE = 0.9
LATE_SHARE = 0.1
"""A frontend is late when a request waits for this share of the longest deadline to be begun."""


class LoadShedding:
    """Count the texts that a frontend holds, and learn from refusals which bodies not to read.

    Reading, checking and tokenizing a request that is refused anyway takes time from the admitted
    ones. So there are windows, as in TCP: a refusal says that there is room for no more texts than
    those held now, and from then on bodies as large are refused unread unless fewer are held. Every
    answer widens the window a little, until the next refusal; when no text is held, windows are
    forgotten. Smaller bodies are still read: where a thousand texts have no room, one may. Sizes
    are told apart by their powers of two. A deadline that cannot be met says something about other
    requests only if theirs are no later.

    All bodies are refused unread when the frontend itself is late, for as long as it was late.

    Args:
        usual_seconds: later deadlines count as this one, so that no request can hide the lateness
            from the others.
    """

    def __init__(self, usual_seconds: float = math.inf) -> None:
        self._usual = usual_seconds
        self.texts = 0
        """Texts held: from their admission to their answer."""
        self._windows: dict[int, float] = {}
        """Texts held below which a body is read, by the least of its size in bits."""
        self._answered = 0.0
        self._counted = 0.0
        self._longest = 0.0
        self._noted = 0.0
        self._late_until = -math.inf

    def sheds(self, size: int, now: float) -> bool:
        """Return whether a body of so many bytes is to be refused unread."""
        return now < self._late_until or self.texts >= self._window(size)

    def learn_refusal(self, size: int | None, others: int) -> None:
        """Refuse bodies unread that are as large as one for which there was no room.

        Args:
            size: its bytes as received; None: unknown, and nothing is learned.
            others: texts held besides its own.
        """
        if size is None or not others:
            return
        self._windows[size.bit_length()] = others

    def is_late_deadline(self, seconds: float) -> bool:
        """Return whether hardly any recent request had a later deadline."""
        return min(seconds, self._usual) >= PATIENT_SHARE * self._longest

    def note_delay(self, waited: float, now: float) -> None:
        """Learn how many seconds a request waited until the frontend began it."""
        if waited > LATE_SHARE * self._longest > 0:
            self._late_until = now + waited

    def enter(self, count: int, seconds: float, now: float) -> None:
        """Hold texts with so many seconds to their deadline."""
        self.texts += count
        faded = self._longest * math.exp((self._noted - now) / PATIENCE_SECONDS)
        self._longest, self._noted = max(min(seconds, self._usual), faded), now

    def leave(self, count: int, answered: bool, now: float) -> None:
        """Release texts, answered or not."""
        self.texts -= count
        if answered:
            self._answered = self._recent(now) + count
            self._counted = now
            for bits in self._windows:
                self._windows[bits] += GROWTH * count
        if not self.texts:
            self._windows.clear()

    def retry_after(self, excess: float, now: float) -> int:
        """Return the whole seconds in which so many of the held texts are answered."""
        rate = self._recent(now) / RATE_SECONDS
        if excess <= 0 or not rate:
            return 1
        return min(math.ceil(excess / rate), LONGEST_RETRY)

    def shed_seconds(self, size: int, now: float) -> int:
        """Return the whole seconds after which a body of so many bytes is likely to be read."""
        return self.retry_after(self.texts - self._window(size), now)

    def _window(self, size: int) -> float:
        most = size.bit_length()
        return min([room for bits, room in self._windows.items() if bits <= most], default=math.inf)

    def _recent(self, now: float) -> float:
        return self._answered * math.exp((self._counted - now) / RATE_SECONDS)
