"""A small HTTP server whose answers a test provides."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any


@contextmanager
def in_thread(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Serve with a handler on a free port, and yield the URL."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


@dataclass(frozen=True)
class Reply:
    """A status, headers and a body; status 0 breaks the connection."""

    status: int
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)


def refusal(status: int, code: str, retry_after: str | None = None) -> Reply:
    """Return an error in the format of the service."""
    error = {"message": f"{code} at input[1]", "type": "x", "param": "input[1]", "code": code}
    headers = {} if retry_after is None else {"Retry-After": retry_after}
    return Reply(status, {"error": error}, headers)


def answer(texts: list[Any]) -> Reply:
    """Return an answer whose labels are the texts; the text "broken" has an error."""
    data = [_item(index, text) for index, text in enumerate(texts)]
    return Reply(200, {"model": "echo:1", "data": data})


def _item(index: int, text: Any) -> dict[str, Any]:
    if text == "broken":
        message = f"input[{index}]: it failed"
        return {"index": index, "error": {"message": message, "code": "item_failed"}}
    label = text if isinstance(text, str) else f"{text['text']}+{text['text_pair']}"
    return {
        "index": index, "label": label, "score": 1.0, "probs": [1.0], "num_classes": 1,
        "labels": [{"label": label, "score": 1.0}],
        "heads": {
            "used": 2, "total": 8, "budget": 1, "predicted": 1, "steps": [0, 1], "per_layer": None,
        },
        "macs": 10, "dense_macs": 100, "tokens": 3, "truncated": False, "quality": "auto",
    }  # fmt: skip


@dataclass
class Scripted:
    """The server, with the bodies and connections of the requests that it got."""

    url: str
    bodies: list[dict[str, Any]]
    connections: set[Any]


@contextmanager
def scripted(reply: Callable[[int, dict[str, Any]], Reply]) -> Iterator[Scripted]:
    """Answer requests with `reply(number, body)`; numbers start at 0."""
    seen = Scripted("", [], set())
    lock = Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self) -> None:  # noqa: N802  # http.server's name
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(seen.bodies)
                seen.bodies.append(body)
                seen.connections.add(self.client_address)
            chosen = reply(number, body)
            if not chosen.status:
                self.close_connection = True
                return
            content = json.dumps(chosen.body).encode()
            self.send_response(chosen.status)
            for name, value in (chosen.headers | {"X-Request-Id": f"request-{number}"}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            pass

    with in_thread(Handler) as seen.url:
        yield seen
