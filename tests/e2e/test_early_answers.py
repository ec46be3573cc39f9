"""An early answer reaches clients that read only after sending their whole request."""

from __future__ import annotations

import json
import socket
import ssl
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from tests.support.processes import Server, free_port, server
from tests.support.stores import TOPICS
from tests.support.waiting import wait_until

pytestmark = pytest.mark.timeout(300)

PATIENCE = 60
SIZE = 64 * 2**20
JSON = b"Host: x\r\nContent-Type: application/json\r\n"
LENGTH = b"Content-Length: %d\r\n\r\n" % SIZE
EARLY = {
    400: b"POST /classify HTTP/1.1\r\n" + JSON + b"Transfer-Encoding: chunked\r\n\r\nno size\r\n",
    401: b"POST /models/a/load HTTP/1.1\r\n" + JSON + b"X-API-Key: wrong\r\n" + LENGTH,
    404: b"POST /nowhere HTTP/1.1\r\n" + JSON + LENGTH,
    405: b"POST /docs HTTP/1.1\r\n" + JSON + LENGTH,
    413: b"POST /classify HTTP/1.1\r\n" + JSON + LENGTH,
    415: b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Type: text/csv\r\n" + LENGTH,
    431: b"POST /classify HTTP/1.1\r\nX-Long: ",
}
CHUNKED = b"POST /classify HTTP/1.1\r\n" + JSON + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % SIZE


def answer_to(it: socket.socket, begun: bytes) -> int:
    """Send 64 MB without reading, then read to the end; return the status of the only answer."""
    it.sendall(begun + b"a" * SIZE)
    received = b""
    while part := it.recv(65536):
        received += part
    head, _, body = received.partition(b"\r\n\r\n")
    assert b"connection: close" in head.split(b"\r\n")
    assert json.loads(body)["error"]["message"]
    return int(head.split()[1])


def plain(running: Server) -> socket.socket:
    port = httpx.URL(running.address).port
    return socket.create_connection(("127.0.0.1", port or 0), timeout=PATIENCE)


@pytest.mark.parametrize("status", EARLY)
def test_early_answers_arrive_over_tcp(running: Server, status: int) -> None:
    with plain(running) as it:
        assert answer_to(it, EARLY[status]) == status


def test_early_answers_arrive_during_a_chunk(running: Server) -> None:
    with plain(running) as it:
        assert answer_to(it, CHUNKED) == 413


@pytest.fixture(scope="module")
def secure(
    certificate: Path, model_store: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    port = free_port()
    options = {
        "tls_cert": str(certificate / "chain.pem"),
        "tls_key": str(certificate / "key.pem"),
        "metrics_port": str(port),
        "models": TOPICS,
        "max_connections": "4",
        "admin_key": "open-sesame",
    }
    folder = tmp_path_factory.mktemp("secure")
    probes = f"http://127.0.0.1:{port}"
    with server(model_store, folder, engines=1, probes=probes, **options) as running:
        yield running


@pytest.fixture(scope="module")
def context(certificate: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=certificate / "chain.pem")


@pytest.mark.parametrize("status", [400, 401, 413, 431])
def test_early_answers_arrive_over_tls(
    secure: Server, context: ssl.SSLContext, status: int
) -> None:
    with context.wrap_socket(plain(secure), server_hostname="127.0.0.1") as it:
        assert answer_to(it, EARLY[status]) == status


def test_handshakes_count_as_connections(secure: Server, context: ssl.SSLContext) -> None:
    def ask() -> int:
        url = secure.address.replace("http:", "https:")
        return httpx.get(f"{url}/health/live", verify=context, timeout=PATIENCE).status_code

    wait_until(lambda: ask() == 200, "room", PATIENCE)
    before = secure.scrape()
    with ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(plain(secure))
        wait_until(lambda: ask() == 503, "the limit", PATIENCE)
    assert secure.scrape().minus(before, "broken_connections_total", reason="too_many") >= 1
    wait_until(lambda: ask() == 200, "room", PATIENCE)
