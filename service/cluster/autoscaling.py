"""The number of replicas that a pool needs, computed from their reports."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

MAX_BUSY = 0.7
"""Highest share of the time for which a replica should compute, so that bursts have room."""


def replicas_for(queues: Collection[float], busy: Collection[float], target: float) -> int:
    """Return the number of replicas that a pool needs.

    Args:
        queues: waiting device time in each replica, in seconds.
        busy: share of the last time, 0..1, for which each replica has computed.
        target: highest waiting device time in one replica, in seconds.
    """
    # A pool that keeps up has no queue but still needs its replicas, so their use counts too.
    return max(1, math.ceil(sum(queues) / target), math.ceil(sum(busy) / MAX_BUSY))


class QueueSeconds:
    """Ray Serve autoscaling policy of a pool, by waiting device time instead of requests.

    Args:
        target: see `replicas_for`.
    """

    def __init__(self, target: float) -> None:
        self.target = target

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """Return the wanted number of replicas; Ray applies bounds and delays to it."""
        metrics = context.aggregated_metrics or {}
        queues, busy = metrics.get("queue_seconds", {}), metrics.get("busy", {})
        if not queues:
            return context.target_num_replicas, {}
        return replicas_for(queues.values(), busy.values(), self.target), {}
