"""The confidence interval of an observed share."""

from __future__ import annotations

import math


def interval(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Return Wilson's confidence interval of an observed share, by default at 95 %.

    Args:
        share: observed share, 0..1.
        count: number of observed items, at least 1.
        z: quantile of the normal distribution for the confidence level.
    """
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = (
        z
        * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
        / (1 + z * z / count)
    )
    # Rounding must not exclude the share itself.
    return min(max(0.0, middle - half), share), max(min(1.0, middle + half), share)
