"""How many of those that have just come are decided in one go."""

from __future__ import annotations

from collections.abc import Iterable

DECISION_TOKENS = 8192
"""Most tokens whose budgets are decided in one go, as step 0 reads them.

So that a huge request does not hold up the device.
"""


def decided_together(tokens: Iterable[int]) -> int:
    """Return how many texts, of so many tokens in turn, are decided first: one at least.

    >>> decided_together([8000, 192, 1])
    2
    """
    total = count = 0
    for own in tokens:
        total += own
        if count and total > DECISION_TOKENS:
            break
        count += 1
    return count
