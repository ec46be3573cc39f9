"""Call the ASGI application with one request, as an HTTP server does."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

from starlette.types import ASGIApp, Message

from service.grpc.calls import HttpRequest, HttpResponse

_running: set[asyncio.Task[None]] = set()
"""References to running requests, which go on for a moment after their caller has disconnected."""


async def serve_request(
    app: ASGIApp, request: HttpRequest, label: str, metadata: Mapping[str, str], peer: str
) -> HttpResponse:
    """Return the application's response to a request.

    If this call is cancelled, the application gets `http.disconnect`.

    Args:
        app: application.
        request: request to answer.
        label: name of the request in metrics and logs, in place of its route.
        metadata: headers in addition to those of the request.
        peer: address of the client, as gRPC writes it.
    """
    gone = asyncio.Event()
    sent = False
    response: dict[str, Any] = {"status": 500, "headers": {}, "body": b""}

    async def receive() -> Message:
        nonlocal sent
        if request.refusal is not None:
            raise request.refusal
        if not sent:
            sent = True
            return {"type": "http.request", "body": request.body, "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            response["status"] = message["status"]
            response["headers"] = {
                name.lower().decode(): value.decode("latin-1") for name, value in message["headers"]
            }
        else:
            response["body"] += message.get("body", b"")

    headers = {**metadata, **request.headers, "content-length": str(len(request.body))}
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "2",
        "method": request.method,
        "scheme": "http",
        "path": request.path,
        "raw_path": request.path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in headers.items()],
        "client": _address(peer),
        "server": None,
        "state": {},
        "label": label,
    }
    serving = asyncio.ensure_future(app(scope, receive, send))
    _running.add(serving)
    serving.add_done_callback(_running.discard)
    try:
        await asyncio.shield(serving)
    except asyncio.CancelledError:
        gone.set()
        raise
    return HttpResponse(**response)


def _address(peer: str) -> tuple[str, int] | None:
    """Return the address in `ipv4:127.0.0.1:5000` or `ipv6:%5B::1%5D:5000`."""
    host, _, port = unquote(peer).partition(":")[2].rpartition(":")
    return (host.strip("[]"), int(port)) if port.isdecimal() else None
