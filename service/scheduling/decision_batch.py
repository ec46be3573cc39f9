"""Size of a decision pass."""

from __future__ import annotations

from collections.abc import Iterable

DECISION_TOKENS = 8192
"""Most tokens, as step 0 reads them, in one decision pass, so that a huge request does not block
the device."""


def decided_together(tokens: Iterable[int]) -> int:
    """Return how many of the first texts are decided in one pass, at least one.

    Args:
        tokens: number of tokens of each text.

    >>> decided_together([8000, 192, 1])
    2
    """
    total = count = 0
    for length in tokens:
        total += length
        if count and total > DECISION_TOKENS:
            break
        count += 1
    return count
