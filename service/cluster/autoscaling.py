"""How many replicas a pool needs, from what they say of themselves."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

MAX_BUSY = 0.7
"""Share of the time that a replica should compute at most: bursts need room."""


def replicas_for(queues: Collection[float], busy: Collection[float], target: float) -> int:
    """Return the number of replicas that a pool needs.

    Args:
        queues: seconds of device time that wait in each replica.
        busy: share of the time, 0..1, that each has computed lately.
        target: seconds that should wait in one at most.
    """
    # Work that waits wants more of them; a pool that keeps up has no queue and is needed all the
    # same, so what it does counts too.
    return max(1, math.ceil(sum(queues) / target), math.ceil(sum(busy) / MAX_BUSY))


class QueueSeconds:
    """Ray Serve's autoscaling policy of a pool: seconds that wait, not requests.

    Args:
        target: see `replicas_for`.
    """

    def __init__(self, target: float) -> None:
        self.target = target

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """Return how many replicas there should be; Ray applies bounds and delays to it."""
        told = context.aggregated_metrics or {}
        queues, busy = told.get("queue_seconds", {}), told.get("busy", {})
        if not queues:
            return context.target_num_replicas, {}
        return replicas_for(queues.values(), busy.values(), self.target), {}
