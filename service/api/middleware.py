"""Around every request.

Its id, its outcome, its duration. Plain ASGI, so that nothing is buffered.
"""

from __future__ import annotations

import re
import time
import uuid

import structlog
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.errors import CLIENT_GONE, ApiError, ClientGoneError
from service.observability.metrics import REASONS, Metrics

log = structlog.get_logger()

_SOUND_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
OTHER = "other"
_REFUSALS = {"body_too_large": "too_large", "too_many_items": "too_large"}


class Observe:
    """Name, time and count every request."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.monotonic()
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        request_id = given if _SOUND_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        status, begun = 500, False

        async def send_named(message: Message) -> None:
            nonlocal status, begun
            if message["type"] == "http.response.start":
                status, begun = message["status"], True
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            await self.app(scope, receive, send_named)
        except ClientGoneError:
            status = CLIENT_GONE
            self.metrics.cancelled.inc()
        except Exception as error:  # the last stop: whatever it is, the client gets its answer
            log.error("unexpected error", request_id=request_id, exc_info=error)
            if begun:
                raise
            response = ApiError(
                500, "something went wrong in the server; its log says what"
            ).response(scope["state"])
            await response(scope, receive, send_named)
        finally:
            self._count(scope, status, time.monotonic() - started, request_id)

    def _count(self, scope: Scope, status: int, seconds: float, request_id: str) -> None:
        route = getattr(scope.get("route"), "path", OTHER)
        outcome = scope.get("outcome") or _outcome(status)
        refusal = str(scope.get("refusal"))
        reason = _REFUSALS.get(refusal, refusal)
        if reason in REASONS:
            self.metrics.rejected.labels(reason).inc()
        if status == 504:
            self.metrics.deadline_exceeded.inc()
        self.metrics.requests.labels(route, outcome).inc()
        self.metrics.request_duration.labels(route).observe(seconds)
        log.debug(
            "request",
            route=route,
            status=status,
            ms=round(seconds * 1000, 2),
            request_id=request_id,
        )


def _outcome(status: int) -> str:
    if status < 400:
        return "ok"
    if status in (CLIENT_GONE, 504):
        return "cancelled" if status == CLIENT_GONE else "timeout"
    if status in (413, 429):
        return "rejected"
    return "invalid" if status < 500 else "error"
