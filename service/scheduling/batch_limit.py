"""How many items a batch may have, as memory allows."""

from __future__ import annotations

FULL_BATCHES = 16
"""The limit grows after so many full batches in a row."""
STEPS = 16
"""It grows from nothing to the configured limit in so many steps."""


class BatchLimit:
    """Shrink when memory runs out, and grow again slowly while full batches succeed.

    A shortage may pass: another process frees memory, or the long texts that caused it are done.

    Args:
        configured: the largest limit.
    """

    def __init__(self, configured: int) -> None:
        self.configured = configured
        self.items = configured
        """The limit in force."""
        self._full = 0

    def shrink(self, room: int) -> None:
        """Note that memory had room for so many items only."""
        self.items = max(1, min(room, self.items))
        self._full = 0

    def succeeded(self, items: int) -> None:
        """Note that a batch of so many items ran; smaller ones than the limit prove nothing."""
        if self.items == self.configured or items < self.items:
            return
        self._full += 1
        if self._full == FULL_BATCHES:
            self._full = 0
            self.items = min(self.configured, self.items + -(-self.configured // STEPS))
