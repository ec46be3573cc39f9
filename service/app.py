"""The front's application: routes, state and life."""

from __future__ import annotations

from collections.abc import AsyncIterator, MutableMapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import structlog
from fastapi import FastAPI
from opentelemetry.trace import NoOpTracer, TracerProvider
from starlette.middleware.cors import CORSMiddleware

import budgetformer
from service.access import ANONYMOUS, KeyRing
from service.api import classify, health, kserve, models, playground, sagemaker, tei
from service.api.classify import DEFAULT_QUALITY
from service.api.connections import ConnectionLimits, GuardedProtocol
from service.api.errors import install_error_handlers
from service.api.middleware import OTHER, PROBES, Observe, OperationsPort, Secure
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
from service.engine.client import Engines
from service.models import Models, ServedModel
from service.observability.metrics import QUALITY_RANK, Metrics
from service.observability.watch import EngineWatch
from service.settings import Settings

log = structlog.get_logger()


def create_app(
    settings: Settings, sockets: list[Path], tracer_provider: TracerProvider | None = None
) -> FastAPI:
    """Build the application of a front whose engines listen on `sockets`.

    Args:
        settings: of the whole server.
        sockets: where its engines listen.
        tracer_provider: where spans go; None: nobody traces.

    Raises:
        CheckpointError: the model store is no folder, or lacks the default model.
        KeysError: the keys are none.
    """
    metrics = Metrics()
    keys = KeyRing(
        settings.all_keys(),
        settings.keys_file,
        anonymous=settings.anonymous,
        changed=lambda names: metrics.know_keys([*names, ANONYMOUS]),
    )
    metrics.know_engines(len(sockets))
    served = Models(settings.model_store, settings.models, settings.default_model)
    watch = EngineWatch(metrics, served, settings.quality == "auto")
    engines = Engines(sockets, watch)
    for problem in served.errors:
        log.error("checkpoint left out", reason=problem)
    tracer = NoOpTracer() if tracer_provider is None else tracer_provider.get_tracer("budgetformer")
    state = State(settings, served, engines, metrics, tracer, keys)

    def announce(model: ServedModel) -> None:
        checkpoint = model.checkpoint
        metrics.know_model(checkpoint.name, str(checkpoint.version), checkpoint.budgets)
        level = DEFAULT_QUALITY if settings.quality == "auto" else settings.quality
        rank = QUALITY_RANK.get(level, 0) if isinstance(level, str) else 0
        for gauge in (metrics.quality_level, metrics.quality_configured):
            gauge.labels(checkpoint.name).set(rank)

    def retire(model: ServedModel) -> None:
        name = model.checkpoint.name
        metrics.retire_model(name, str(model.checkpoint.version))
        if name not in served.served:
            for gauge in (metrics.quality_level, metrics.quality_configured):
                gauge.remove(name)

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
        telemetry={
            "tracer_provider": tracer_provider,
            "tracing": tracer_provider is not None,
            "operation_spans": False,
            "metrics": False,
            "logs": False,
            "auto_configure": False,
            "exclude": _operational,
        },
    )
    app.state.shared, app.state.draining, app.state.watch = state, False, watch
    app.state.announce, app.state.retire = announce, retire
    for module in (classify, health, models, tei, kserve, sagemaker, playground):
        app.include_router(module.router)
    install_error_handlers(app)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-API-Key", "X-Request-Id"],
            expose_headers=["Retry-After", "Server-Timing", "X-Quality", "X-Request-Id"],
        )
    if settings.metrics_port is not None:
        app.add_middleware(OperationsPort, port=settings.metrics_port)
    app.add_middleware(Observe, metrics=metrics, log_share=settings.access_log)
    app.add_middleware(Secure)
    _document_bodies(app)
    metrics.know_routes([*app.openapi()["paths"], OTHER])
    return app


def protocol_of(app: FastAPI, settings: Settings) -> Any:
    """Return what is to read HTTP from each connection, for uvicorn."""
    limits = ConnectionLimits(
        settings.max_connections,
        settings.max_header_bytes,
        # Chunks may be as small as the sizes and line ends between them.
        settings.max_header_bytes + 2 * settings.max_body_bytes,
        settings.receive_seconds,
    )
    metrics = app.state.shared.metrics

    def count(reason: str) -> None:
        metrics.broken_connections.labels(reason).inc()

    return partial(GuardedProtocol, limits=limits, count=count)


def _operational(scope: MutableMapping[str, Any]) -> bool:
    """Say whether a request is a probe or a scrape, which would drown the traces of the others."""
    path = str(scope.get("path"))
    return path == "/metrics" or path.startswith(PROBES)


def _document_bodies(app: FastAPI) -> None:
    """Add the schemas of bodies that the routes read for themselves."""
    schema = app.openapi()
    for model in (
        ClassifyRequest, TokenizeRequest, LoadRequest, PredictRequest, InferRequest,
        IndexRequest, RepositoryRequest,
    ):  # fmt: skip
        described = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schema["components"]["schemas"] |= described.pop("$defs", {}) | {model.__name__: described}
