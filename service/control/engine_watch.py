"""Turn the reports of engines into metrics."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

import budgetformer
from budgetformer.inference.policy import QualityName
from service.control.catalog import Catalog
from service.ipc.engine_client import Disconnected, EngineClient, Event
from service.ipc.engine_messages import BatchReport, Heartbeat, Hello, ModelInfo, Models
from service.telemetry.metrics import QUALITY_RANK, Metrics


class EngineWatch:
    """Collector of the engines' metrics; called with each event and the index of its engine.

    Args:
        metrics: metrics to update.
        catalog: served versions.
        level: returns the quality level of a model, given the level that the load of the engines
            allows; None: the level of this model does not depend on load.
    """

    def __init__(
        self,
        metrics: Metrics,
        catalog: Catalog,
        level: Callable[[str, QualityName], QualityName | None],
    ) -> None:
        self._metrics = metrics
        self._level = level
        self._catalog = catalog
        self._began = time.monotonic()
        self._hellos: dict[int, Hello] = {}
        self._beats: dict[int, Heartbeat] = {}
        self._names: set[str] = set()
        self._models: dict[int, list[ModelInfo]] = {}
        self._shown: set[tuple[str, ...]] = set()

    def __call__(self, index: int, event: Event) -> None:
        """Count one event."""
        match event:
            case Hello():
                self._hello(index, event)
            case Models():
                self._models[index] = event.models
                self.show_models()
            case Disconnected():
                self._beats.pop(index, None)
                self._metrics.device_memory.labels(str(index)).set(0)
                self._sum_queues()
            case Heartbeat():
                self._beats[index] = event
                self._metrics.device_memory.labels(str(index)).set(event.memory_bytes)
                self._sum_queues()
            case BatchReport():
                batch = self._metrics.batch(event.model, event.budget)
                if batch is not None:
                    batch.count(event.items, event.tokens, event.padding)
                version = str(event.version)
                self._metrics.count_states(event.model, version, event.checked, event.clipped)
                self._metrics.dropped_reports.labels("engine").inc(event.dropped)
                self._metrics.device_busy.labels(str(index)).inc(event.seconds)

    def in_flight(self, index: int) -> int:
        """Return the number of unanswered items in an engine, from its last heartbeat."""
        beat = self._beats.get(index)
        return sum(beat.in_flight.values()) if beat is not None else 0

    def refresh(self, clients: Sequence[EngineClient]) -> None:
        """Update the age of each engine's last heartbeat, which grows without any event."""
        now = time.monotonic()
        for client in clients:
            age = now - (client.last_seen or self._began)
            self._metrics.heartbeat_age.labels(str(client.index)).set(age)

    def show_models(self) -> None:
        """Update the metrics that describe the served models, from the engines' reports.

        The last report of a disconnected engine still counts. Its precision may differ from that of
        other engines.
        """
        described: set[tuple[str, ...]] = set()
        for index, models in self._models.items():
            for model in models:
                checkpoint = self._catalog.get(model.name, model.version)
                if checkpoint is None:
                    continue
                key = (model.name, str(model.version))
                self._metrics.model_load.labels(*key).set(model.load_seconds)
                self._metrics.model_memory.labels(*key).set(model.memory_bytes)
                labels = len(checkpoint.manifest.labels)
                sizes = map(str, (labels, checkpoint.num_layers, checkpoint.num_heads))
                described.add((*key, *sizes, self._hellos[index].device, model.dtype))
        for info in described:
            self._metrics.model_info.labels(*info).set(1)
        for info in self._shown - described:
            self._metrics.model_info.remove(*info)
        removed = {info[:2] for info in self._shown} - {info[:2] for info in described}
        for name, version in removed:
            self._metrics.model_load.remove(name, version)
            self._metrics.model_memory.remove(name, version)
        self._shown = described

    def forget_model(self, name: str) -> None:
        """Stop updating the queue metrics of a model, unless an engine still reports them."""
        self._names.discard(name)

    def _hello(self, index: int, hello: Hello) -> None:
        before = self._hellos.get(index)
        if before is not None and before.pid != hello.pid:
            self._metrics.engine_restarts.inc()
        self._hellos[index] = hello
        commit = os.environ.get("GIT_COMMIT", "unknown")
        self._metrics.build_info.labels(budgetformer.__version__, commit, hello.torch).set(1)
        if hello.models:
            self._models[index] = hello.models
            self.show_models()

    def _sum_queues(self) -> None:
        metrics, beats = self._metrics, self._beats.values()
        named = {name for beat in beats for name in beat.queue_items}
        self._names |= {n for n in named if n in self._catalog.served or metrics.has_model(n)}
        for model in self._names:
            metrics.queue_items.labels(model).set(sum(b.queue_items.get(model, 0) for b in beats))
            metrics.queue_cost.labels(model).set(sum(b.queue_seconds.get(model, 0) for b in beats))
            metrics.in_flight.labels(model).set(sum(b.in_flight.get(model, 0) for b in beats))
            oldest = max((b.oldest_age.get(model, 0.0) for b in beats), default=0.0)
            metrics.queue_oldest.labels(model).set(oldest)
            if beats and model in self._catalog.served:
                lowest = min((b.quality for b in beats), key=QUALITY_RANK.__getitem__)
                level = self._level(model, lowest)
                if level is not None:
                    metrics.quality_level.labels(model).set(QUALITY_RANK[level])
