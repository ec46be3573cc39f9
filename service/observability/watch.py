"""Turn what engines report into metrics."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

import budgetformer
from service.engine.client import EngineClient, Event, Lost
from service.engine.protocol import BatchRan, Heartbeat, Hello, ModelInfo
from service.models import Models
from service.observability.metrics import QUALITY_RANK, Metrics


class EngineWatch:
    """Keep the metrics of the engines: it is told of every event, with the engine's index.

    Args:
        metrics: to keep.
        served: the models.
        auto: whether the engines choose the quality of requests that name none.
    """

    def __init__(self, metrics: Metrics, served: Models, auto: bool) -> None:
        self._metrics = metrics
        self._auto = auto
        self._served = served
        self._began = time.monotonic()
        self._hellos: dict[int, Hello] = {}
        self._beats: dict[int, Heartbeat] = {}
        self._names: set[str] = set()
        self._infos: dict[tuple[int, str, str], tuple[str, ...]] = {}

    def __call__(self, index: int, event: Event) -> None:
        """Count one event."""
        match event:
            case Hello():
                before = self._hellos.get(index)
                if before is not None and before.pid != event.pid:
                    self._metrics.engine_restarts.inc()
                self._hellos[index] = event
                commit = os.environ.get("GIT_COMMIT", "unknown")
                build = (budgetformer.__version__, commit, event.torch)
                self._metrics.build_info.labels(*build).set(1)
            case Lost():
                self._beats.pop(index, None)
                self._metrics.device_memory.labels(str(index)).set(0)
                self._sum_queues()
            case Heartbeat():
                self._beats[index] = event
                self._metrics.device_memory.labels(str(index)).set(event.memory_bytes)
                self._sum_queues()
            case BatchRan():
                batch = self._metrics.batch(event.model, event.budget)
                batch.count(event.items, event.tokens, event.padding)
                self._metrics.device_busy.labels(str(index)).inc(event.seconds)
            case ModelInfo():
                self._loaded(index, event)

    def refresh(self, clients: Sequence[EngineClient]) -> None:
        """Bring up to date what changes without an event: how long each engine has been silent."""
        now = time.monotonic()
        for client in clients:
            age = now - (client.heard or self._began)
            self._metrics.heartbeat_age.labels(str(client.index)).set(age)

    def _loaded(self, index: int, event: ModelInfo) -> None:
        key = (event.name, str(event.version))
        self._metrics.model_load.labels(*key).set(event.load_seconds)
        self._metrics.model_memory.labels(*key).set(event.memory_bytes)
        checkpoint = self._served.known[event.name, event.version].checkpoint
        sizes = (len(checkpoint.manifest.labels), checkpoint.num_layers, checkpoint.num_heads)
        info = (*key, *map(str, sizes), self._hellos[index].device, event.dtype)
        before = self._infos.get((index, *key))
        self._infos[index, *key] = info
        if before is not None and before not in self._infos.values():
            # An engine that came back may have chosen another precision.
            self._metrics.model_info.remove(*before)
        self._metrics.model_info.labels(*info).set(1)

    def _sum_queues(self) -> None:
        metrics, beats = self._metrics, self._beats.values()
        self._names |= {name for beat in beats for name in beat.queue_items}
        for model in self._names:
            metrics.queue_items.labels(model).set(sum(b.queue_items.get(model, 0) for b in beats))
            metrics.queue_cost.labels(model).set(sum(b.queue_seconds.get(model, 0) for b in beats))
            metrics.in_flight.labels(model).set(sum(b.in_flight.get(model, 0) for b in beats))
            oldest = max((b.oldest_age.get(model, 0.0) for b in beats), default=0.0)
            metrics.queue_oldest.labels(model).set(oldest)
            if self._auto and beats:
                lowest = min(QUALITY_RANK[b.quality] for b in beats)
                metrics.quality_level.labels(model).set(lowest)
