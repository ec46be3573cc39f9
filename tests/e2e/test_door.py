"""What a full server refuses unread, over real connections."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
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
    with server(model_store, tmp_path_factory.mktemp("full"), engines=1, **options) as it:
        yield it


def post(running: Server, path: str = "/classify", **body: Any) -> httpx.Response:
    return httpx.post(f"{running.url}{path}", json=body, timeout=2 * PATIENCE)


def read_answer(it: socket.socket) -> tuple[int, dict[str, str], dict[str, Any]]:
    """Read one answer of a connection that stays open."""
    received = b""
    while b"\r\n\r\n" not in received:
        received += it.recv(65536)
    head, _, body = received.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    while len(body) < int(headers["content-length"]):
        body += it.recv(65536)
    return int(status.split()[1]), headers, json.loads(body)


def test_what_would_be_refused_is_refused_unread(running: Server) -> None:
    answers: list[httpx.Response] = []
    large = threading.Thread(
        target=lambda: answers.append(post(running, input=[TEXT] * MANY, quality="best")),
        daemon=True,
    )
    before = running.scrape()
    large.start()
    # From now on there is no room, and the door learns it from the first who is refused.
    wait_until(lambda: post(running, input=[TEXT] * 4).status_code == 429, "a full server")
    content = json.dumps({"input": [TEXT] * 4}).encode()
    head = b"POST %s HTTP/1.1\r\nHost: x\r\nX-Request-Id: mine\r\nContent-Length: %d\r\n\r\n"
    with socket.create_connection(
        ("127.0.0.1", httpx.URL(running.url).port or 0), timeout=PATIENCE
    ) as it:
        it.sendall(head % (b"/classify", len(content)))  # its body never came
        status, headers, told = read_answer(it)
        assert (status, told["error"]["code"]) == (429, "queue_full")
        assert int(headers["retry-after"]) >= 1
        assert headers["x-request-id"] == "mine"
        assert headers["x-content-type-options"] == "nosniff"
        it.sendall(content)  # now it comes, and the connection serves on
        it.sendall(head % (b"/predict", len(content)) + content)
        status, _, told = read_answer(it)
        assert (status, told["error_type"]) == (429, "overloaded")
        it.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        assert read_answer(it)[0] == 200
    assert not answers, "the large request has ended too early for this test to mean anything"
    # A browser's page, and a body that is broken, are read: the one to be told, the other too.
    page = httpx.post(
        f"{running.url}/classify", content=content, headers={"Origin": "http://here"}, timeout=60
    )
    assert page.status_code == 429
    assert httpx.post(f"{running.url}/classify", content=b"{", timeout=60).status_code == 400
    large.join(2 * PATIENCE)
    assert answers[0].status_code == 200
    assert len(answers[0].json()["data"]) == MANY
    assert post(running, input=[TEXT] * 4).status_code == 200
    after = running.scrape()
    refused = after.minus(before, "rejected_total", reason="queue_full")
    counted = after.minus(before, "requests_total", route="/classify", outcome="rejected")
    assert counted >= 3
    assert refused == counted + after.minus(
        before, "requests_total", route="/predict", outcome="rejected"
    )
