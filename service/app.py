"""The front's application: routes, state and life."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import structlog
from fastapi import FastAPI

import budgetformer
from service.api import classify, health, kserve, models, playground, sagemaker, tei
from service.api.classify import DEFAULT_QUALITY
from service.api.errors import install_error_handlers
from service.api.middleware import OTHER, Observe
from service.api.models import LoadRequest
from service.api.schemas import (
    ClassifyRequest,
    IndexRequest,
    InferRequest,
    PredictRequest,
    RepositoryRequest,
    TokenizeRequest,
)
from service.api.state import State
from service.engine.client import Engines, Event
from service.engine.protocol import BatchRan, Heartbeat, Hello, ModelInfo
from service.models import Models, ServedModel
from service.observability.metrics import QUALITY_RANK, Metrics
from service.settings import Settings

log = structlog.get_logger()


class _Watcher:
    """Turn what engines report into metrics."""

    def __init__(self, metrics: Metrics, served: Models) -> None:
        self.metrics = metrics
        self._served = served
        self._hellos: dict[int, Hello] = {}
        self._beats: dict[int, Heartbeat] = {}

    def __call__(self, index: int, event: Event) -> None:
        match event:
            case Hello():
                before = self._hellos.get(index)
                if before is not None and before.pid != event.pid:
                    self.metrics.engine_restarts.inc()
                self._hellos[index] = event
                self._beats.pop(index, None)
                build = (
                    budgetformer.__version__,
                    os.environ.get("GIT_COMMIT", "unknown"),
                    event.torch,
                )
                self.metrics.build_info.labels(*build).set(1)
            case Heartbeat():
                self._beats[index] = event
                self.metrics.device_memory.labels(str(index)).set(event.memory_bytes)
                self._sum_queues()
            case BatchRan():
                self._count_batch(event)
            case ModelInfo():
                self._loaded(event, self._hellos[index])

    def _loaded(self, event: ModelInfo, engine: Hello) -> None:
        key = (event.name, str(event.version))
        self.metrics.model_load.labels(*key).set(event.load_seconds)
        self.metrics.model_memory.labels(*key).set(event.memory_bytes)
        checkpoint = self._served.known[event.name, event.version].checkpoint
        sizes = (len(checkpoint.manifest.labels), checkpoint.num_layers, checkpoint.num_heads)
        self.metrics.model_info.labels(*key, *map(str, sizes), engine.device, event.dtype).set(1)

    def _count_batch(self, event: BatchRan) -> None:
        labels = (event.model, event.budget)
        self.metrics.batches.labels(*labels).inc()
        self.metrics.batch_items.labels(*labels).observe(event.items)
        self.metrics.batch_tokens.labels(*labels).observe(event.tokens)
        self.metrics.batch_padding.labels(event.model).observe(event.padding)

    def _sum_queues(self) -> None:
        beats = self._beats.values()
        for model in {name for beat in beats for name in beat.queue_items}:
            metrics = self.metrics
            metrics.queue_items.labels(model).set(sum(b.queue_items.get(model, 0) for b in beats))
            metrics.queue_cost.labels(model).set(sum(b.queue_seconds.get(model, 0) for b in beats))
            metrics.in_flight.labels(model).set(sum(b.in_flight.get(model, 0) for b in beats))
            metrics.queue_oldest.labels(model).set(max(b.oldest_age.get(model, 0) for b in beats))


def create_app(settings: Settings, sockets: list[Path]) -> FastAPI:
    """Build the application of a front whose engines listen on `sockets`.

    Raises:
        CheckpointError: the model store is no folder, or lacks the default model.
    """
    metrics = Metrics()
    served = Models(settings.model_store, settings.models, settings.default_model)
    engines = Engines(sockets, _Watcher(metrics, served))
    for problem in served.errors:
        log.error("checkpoint left out", reason=problem)
    state = State(settings, served, engines, metrics)

    def announce(model: ServedModel) -> None:
        checkpoint = model.checkpoint
        metrics.know_model(checkpoint.name, str(checkpoint.version), checkpoint.budgets)
        level = DEFAULT_QUALITY if settings.quality == "auto" else settings.quality
        rank = QUALITY_RANK.get(level, 0) if isinstance(level, str) else 0
        metrics.quality_level.labels(checkpoint.name).set(rank)

    def retire(model: ServedModel) -> None:
        metrics.retire_model(model.checkpoint.name, str(model.checkpoint.version))

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        for model in served.served.values():
            announce(model)
            checkpoint = model.checkpoint
            engines.wanted[checkpoint.name, checkpoint.version] = checkpoint.path
        engines.start()
        yield
        await state.background.stop()
        await engines.stop()
        state.tokenizing.shutdown()

    app = FastAPI(
        title="BudgetFormer Serving",
        version=budgetformer.__version__,
        summary="Text classification that spends, on each text, only the heads that it needs.",
        lifespan=life,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.shared, app.state.draining = state, False
    app.state.announce, app.state.retire = announce, retire
    for module in (classify, health, models, tei, kserve, sagemaker, playground):
        app.include_router(module.router)
    install_error_handlers(app)
    app.add_middleware(Observe, metrics=metrics)
    _document_bodies(app)
    metrics.know_routes([*app.openapi()["paths"], OTHER])
    return app


def _document_bodies(app: FastAPI) -> None:
    """Add the schemas of bodies that the routes read for themselves."""
    schema = app.openapi()
    for model in (
        ClassifyRequest, TokenizeRequest, LoadRequest, PredictRequest, InferRequest,
        IndexRequest, RepositoryRequest,
    ):  # fmt: skip
        described = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schema["components"]["schemas"] |= described.pop("$defs", {}) | {model.__name__: described}
