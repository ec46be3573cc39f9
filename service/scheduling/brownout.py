"""Brown-out: under overload, lower the quality before refusing anyone, and climb back later."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from budgetformer.inference.policy import QualityName


@dataclass(frozen=True)
class BrownOutLimits:
    """When to go down and up.

    Attributes:
        lower_at: seconds of queue beyond which the level goes down by one.
        raise_at: seconds of queue below which it may go up again.
        settle: seconds between two steps down, for the last one to take effect.
        calm: seconds that the queue must stay below `raise_at` before a step up.
    """

    lower_at: float
    raise_at: float
    settle: float = 0.5
    calm: float = 5.0


class BrownOut:
    """The quality level in force for callers who left it to the server.

    Args:
        levels: from the normal one down to the floor.
        limits: when to change.
    """

    def __init__(self, levels: Sequence[QualityName], limits: BrownOutLimits) -> None:
        self.levels = list(levels)
        self.limits = limits
        self._place = 0
        self._changed = float("-inf")
        self._calm_since: float | None = None

    @property
    def level(self) -> QualityName:
        """The level in force."""
        return self.levels[self._place]

    @property
    def lowered(self) -> bool:
        """Whether that is less than the normal one."""
        return self._place > 0

    def change_levels(self, levels: Sequence[QualityName]) -> None:
        """Go by other levels from the same normal one; stay as low as they allow."""
        self.levels = list(levels)
        self._place = min(self._place, len(self.levels) - 1)

    def observe(self, queued_seconds: float, now: float) -> QualityName:
        """Follow the queue; return the level in force from now on."""
        limits = self.limits
        if queued_seconds >= limits.raise_at:
            self._calm_since = None
        elif self._calm_since is None:
            self._calm_since = now
        lower = self._place + 1 < len(self.levels)
        if queued_seconds > limits.lower_at and lower and now - self._changed >= limits.settle:
            self._move(1, now)
        elif self._place and self._calm_since is not None and now - self._calm_since >= limits.calm:
            self._move(-1, now)
            self._calm_since = now  # every step up is earned anew
        return self.level

    def _move(self, steps: int, now: float) -> None:
        self._place += steps
        self._changed = now


_RISING: list[QualityName] = ["fast", "balanced", "best"]


def lowest(floors: Iterable[QualityName]) -> QualityName:
    """Return the lowest of some levels."""
    return min(floors, key=_RISING.index)


def kept_above(
    floor: QualityName, level: QualityName, normal: QualityName = "balanced"
) -> QualityName:
    """Return the level in force, or the floor where that is higher, but not above the normal one.

    >>> kept_above("balanced", "fast")
    'balanced'
    """
    places = [_RISING.index(one) for one in (floor, level, normal)]
    return _RISING[max(places[1], min(places[0], places[2]))]


def levels_down_to(floor: QualityName, normal: QualityName = "balanced") -> list[QualityName]:
    """Return the levels from the normal one down to the floor; the normal one alone if it is lower.

    >>> levels_down_to("fast")
    ['balanced', 'fast']
    """
    order: list[QualityName] = ["best", "balanced", "fast"]
    first, last = order.index(normal), order.index(floor)
    return order[first : max(first, last) + 1]
