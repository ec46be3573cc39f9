"""Brown-out: under overload, lower the quality level before refusing requests; raise it later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from budgetformer.inference.policy import QUALITY_NAMES, QualityName

NORMAL: QualityName = "balanced"
"""Level of `auto` requests while there is no overload."""


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


def kept_above(floor: QualityName, level: QualityName) -> QualityName:
    """Return `level`, raised to `floor` if it is lower; the floor counts up to `NORMAL` only.

    >>> kept_above("balanced", "fast")
    'balanced'
    """
    rank = QUALITY_NAMES.index
    return max(level, min(floor, NORMAL, key=rank), key=rank)


def levels_down_to(*floors: QualityName) -> list[QualityName]:
    """Return the levels from `NORMAL` down to the lowest floor; at least `NORMAL`.

    >>> levels_down_to("best", "fast")
    ['balanced', 'fast']
    """
    normal = QUALITY_NAMES.index(NORMAL)
    last = min(normal, *map(QUALITY_NAMES.index, floors))
    return list(reversed(QUALITY_NAMES[last : normal + 1]))
