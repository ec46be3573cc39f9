"""Middleware of all requests: id, trace, metrics, log line, security headers, unexpected errors.

It is plain ASGI, which does not buffer responses.
"""

from __future__ import annotations

import random
import re
import time
from dataclasses import dataclass

import structlog
from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.http.dialects import Dialects
from service.http.errors import CLIENT_GONE, ApiError, ClientGoneError
from service.http.state import State
from service.telemetry.context import RequestContext, serving
from service.telemetry.counts import DENIALS, REASONS

log = structlog.get_logger()

_VALID_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
OTHER = "other"
PROBES = ("/health", "/v2/health", "/ping")
"""Prefixes of the paths of probes, whose 503 is an answer and not logged as an error."""
_REFUSALS = {
    "body_too_large": "too_large",
    "too_many_items": "too_large",
    "too_many_requests": "rate",
}
SECURITY_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
)
_HSTS = (b"strict-transport-security", b"max-age=31536000")


_ADDED = ("route", "outcome", "refusal")
"""Entries that the application adds to the scope of a request for `Observe`."""
_PATHSEND = "http.response.pathsend"
"""ASGI extension: the application sends the path of a file instead of its content."""
_W3C = TraceContextTextMapPropagator()


def name_request(given: bytes) -> str:
    """Return the id of a request: that of the client if it is valid, or a new one."""
    text = given.decode("latin-1")
    # Ids are unique but not secret, so `random` is sufficient.
    return text if _VALID_ID.fullmatch(text) else f"{random.getrandbits(128):032x}"


class Observe:
    """Give every request an id, measure, count and log it, and answer unexpected errors.

    Args:
        app: application.
        state: state of the frontend.
        dialects: error responses.
    """

    def __init__(self, app: ASGIApp, state: State, dialects: Dialects) -> None:
        self.app = app
        self.state = state
        self.counts = state.hub.counts
        self.admission = state.admission
        self.dialects = dialects

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        request_id = name_request(headers.get(b"x-request-id", b""))
        scope.setdefault("state", {})["request_id"] = request_id
        with serving(RequestContext(request_id, _traceparent(scope, headers))):
            await self._serve(scope, receive, send, request_id)

    async def _serve(self, scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
        started = time.monotonic()
        status, begun = 500, False
        added = [*SECURITY_HEADERS, (b"x-request-id", request_id.encode())]
        if scope.get("scheme") == "https":
            added.append(_HSTS)

        async def send_named(message: Message) -> None:
            nonlocal status, begun
            if message["type"] == "http.response.start":
                status, begun = message["status"], True
                headers = list(message.get("headers", ()))
                given = {name.lower() for name, _ in headers}
                message["headers"] = headers + [one for one in added if one[0] not in given]
            await send(message)

        try:
            await self.app(scope, receive, send_named)
        except ClientGoneError:
            status = CLIENT_GONE
        except Exception as error:  # the client always gets a response
            log.error("unexpected error", exc_info=error)
            if begun:
                # A new exception, because the message of the first may hold a text.
                raise ConnectionAbortedError("the answer was cut off") from None
            internal = ApiError(500, "internal error; the server's log has the cause")
            response = self.dialects.response(scope["method"], scope["path"], internal)
            await response(scope, receive, send_named)
        finally:
            self.admission.end(scope["state"])
            self._count(scope, status, time.monotonic() - started)

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        route = str(scope.get("label") or getattr(scope.get("route"), "path", OTHER))
        outcome = scope.get("outcome") or _outcome(status)
        refusal = str(scope.get("refusal"))
        reason = _REFUSALS.get(refusal, refusal)
        refused = reason in REASONS
        if refused:
            outcome = "rejected"
        caller = scope["state"].get("caller")
        name = "" if caller is None else caller.name
        served = scope["state"].get("served")
        self.counts.request_ended(
            route,
            outcome,
            seconds,
            refusal=reason if refused else "",
            denial=refusal if refusal in DENIALS else "",
            caller=name,
            served=served and (served.name, served.version),
        )
        names = {"key": name} if name else {}
        if scope.get("client"):
            names["client"] = scope["client"][0]
        failed = outcome == "error" and not scope["path"].startswith(PROBES)
        refused_admin = 400 <= status < 500 and scope["state"].get("scope") == "admin"
        chosen = failed or refused_admin or random.random() < self.state.settings.access_log
        write = log.info if chosen else log.debug
        milliseconds = round(seconds * 1000, 2)
        write("request", route=route, status=status, outcome=outcome, ms=milliseconds, **names)


@dataclass(frozen=True)
class Head:
    """Answer HEAD like GET, without the body."""

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self.app(scope, receive, send)
            return

        async def send_head(message: Message) -> None:
            if message["type"] == _PATHSEND:
                message = {"type": "http.response.body"}
            elif message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        # Uvicorn reads the method from its scope, so it must not change there.
        get_scope = {
            **scope,
            "method": "GET",
            # Only GET has ranges (RFC 9110, 14.2).
            "headers": [one for one in scope["headers"] if one[0] != b"range"],
            # Files are then passed as paths, which nobody reads.
            "extensions": {**scope.get("extensions", {}), _PATHSEND: {}},
        }
        await self.app(get_scope, receive, send_head)
        scope.update({name: get_scope[name] for name in _ADDED if name in get_scope})


@dataclass(frozen=True)
class OperationsPort:
    """Serve metrics only on a second port, and nothing else there except probes.

    Attributes:
        app: application.
        port: second port.
        dialects: error responses.
    """

    app: ASGIApp
    port: int
    dialects: Dialects

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or answer 404 on the wrong port."""
        if scope["type"] == "http":
            path = scope["path"]
            second = (scope.get("server") or ("", None))[1] == self.port
            served = path == "/metrics" or path.startswith(PROBES) if second else path != "/metrics"
            if not served:
                error = ApiError(404, f"there is no route {path} on this port")
                response = self.dialects.response(scope["method"], path, error)
                await response(scope, receive, send)
                return
        await self.app(scope, receive, send)


def _traceparent(scope: Scope, headers: dict[bytes, bytes]) -> str:
    """Return the W3C trace context of the current span, or else of the client; empty: none."""
    span = trace.get_current_span()
    context = span.get_span_context()
    if context.is_valid:
        if "label" in scope:
            span.set_attribute("budgetformer.call", scope["label"])
        if scope["query_string"]:  # it may hold a text
            span.set_attribute("url.query", "REDACTED")
    elif b"traceparent" in headers:
        carrier = {"traceparent": headers[b"traceparent"].decode("latin-1")}
        context = trace.get_current_span(_W3C.extract(carrier)).get_span_context()
    if not context.is_valid:
        return ""
    ids = trace.format_trace_id(context.trace_id), trace.format_span_id(context.span_id)
    return f"00-{ids[0]}-{ids[1]}-{context.trace_flags:02x}"


def _outcome(status: int) -> str:
    if status < 400:
        return "ok"
    if status in (CLIENT_GONE, 504):
        return "cancelled" if status == CLIENT_GONE else "timeout"
    if status in (413, 429):
        return "rejected"
    return "invalid" if status < 500 else "error"
