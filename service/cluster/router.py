"""Which replica of a pool gets a request: one that has its model, the one with least to do."""

from __future__ import annotations

import random
import time
from collections import defaultdict
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from service.cluster.backlog import Backlog

FIRST_GUESS = 2e-3
"""Seconds of an item, until the replica has computed some."""


class BudgetRouter(RequestRouter):
    """Route by seconds of device time, not by requests: a request may be 1 text or 2,000.

    Calls have the arguments of `EngineReplica.classify`; what replicas say of themselves is
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
        """Return the candidates, each a rank of its own, the best first."""
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
        """Count the work that a replica was sent."""
        replica = self.curr_replicas.get(replica_id)
        if replica is not None:
            now = time.monotonic()
            price = replica.routing_stats.get("item_seconds") or FIRST_GUESS
            self._backlog(replica, now).send(pending_request.args[1] * price, now)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Forget those that are gone."""
        there = {replica.replica_id for replica in replicas}
        for gone in self._backlogs.keys() - there:
            del self._backlogs[gone]
        super().update_replicas(replicas)

    def _backlog(self, replica: RunningReplica, now: float) -> Backlog:
        backlog, stats = self._backlogs[replica.replica_id], replica.routing_stats
        if stats:
            backlog.hear(stats["word"], stats["seconds"], now)
        return backlog
