"""A full server refuses requests without reading their bodies."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.processes import Server, server
from tests.support.stores import TOPICS, sentences
from tests.support.waiting import wait_until

pytestmark = pytest.mark.timeout(300)

MANY = 20_000
PATIENCE = 60
TEXT = sentences("music")[0]


@pytest.fixture(scope="module")
def running(model_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    options = {
        "default_model": TOPICS,
        "models": TOPICS,
        "max_queue_items": "8",
        "max_batch_items": str(MANY),
        "timeout_ms": "120000",
    }
    with server(model_store, tmp_path_factory.mktemp("full"), engines=1, **options) as running:
        yield running


def post(running: Server, path: str = "/classify", **body: Any) -> httpx.Response:
    return httpx.post(f"{running.url}{path}", json=body, timeout=2 * PATIENCE)


def read_answer(it: socket.socket) -> tuple[int, dict[str, str], dict[str, Any]]:
    """Read one answer from a connection that stays open."""
    received = b""
    while b"\r\n\r\n" not in received:
        received += it.recv(65536)
    head, _, body = received.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    while len(body) < int(headers["content-length"]):
        body += it.recv(65536)
    return int(status.split()[1]), headers, json.loads(body)


@contextmanager
def filled(running: Server) -> Iterator[list[httpx.Response]]:
    """Keep a server full with large requests; yield their answers."""
    answers: list[httpx.Response] = []
    done = threading.Event()

    def ask_on() -> None:
        while not done.is_set():
            answers.append(post(running, input=[TEXT] * MANY))

    asking = threading.Thread(target=ask_on, daemon=True)
    asking.start()
    try:
        yield answers
    finally:
        done.set()
        asking.join(2 * PATIENCE)


@contextmanager
def connected(running: Server) -> Iterator[socket.socket]:
    port = httpx.URL(running.url).port or 0
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as it:
        yield it


SMALL = json.dumps({"input": [TEXT] * 4}).encode()


def head(path: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", "X-Request-Id: mine"]
    return "\r\n".join([*lines, f"Content-Length: {len(SMALL)}\r\n\r\n"]).encode()


def refused_unread(running: Server, path: str) -> tuple[int, dict[str, str], dict[str, Any]] | None:
    """Send only the head of a request, and return an early refusal; then send the rest."""
    post(running, input=[TEXT] * 4)  # if this is refused, the server sheds the next ones
    with connected(running) as it:
        it.sendall(head(path))
        it.settimeout(0.5)
        try:
            answer = read_answer(it)
        except TimeoutError:  # the server waits for the body
            return None
        it.settimeout(PATIENCE)
        it.sendall(SMALL + b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        assert read_answer(it)[0] == 200
    return answer


def test_a_full_server_refuses_requests_by_their_heads(running: Server) -> None:
    before = running.scrape()
    refusals: dict[str, tuple[int, dict[str, str], dict[str, Any]]] = {}

    def is_refused(path: str) -> bool:
        answer = refused_unread(running, path)
        if answer is not None:
            refusals[path] = answer
        return answer is not None

    with filled(running) as answers:
        for path in ("/classify", "/predict"):
            wait_until(lambda path=path: is_refused(path), f"a refusal at {path}")  # type: ignore[misc]
    for path, (status, headers, _) in refusals.items():
        assert status == 429, path
        assert int(headers["retry-after"]) >= 1
        assert headers["x-request-id"] == "mine"
        assert headers["x-content-type-options"] == "nosniff"
    assert refusals["/classify"][2]["error"]["code"] == "queue_full"
    assert refusals["/predict"][2]["error_type"] == "overloaded"
    assert {answer.status_code for answer in answers} <= {200, 429}
    assert post(running, input=[TEXT] * 4).status_code == 200
    after = running.scrape()
    for route in refusals:
        assert after.minus(before, "requests_total", route=route, outcome="rejected") >= 1
    assert after.minus(before, "rejected_total", reason="queue_full") >= len(refusals)
