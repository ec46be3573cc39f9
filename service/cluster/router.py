"""Route requests to the replica with the least waiting work among those with the model."""

from __future__ import annotations

import random
import time
from collections import defaultdict
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from service.cluster.backlog import Backlog

FIRST_GUESS = 2e-3
"""Assumed seconds of an item, until the replica has computed some."""


class BudgetRouter(RequestRouter):
    """Route by waiting device time, not by requests, since a request may have 1 text or 2,000.

    Calls have the arguments of `EngineReplica.classify`; replicas report their load with
    `EngineReplica.record_routing_stats`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._backlogs: defaultdict[ReplicaID, Backlog] = defaultdict(Backlog)

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Return the candidates, the best first, each as a separate rank."""
        now = time.monotonic()
        model = pending_request.args[0] if pending_request is not None else None

        def rank(replica: RunningReplica) -> tuple[bool, float, float]:
            lacks = model not in replica.routing_stats.get("models", ())
            return lacks, self._backlog(replica, now).seconds(now), random.random()

        return [[replica] for replica in sorted(candidate_replicas, key=rank)]

    def on_request_routed(
        self,
        pending_request: PendingRequest,
        replica_id: ReplicaID,
        result: object,  # noqa: ARG002
    ) -> None:
        """Add the request to the backlog of its replica."""
        replica = self.curr_replicas.get(replica_id)
        if replica is not None:
            now = time.monotonic()
            price = replica.routing_stats.get("item_seconds") or FIRST_GUESS
            self._backlog(replica, now).send(pending_request.args[1] * price, now)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Replace the replicas, and drop the backlogs of those that ended."""
        running = {replica.replica_id for replica in replicas}
        for ended in self._backlogs.keys() - running:
            del self._backlogs[ended]
        super().update_replicas(replicas)

    def _backlog(self, replica: RunningReplica, now: float) -> Backlog:
        backlog, stats = self._backlogs[replica.replica_id], replica.routing_stats
        if stats:
            backlog.update(stats["word"], stats["seconds"], now)
        return backlog
