"""Load shedding: refuse requests of a frontend under overload without reading their bodies."""

from __future__ import annotations

import math

GROWTH = 0.1
"""Number of texts by which each answered text widens a window."""
RATE_SECONDS = 5.0
"""Time constant of the rate of answers."""
LONGEST_RETRY = 60
PATIENCE_SECONDS = 60.0
"""Time constant with which the longest recent deadline decays."""
PATIENT_SHARE = 0.9
"""Share of the longest recent deadline from which a deadline counts as late."""
LATE_SHARE = 0.1
"""A frontend is late if it begins a request only after this share of the longest deadline."""


class LoadShedding:
    """Count the texts that a frontend holds, and learn from refusals which bodies not to read.

    Reading, checking and tokenizing a request that will be refused takes time from admitted ones.
    So there are windows, as in TCP. A refusal sets the window to the number of texts held now: from
    then on, bodies of this size or larger are refused unread while that many texts are held. Each
    answer widens the windows a little, until the next refusal. When no text is held, all windows
    are removed. Smaller bodies are still read, since one text may have room where a thousand have
    not. Sizes are compared by powers of two. A refusal because a deadline cannot be met counts only
    if hardly any request has a later one (`is_late_deadline`): those might still be admitted.

    While the frontend itself is late, all bodies are refused unread, for as long as it was late.

    Args:
        usual_seconds: longest deadline that counts; longer ones count as this, so that one request
            with a long deadline cannot hide that the frontend is late.
    """

    def __init__(self, usual_seconds: float = math.inf) -> None:
        self._usual = usual_seconds
        self.texts = 0
        """Texts held, from their admission to their answer."""
        self._windows: dict[int, float] = {}
        """Number of held texts from which bodies are refused, by bit length of the body's size."""
        self._answered = 0.0
        self._counted = 0.0
        self._longest = 0.0
        self._noted = 0.0
        self._late_until = -math.inf

    def sheds(self, size: int, now: float) -> bool:
        """Return whether to refuse a body of `size` bytes unread."""
        return now < self._late_until or self.texts >= self._window(size)

    def learn_refusal(self, size: int | None, others: int) -> None:
        """Set the window for bodies as large as that of a request without room.

        Args:
            size: number of bytes of its body as received; None: unknown, no window is set.
            others: number of held texts besides its own.
        """
        if size is None or not others:
            return
        self._windows[size.bit_length()] = others

    def is_late_deadline(self, seconds: float) -> bool:
        """Return whether hardly any recent request had a later deadline."""
        return min(seconds, self._usual) >= PATIENT_SHARE * self._longest

    def note_delay(self, waited: float, now: float) -> None:
        """Note the time from the arrival of a request until the frontend began it."""
        if waited > LATE_SHARE * self._longest > 0:
            self._late_until = now + waited

    def enter(self, count: int, seconds: float, now: float) -> None:
        """Hold texts whose deadline is in `seconds`."""
        self.texts += count
        decayed = self._longest * math.exp((self._noted - now) / PATIENCE_SECONDS)
        self._longest, self._noted = max(min(seconds, self._usual), decayed), now

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
        """Return the whole seconds until `excess` of the held texts are answered."""
        rate = self._recent(now) / RATE_SECONDS
        if excess <= 0 or not rate:
            return 1
        return min(math.ceil(excess / rate), LONGEST_RETRY)

    def shed_seconds(self, size: int, now: float) -> int:
        """Return the whole seconds after which a body of `size` bytes will probably be read."""
        return self.retry_after(self.texts - self._window(size), now)

    def _window(self, size: int) -> float:
        length = size.bit_length()
        windows = [window for bits, window in self._windows.items() if bits <= length]
        return min(windows, default=math.inf)

    def _recent(self, now: float) -> float:
        return self._answered * math.exp((self._counted - now) / RATE_SECONDS)
