"""Largest number of items in a batch that fits into memory."""

from __future__ import annotations

FULL_BATCHES = 16
"""Number of successful full batches after which the limit grows."""
STEPS = 16
"""Number of steps in which the limit grows from zero to the configured limit."""


class BatchLimit:
    """Limit that shrinks when memory runs out, and grows slowly while full batches succeed.

    A shortage may be temporary: another process may free memory, or long texts may have caused it.

    Args:
        configured: largest limit.

    Attributes:
        items: limit in force.
    """

    def __init__(self, configured: int) -> None:
        self.configured = configured
        self.items = configured
        self._full = 0

    def shrink(self, room: int) -> None:
        """Lower the limit to the number of items for which memory had room."""
        self.items = max(1, min(room, self.items))
        self._full = 0

    def succeeded(self, items: int) -> None:
        """Count a batch of `items` items that ran; only full batches can raise the limit."""
        if self.items == self.configured or items < self.items:
            return
        self._full += 1
        if self._full == FULL_BATCHES:
            self._full = 0
            self.items = min(self.configured, self.items + -(-self.configured // STEPS))
