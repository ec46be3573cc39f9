"""The confidence interval of a share."""

from __future__ import annotations

import math


def interval(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Return Wilson's interval of a share that was observed on so many items; by default 95 %.

    Args:
        share: observed, in [0, 1].
        count: of the items, at least 1.
        z: half the width of the interval, in standard deviations.
    """
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = (
        z
        * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
        / (1 + z * z / count)
    )
    # Rounding may not put the share itself outside of its interval.
    return min(max(0.0, middle - half), share), max(min(1.0, middle + half), share)
