"""Brown-out: under overload, lower the quality level before refusing requests; raise it later."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from budgetformer.inference.policy import QualityName


@dataclass(frozen=True)
class BrownOutLimits:
    """Limits at which the quality level changes.

    Attributes:
        lower_at: queue delay (s) above which the level is lowered by one.
        raise_at: queue delay (s) below which it may be raised again.
        settle: shortest time (s) between a change and the next step down.
        calm: time (s) that the delay must stay below `raise_at` before a step up.
    """

    lower_at: float
    raise_at: float
    settle: float = 0.5
    calm: float = 5.0


class BrownOut:
    """The quality level in force for `auto` requests.

    Args:
        levels: levels from the normal one down to the floor.
        limits: limits at which the level changes.
    """

    def __init__(self, levels: Sequence[QualityName], limits: BrownOutLimits) -> None:
        self.levels = list(levels)
        self.limits = limits
        self._index = 0
        self._changed = float("-inf")
        self._calm_since: float | None = None

    @property
    def level(self) -> QualityName:
        """The level in force."""
        return self.levels[self._index]

    @property
    def lowered(self) -> bool:
        """Whether the level is below the normal one."""
        return self._index > 0

    def change_levels(self, levels: Sequence[QualityName]) -> None:
        """Replace the levels; the first must be the same. Keep the level, but respect the floor."""
        self.levels = list(levels)
        self._index = min(self._index, len(self.levels) - 1)

    def observe(self, queued_seconds: float, now: float) -> QualityName:
        """Adapt the level to the queue delay, and return the level now in force."""
        limits = self.limits
        if queued_seconds >= limits.raise_at:
            self._calm_since = None
        elif self._calm_since is None:
            self._calm_since = now
        can_lower = self._index + 1 < len(self.levels)
        if queued_seconds > limits.lower_at and can_lower and now - self._changed >= limits.settle:
            self._move(1, now)
        elif self._index and self._calm_since is not None and now - self._calm_since >= limits.calm:
            self._move(-1, now)
            self._calm_since = now  # the next step up needs another `calm` seconds
        return self.level

    def _move(self, steps: int, now: float) -> None:
        self._index += steps
        self._changed = now


_RISING: list[QualityName] = ["fast", "balanced", "best"]


def lowest(levels: Iterable[QualityName]) -> QualityName:
    """Return the lowest of several levels."""
    return min(levels, key=_RISING.index)


def kept_above(
    floor: QualityName, level: QualityName, normal: QualityName = "balanced"
) -> QualityName:
    """Return `level`, raised to `floor` if it is lower; the floor counts up to `normal` only.

    >>> kept_above("balanced", "fast")
    'balanced'
    """
    return max(level, min(floor, normal, key=_RISING.index), key=_RISING.index)


def levels_down_to(floor: QualityName, normal: QualityName = "balanced") -> list[QualityName]:
    """Return the levels from `normal` down to `floor`; only `normal` if the floor is above it.

    >>> levels_down_to("fast")
    ['balanced', 'fast']
    """
    order: list[QualityName] = ["best", "balanced", "fast"]
    first, last = order.index(normal), order.index(floor)
    return order[first : max(first, last) + 1]
