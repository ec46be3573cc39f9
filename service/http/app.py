"""The application of a frontend: routes, middleware, state, start and stop."""

from __future__ import annotations

from collections.abc import AsyncIterator, MutableMapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from opentelemetry.trace import TracerProvider
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Receive, Scope, Send

import budgetformer
from service.http import (
    classify,
    health,
    job_routes,
    kserve,
    model_routes,
    playground,
    rollout_routes,
    sagemaker,
    settings_routes,
    tei,
)
from service.http.authentication import document_keys
from service.http.compression import Compress
from service.http.connections import ConnectionLimits, GuardedProtocol
from service.http.dialects import Dialects, without_prefix
from service.http.direct import Direct, direct_routes
from service.http.middleware import OTHER, PROBES, Head, Observe, OperationsPort
from service.http.model_routes import LoadRequest
from service.http.private import api_routes
from service.http.rollout_routes import RollOutRequest
from service.http.schemas import (
    ClassifyRequest,
    IndexRequest,
    InferRequest,
    JobRequest,
    PredictRequest,
    RepositoryRequest,
    TokenizeRequest,
)
from service.http.state import State
from service.ipc.connection import Address
from service.ipc.engine_client import Engines
from service.ipc.hub_client import HubLink
from service.key_usage import KeyUsage
from service.keys import ANONYMOUS, KeyRing
from service.pipeline.answer_cache import AnswerCache
from service.pipeline.catalog_follower import CatalogFollower
from service.pipeline.served_models import Models
from service.process import decode_settings
from service.settings import Settings


class _Application(FastAPI):
    """FastAPI behind a proxy that adds a path prefix, whether it strips the prefix or not.

    Args:
        prefix: prefix, such as "/classifier".
        options: options of FastAPI.
    """

    def __init__(self, prefix: str, **options: Any) -> None:
        super().__init__(**options)
        self.prefix = prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request by its path without the prefix."""
        if self.prefix and scope["type"] == "http":
            path = without_prefix(scope["path"], self.prefix)
            scope = {**scope, "path": path, "root_path": self.prefix}
        await super().__call__(scope, receive, send)


def create_app(
    settings: Settings,
    engines: Engines,
    hub_address: Address,
    tracer_provider: TracerProvider | None = None,
    shared: Path | None = None,
    labels: Sequence[str] = (),
    usage: KeyUsage | None = None,
) -> FastAPI:
    """Build the application of a frontend.

    Args:
        settings: settings of the server.
        engines: engines of the server; the application connects and disconnects.
        hub_address: address of the hub.
        tracer_provider: provider of tracers; None: tracing is off.
        shared: folder for tables that the frontends of a server share; None: tables are not shared.
        labels: names, in metrics, of requests that do not come over HTTP.
        usage: usage of keys that the frontends of a server share; None: it is not shared.

    Raises:
        KeysError: the keys are invalid.
    """
    models = Models(settings.model_store, settings.default_model, shared)
    routes: list[str] = []
    hub = HubLink(
        hub_address,
        lambda serving: follow(serving),
        routes,
        configure=lambda line: state.configure(decode_settings(line)),
        ready=lambda: health.why_not_ready(state) is None,
    )
    cache = None
    if settings.answer_cache_mib:
        cache = AnswerCache(settings.answer_cache_mib * 2**20, hub.counts.cache_holds)
    follow = CatalogFollower(models, engines, hub, cache)
    keys = KeyRing(
        settings.all_keys(),
        settings.keys_file,
        anonymous=settings.anonymous,
        usage=usage,
        changed=lambda names: hub.send_keys([*names, ANONYMOUS]),
    )
    tracer = None if tracer_provider is None else tracer_provider.get_tracer("budgetformer")
    state = State(settings, models, engines, hub, tracer, keys, cache)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        state.start_threads()
        engines.start()
        await hub.start()
        yield
        await state.shadows.stop()
        await hub.stop()
        await follow.stop()
        await engines.stop()
        state.tokenizing.shutdown()

    app = _Application(
        settings.root_path,
        title="BudgetFormer Serving",
        version=budgetformer.__version__,
        summary="Text classification that spends, on each text, only the heads that it needs.",
        lifespan=lifespan,
        docs_url=None,  # FastAPI's page loads scripts from other servers
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
    app.state.shared = state
    for module in (
        classify,
        health,
        model_routes,
        rollout_routes,
        settings_routes,
        job_routes,
        tei,
        kserve,
        sagemaker,
        playground,
    ):
        app.include_router(module.router)
    declared = api_routes(app)
    dialects = app.state.dialects = Dialects(declared, settings.root_path)
    dialects.install(app)
    app.state.direct = direct_routes(declared)
    app.add_middleware(Direct, routes=app.state.direct, dialects=dialects)
    if settings.compress_min_bytes:
        app.add_middleware(
            Compress, min_bytes=settings.compress_min_bytes, threads=state.tokenizing
        )
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "X-API-Key", "X-Request-Id"],
            expose_headers=[
                "Location",
                "Retry-After",
                "Server-Timing",
                "X-Cache",
                "X-Quality",
                "X-Request-Id",
            ],  # fmt: skip
        )
    app.add_middleware(Head)
    if settings.metrics_port is not None:
        app.add_middleware(OperationsPort, port=settings.metrics_port, dialects=dialects)
    app.add_middleware(Observe, state=state, dialects=dialects)
    _document(app)
    routes += [*app.openapi()["paths"], *playground.UNLISTED, *labels, OTHER]
    return app


def protocol_of(app: FastAPI, settings: Settings) -> Any:
    """Return the factory of protocols for uvicorn's option `http`."""
    prefixes = {"", settings.root_path}

    def message_bytes(max_body: int) -> int:
        # Small chunks are no larger than their sizes and line ends.
        return settings.max_header_bytes + 2 * max_body

    limits = ConnectionLimits(
        settings.max_header_bytes,
        message_bytes(settings.max_body_bytes),
        settings.receive_seconds,
        dict.fromkeys(
            ((prefix + job_routes.PATH).encode() for prefix in prefixes),
            message_bytes(max(settings.max_job_bytes, settings.max_body_bytes)),
        ),
    )
    refusable = {
        (prefix + path).encode(): path
        for method, path in app.state.direct
        for prefix in prefixes
        if method == "POST"
    }
    return partial(
        GuardedProtocol,
        limits=limits,
        admission=app.state.shared.admission,
        dialects=app.state.dialects,
        refusable=refusable,
    )


def _operational(scope: MutableMapping[str, Any]) -> bool:
    """Return whether a request is a probe or a scrape, which is not traced."""
    path = str(scope.get("path"))
    return path == "/metrics" or path.startswith(PROBES)


def _document(app: FastAPI) -> None:
    """Add to the OpenAPI document what FastAPI does not see: keys, and the schemas of bodies."""
    schema = app.openapi()
    document_keys(schema)
    for model in (
        ClassifyRequest, TokenizeRequest, LoadRequest, PredictRequest, InferRequest,
        IndexRequest, RepositoryRequest, JobRequest, RollOutRequest,
    ):  # fmt: skip
        described = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schema["components"]["schemas"] |= described.pop("$defs", {}) | {model.__name__: described}
