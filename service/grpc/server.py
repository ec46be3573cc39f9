"""The gRPC server of a frontend, on a port that it shares with the other frontends.

Every call is a request to the frontend's application (`calls.py`), so keys, limits, deadlines,
metrics and traces are those of HTTP.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import grpc
from fastapi import FastAPI

from service.grpc.application import serve_request
from service.grpc.calls import CALLS, Call, HttpRequest
from service.grpc.messages import Message, decode, messages_of
from service.http.bodies import max_values
from service.http.errors import ApiError
from service.http.kserve import MAX_TOKEN_VALUES
from service.settings import Settings

IDLE_SECONDS = 75
"""How long a connection without calls stays open."""
MAX_OPTION = 2**31 - 1
"""Highest integer that gRPC accepts as an option."""
STATUSES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    415: grpc.StatusCode.INVALID_ARGUMENT,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    499: grpc.StatusCode.CANCELLED,
    500: grpc.StatusCode.INTERNAL,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
"""The gRPC status for each HTTP status of an error."""
_REQUEST_HEADERS = ("authorization", "x-api-key", "x-request-id", "traceparent", "tracestate")
"""Metadata of a call that become headers of the request."""
_RESPONSE_HEADERS = ("x-request-id", "x-quality", "server-timing", "retry-after")
"""Headers of the response that become trailing metadata of the call."""


class InferenceServer:
    """Answer KServe's calls and health checks with the application of a frontend.

    Args:
        settings: settings of the server, with `grpc_port` set.
    """

    labels = tuple(call.label for call in CALLS)
    """Names of the calls in metrics and logs."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    async def start(self, app: FastAPI) -> None:
        """Begin to accept connections.

        Args:
            app: application that answers the calls.

        Raises:
            RuntimeError: the port cannot be bound.
        """
        settings = self._settings
        self._app = app
        self._max_values = max_values(app.state.shared) + MAX_TOKEN_VALUES
        # Created here and not in the constructor: it uses the event loop that runs now.
        options = {
            "grpc.so_reuseport": 1,
            "grpc.max_receive_message_length": settings.max_body_bytes,
            "grpc.max_metadata_size": settings.max_header_bytes,
            "grpc.absolute_max_metadata_size": settings.max_header_bytes,
            "grpc.max_connection_idle_ms": IDLE_SECONDS * 1000,
            "grpc.server_handshake_timeout_ms": math.ceil(settings.receive_seconds * 1000),
        }
        self._server = grpc.aio.server(
            options=[(name, min(value, MAX_OPTION)) for name, value in options.items()],
            maximum_concurrent_rpcs=settings.max_connections,
        )
        for service, calls in groupby(CALLS, lambda call: call.service):
            # As a stream of one message, so that `_receive` can limit the time for the message.
            handlers = {
                call.method: grpc.stream_unary_rpc_method_handler(partial(self._serve, call))
                for call in calls
            }
            handler = grpc.method_handlers_generic_handler(service, handlers)
            self._server.add_generic_rpc_handlers((handler,))
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        address = f"{host}:{settings.grpc_port}"
        if settings.tls_cert is None:
            self._server.add_insecure_port(address)
        else:
            self.renew_certificates(settings)
            # gRPC calls the lambda for each new connection.
            credentials = grpc.dynamic_ssl_server_credentials(
                self._certificates,
                lambda: self._certificates,
                require_client_authentication=settings.tls_client_ca is not None,
            )
            self._server.add_secure_port(address, credentials)
        await self._server.start()

    def renew_certificates(self, settings: Settings) -> None:
        """Read the certificates again, for new connections.

        Raises:
            OSError: a file cannot be read; the old certificates stay in use.
        """
        if settings.tls_cert is not None:
            self._certificates = _certificates(settings)

    async def stop(self) -> None:
        """Accept no more calls, and wait for running calls, up to `drain_seconds`."""
        await self._server.stop(self._settings.drain_seconds)

    async def _serve(self, call: Call, messages: AsyncIterator[bytes], context: Any) -> bytes:
        message = None
        try:
            message = await self._receive(call, messages)
            request = call.to_http(message, self._seconds(context))
        except ApiError as error:
            # The application raises it on reading the body, so the key is checked before, and the
            # call is counted.
            request = HttpRequest("POST", "/v2/models/-/infer", refusal=error)
        metadata = {
            name: v for name, v in context.invocation_metadata() if name in _REQUEST_HEADERS
        }
        response = await serve_request(self._app, request, call.label, metadata, context.peer())
        headers = response.headers
        trailing = tuple((name, headers[name]) for name in _RESPONSE_HEADERS if name in headers)
        if response.status not in call.statuses or request.refusal is not None:
            status = STATUSES.get(response.status, grpc.StatusCode.UNKNOWN)
            await context.abort(status, response.json()["error"], trailing)
        context.set_trailing_metadata(trailing)
        return call.encode(response, message)

    async def _receive(self, call: Call, messages: AsyncIterator[bytes]) -> Message:
        seconds = self._settings.receive_seconds
        try:
            async with asyncio.timeout(seconds):
                data = await anext(messages)
        except TimeoutError:
            text = f"the message did not arrive in {seconds:g} s"
            raise ApiError(408, text, code="request_timeout") from None
        except StopAsyncIteration:
            raise ApiError(400, "the call has no message", code="invalid_message") from None
        kind, _ = messages_of(call.service, call.method)
        return decode(kind, data, self._max_values)

    def _seconds(self, context: Any) -> float | None:
        """Return the seconds to the deadline of a call, at most `max_timeout_ms`; None: none."""
        left: float | None = context.time_remaining()
        return None if left is None else min(left, self._settings.max_timeout_ms / 1000)


def _certificates(settings: Settings) -> Any:
    """Read the certificates into gRPC's configuration.

    Raises:
        OSError: a file cannot be read.
    """

    def read(path: Path | None) -> bytes | None:
        return None if path is None else path.read_bytes()

    pair = (read(settings.tls_key), read(settings.tls_cert))
    return grpc.ssl_server_certificate_configuration([pair], read(settings.tls_client_ca))
