"""Probes and metrics."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request, Response

from service.http.accept import accepted, prefers_openmetrics
from service.http.errors import ApiError, errors_as
from service.http.responses import json_response
from service.http.schemas import ErrorResponse
from service.http.state import State, from_hub, state_of
from service.ipc.control_messages import GetRecentTraffic, Scrape
from service.ipc.hub_client import SILENCE_LIMIT

router = APIRouter(tags=["operations"], responses=errors_as(ErrorResponse))


class Exposition(Response):
    """Metrics, in the format that the request accepts."""

    media_type = "text/plain"


@router.get("/health/live", summary="Is the process alive?")
async def live() -> Response:
    """Answer 200 as long as this process answers at all."""
    return json_response({"status": "ok"})


@router.get("/health/ready", summary="Can it classify now?")
async def ready(request: Request) -> Response:
    """Answer 200 with a warmed default model, a fresh engine heartbeat, and no drain; else 503.

    With the setting `ready_when=all` it takes all models, at first in every engine.
    """
    reason = why_not_ready(state_of(request))
    if reason:
        raise ApiError(503, reason, code="not_ready", retry_after=1)
    return json_response({"status": "ok"})


@router.get(
    "/health",
    summary="The whole picture",
    responses={503: {"description": "The server cannot classify now; `reason` has the cause"}},
)
async def health(request: Request) -> Response:
    """Describe components, engines and models; the status is that of `/health/ready`.

    A component is `ok`, `degraded`, `down`, or `unknown` while the hub is silent.
    """
    state = state_of(request)
    reason = why_not_ready(state)
    now = time.monotonic()
    engines = [
        {
            "index": client.index,
            "alive": client.alive,
            "pid": client.hello.pid if client.hello else None,
            "device": client.hello.device if client.hello else None,
            "heartbeat_age_seconds": round(now - client.last_seen, 3) if client.last_seen else None,
            "in_flight_items": client.items_in_flight,
            "models": [f"{name}:{version}" for name, version in sorted(client.models)],
        }
        for client in state.engines.clients
    ]
    content: dict[str, Any] = {
        "status": "ok" if reason is None else "unavailable",
        "reason": reason,
        "models": [f"{name}:{version}" for name, version in sorted(state.engines.models)],
        "errors": _errors(state),
        "crash_loops": list(state.hub.catalog.crash_loops.values()),
        "components": _components(state, now),
        "engines": engines,
    }
    return json_response(content, 200 if reason is None else 503)


@router.get("/metrics", summary="Prometheus metrics", response_class=Exposition)
async def metrics(request: Request) -> Response:
    """Expose all series, as Prometheus text or OpenMetrics, whichever is accepted."""
    return await query_hub(request, Scrape(0, prefers_openmetrics(accepted(request))))


async def query_hub(request: Request, query: Scrape | GetRecentTraffic) -> Response:
    """Return the answer of the hub to a query.

    Raises:
        ApiError: see `from_hub`.
    """
    answer = await from_hub(state_of(request).hub.query(query))
    return Response(answer.content, media_type=answer.media_type)


def _components(state: State, now: float) -> dict[str, Any]:
    hub, frontends = state.hub, state.settings.fronts
    silent = hub.silent_seconds > SILENCE_LIMIT
    heartbeat = None if silent else hub.heartbeat
    tasks = {} if heartbeat is None else heartbeat.tasks
    alive, engines = len(state.engines.alive), len(state.engines.clients)
    return {
        "hub": {
            "status": "down" if silent else "ok",
            "last_word_age_seconds": round(now - hub.last_seen, 3),
        },
        "supervisor": {
            "status": "unknown"
            if heartbeat is None
            else "degraded"
            if any(tasks.values())
            else "ok",
            "tasks": {name: why or "ok" for name, why in tasks.items()},
        },
        "engines": {"status": _share(alive, engines), "alive": alive, "configured": engines},
        "frontends": {
            "status": "unknown" if heartbeat is None else _share(heartbeat.frontends, frontends),
            "connected": None if heartbeat is None else heartbeat.frontends,
            "configured": frontends,
        },
    }


def _share(running: int, configured: int) -> str:
    if running >= configured > 0:
        return "ok"
    return "degraded" if running else "down"


def _errors(state: State) -> list[str]:
    silent = state.hub.silent_seconds
    stalled = (
        [f"the supervisor has been silent for {silent:.0f} s"] if silent > SILENCE_LIMIT else []
    )
    return [*state.hub.catalog.errors, *stalled]


def why_not_ready(state: State) -> str | None:
    """Return why this server cannot classify now; None: it can."""
    if state.admission.draining:
        return "the server is shutting down"
    catalog = state.hub.catalog
    if state.models.default is None:
        return "no model is served: " + ("; ".join(catalog.errors) or "the store is empty")
    engines = [why for name, why in catalog.crash_loops.items() if name.startswith("engine-")]
    if engines and len(engines) >= len(state.engines.clients):
        return "; ".join(engines)
    if not state.engines.alive:
        return "no engine is running"
    served = state.models.served.get(state.models.default)
    if served is None:
        return f"the default model {state.models.default} is not served"
    checkpoint = served.checkpoint
    if (checkpoint.name, checkpoint.version) not in state.engines.models:
        return "; ".join(catalog.errors) or f"{checkpoint.label} is still loading"
    return _why_not_all(state) if state.settings.ready_when == "all" else None


def _why_not_all(state: State) -> str | None:
    catalog, loaded = state.hub.catalog, state.engines.models
    missing = [f"{m.name}:{m.version}" for m in catalog.models if (m.name, m.version) not in loaded]
    if missing:
        return "; ".join(catalog.errors) or f"still loading: {', '.join(sorted(missing))}"
    if state.hub.heartbeat is None or not state.hub.heartbeat.equipped:
        return "; ".join(catalog.crash_loops.values()) or "an engine is still loading models"
    return None
