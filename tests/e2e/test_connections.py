"""Slow, large, malformed and too many connections to a real server, proxies, ports and TLS."""

from __future__ import annotations

import gzip
import json
import socket
import ssl
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.http.lingering import LINGER_BYTES
from tests.support.exposition import Exposition
from tests.support.processes import Server, free_port, server
from tests.support.programs import program
from tests.support.stores import TOPICS
from tests.support.waiting import wait_until

pytestmark = pytest.mark.timeout(300)

CONNECTIONS = 24
HEAD = b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
PATIENCE = 30


@pytest.fixture(scope="module")
def running(model_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    options = {
        "default_model": TOPICS,
        "models": TOPICS,
        "max_connections": str(CONNECTIONS),
        "max_header_bytes": "4096",
        "max_body_bytes": "100000",
        "receive_seconds": "1",
        "access_log": "1",
    }
    with server(model_store, tmp_path_factory.mktemp("guarded"), engines=1, **options) as running:
        yield running


@contextmanager
def connection(running: Server) -> Iterator[socket.socket]:
    port = httpx.URL(running.url).port
    with socket.create_connection(("127.0.0.1", port or 0), timeout=PATIENCE) as it:
        yield it


def read_to_end(it: socket.socket) -> bytes:
    """Read until the server closes or resets the connection."""
    received = b""
    try:
        while part := it.recv(65536):
            received += part
    except ConnectionResetError:
        pass
    return received


def refusal(answer: bytes) -> tuple[int, dict[str, Any]]:
    """Return the status and the error of an answer, and check its headers and its shape."""
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["content-type"] == "application/json"
    assert headers["x-request-id"]
    assert int(headers["content-length"]) == len(body)
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return int(status.split()[1]), error


def assert_serving(running: Server) -> None:
    """Check that a valid request is still answered."""
    response = httpx.post(f"{running.url}/classify", json={"input": "a"}, timeout=PATIENCE)
    assert response.status_code == 200


class TestSlowClients:
    @pytest.mark.parametrize(
        "begun",
        [b"", b"\r\n", b"P", b"POST /classify HTTP/1.1\r\nHost: x\r\nX-Header: a"],
        ids=["nothing", "empty lines", "a letter", "half a head"],
    )
    def test_an_incomplete_head_times_out(self, running: Server, begun: bytes) -> None:
        before = running.scrape()
        with connection(running) as it:
            it.sendall(begun)
            status, _ = refusal(read_to_end(it))
        assert status == 408
        assert running.scrape().minus(before, "broken_connections_total", reason="slow") == 1
        assert_serving(running)

    def test_a_head_sent_byte_by_byte_times_out(self, running: Server) -> None:
        with connection(running) as it:
            received = _drip(it, b"GET /health/live HTTP/1.1\r\nX: " + b"a" * 2000, 0.05)
        assert refusal(received)[0] == 408

    def test_a_second_head_on_a_connection_times_out(self, running: Server) -> None:
        with connection(running) as it:
            it.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
            assert it.recv(65536).startswith(b"HTTP/1.1 200")
            assert refusal(_drip(it, b"\r\n" * 1000, 0.05))[0] == 408

    def test_an_incomplete_body_times_out(self, running: Server) -> None:
        with connection(running) as it:
            it.sendall(HEAD + b'Content-Length: 1000\r\n\r\n{"input": ')
            status, error = refusal(read_to_end(it))
        assert (status, error["code"]) == (408, "request_timeout")
        assert_serving(running)

    def test_a_body_sent_in_small_chunks_times_out(self, running: Server) -> None:
        with connection(running) as it:
            it.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
            received = _drip(it, b"1\r\n \r\n" * 1000, 0.01)
        assert refusal(received)[0] == 408

    def test_many_slow_clients_block_others_only_briefly(self, running: Server) -> None:
        with ExitStack() as stack:
            for _ in range(CONNECTIONS):
                stack.enter_context(connection(running)).sendall(b"POST /cl")
            wait_until(lambda: _answers(running), "room for a valid request", PATIENCE)


def _answers(running: Server) -> bool:
    try:
        response = httpx.post(f"{running.url}/classify", json={"input": "a"}, timeout=PATIENCE)
    except httpx.TransportError:
        return False
    return response.status_code == 200


def _send_for_ever(it: socket.socket) -> None:
    while True:
        it.sendall(b" " * 2**10)
        time.sleep(0.005)


def _drip(it: socket.socket, data: bytes, pause: float) -> bytes:
    """Send byte by byte until the server answers, and return all that it sends."""
    it.settimeout(pause)
    received = b""
    for byte in data:
        try:
            it.sendall(bytes([byte]))
            received += it.recv(65536)
        except TimeoutError:
            continue
        except (BrokenPipeError, ConnectionResetError):
            break
        break
    it.settimeout(PATIENCE)
    return received + read_to_end(it)


class TestLargeRequests:
    @pytest.mark.parametrize(
        "head",
        [
            b"GET /health/live HTTP/1.1\r\nX-Large: " + b"a" * 5000 + b"\r\n\r\n",
            b"GET /health/live HTTP/1.1\r\n" + b"A: b\r\n" * 1000 + b"\r\n",
            b"GET /" + b"a" * 5000 + b" HTTP/1.1\r\n\r\n",
            b"GET /health/live?" + b"a" * 5000 + b" HTTP/1.1\r\n\r\n",
        ],
        ids=["one header", "many headers", "path", "query"],
    )
    def test_a_large_head_is_refused(self, running: Server, head: bytes) -> None:
        before = running.scrape()
        with connection(running) as it:
            it.sendall(head)
            status, error = refusal(read_to_end(it))
        assert (status, error["type"]) == (431, "headers_too_large")
        grown = running.scrape().minus(before, "broken_connections_total", reason="head_too_large")
        assert grown == 1

    @pytest.mark.parametrize(
        "begun",
        [
            b"GET /health/live HTTP/1.1\r\nX-Large: ",
            HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\nX-Trailer: ",
            HEAD + b"Transfer-Encoding: chunked\r\n\r\n1;extension=",
        ],
        ids=["header", "trailer", "extension of a chunk"],
    )
    def test_an_endless_head_is_cut_off(self, running: Server, begun: bytes) -> None:
        sent = 0
        with connection(running) as it:
            it.sendall(begun)
            try:
                while sent < 2 * LINGER_BYTES:
                    it.sendall(b"a" * 2**16)
                    sent += 2**16
            except (BrokenPipeError, ConnectionResetError):
                pass
        assert sent < LINGER_BYTES + 32 * 2**20
        assert_serving(running)

    def test_a_large_body_is_answered_before_it_is_sent(self, running: Server) -> None:
        with connection(running) as it:
            it.sendall(HEAD + b"Content-Length: 1000000000\r\n\r\n")
            status, error = refusal(read_to_end(it))
        assert (status, error["code"]) == (413, "body_too_large")

    def test_a_client_that_continues_to_send_is_cut_off(self, running: Server) -> None:
        with connection(running) as it:
            it.sendall(HEAD + b"Content-Length: 1000000000000\r\n\r\n")
            with pytest.raises((BrokenPipeError, ConnectionResetError)):
                _send_for_ever(it)
        assert_serving(running)

    def test_a_compressed_bomb_is_refused(self, running: Server) -> None:
        bomb = gzip.compress(b" " * 90_000_000)
        assert len(bomb) < 100_000
        response = httpx.post(
            f"{running.url}/classify",
            content=bomb,
            headers={"Content-Type": "application/json", "Content-Encoding": "gzip"},
            timeout=PATIENCE,
        )
        assert response.status_code == 413

    @pytest.mark.parametrize(("depth", "status"), [(150, 422), (250, 400), (40_000, 400)])
    def test_nesting_is_limited(self, running: Server, depth: int, status: int) -> None:
        body = b'{"input": ' + b"[" * depth + b"]" * depth + b"}"
        response = httpx.post(f"{running.url}/classify", content=body, timeout=PATIENCE)
        assert response.status_code == status
        assert_serving(running)


class TestConnections:
    def test_connections_above_the_limit_are_refused(self, running: Server) -> None:
        before = running.scrape()
        with ExitStack() as stack:
            kept = [stack.enter_context(connection(running)) for _ in range(CONNECTIONS)]
            for it in kept:
                it.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
            answers = [it.recv(65536) for it in kept]
            assert all(answer.startswith(b"HTTP/1.1 200") for answer in answers)
            with connection(running) as it:
                status, error = refusal(read_to_end(it))
            assert (status, error["code"]) == (503, "too_many_connections")
        wait_until(lambda: _answers(running), "room", PATIENCE)
        assert running.scrape().minus(before, "broken_connections_total", reason="too_many") >= 1

    @pytest.mark.parametrize(
        "noise",
        [
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
            b"HELO example.org\r\n\r\n",
            b"GET / HTTP/9.9\r\n\r\n",
            b"GET http:// HTTP/1.1\r\n\r\n",
            b"GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
            b"GET / HTTP/1.1\r\nContent-Length: 99999999999999999999999\r\n\r\n",
            HEAD + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
            b"GET / HTTP/1.1\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
            b"GET / HTTP/1.1\r\nHeader without colon\r\n\r\n",
            b"GET / HTTP/1.1\r\nA: b\r\n c\r\n\x00\r\n\r\n",
        ],
        ids=lambda noise: repr(noise[-40:]),
    )
    def test_malformed_requests_get_an_error_in_the_usual_shape(
        self, running: Server, noise: bytes
    ) -> None:
        with connection(running) as it:
            it.sendall(noise)
            it.shutdown(socket.SHUT_WR)
            status, error = refusal(read_to_end(it))
        assert (status, error["code"]) == (400, "invalid_http")

    @pytest.mark.parametrize("offer", ["h2c", "websocket"])
    def test_an_offered_protocol_upgrade_is_ignored(self, running: Server, offer: str) -> None:
        headers = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": offer, "HTTP2-Settings": ""}
        with httpx.Client(base_url=running.url, headers=headers, timeout=PATIENCE) as client:
            for _ in range(2):
                response = client.post("/classify", json={"input": "a"})
                assert response.status_code == 200
                assert response.json()["data"][0]["label"]
            assert client.get("/health/live").status_code == 200

    def test_pipelined_requests_are_all_answered(self, running: Server) -> None:
        body = b'{"input": "a"}'
        request = HEAD + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        last = b"GET /health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        with connection(running) as it:
            it.sendall(request * 5 + last)
            assert read_to_end(it).count(b"HTTP/1.1 200 OK") == 6

    def test_clients_that_leave_pipelined_requests_cause_no_errors(self, running: Server) -> None:
        before = running.scrape()
        for _ in range(5):
            with connection(running) as it:
                it.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 40)
                it.recv(1)
                it.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        assert_serving(running)
        after = running.scrape()
        assert after.minus(before, "requests_total", route="/metrics", outcome="ok") >= 5
        assert after.minus(before, "requests_total", outcome="error") == 0

    def test_a_client_that_reads_nothing_does_not_block_others(self, running: Server) -> None:
        with connection(running) as it:
            it.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            try:
                for _ in range(400):
                    it.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n")
            except (BrokenPipeError, ConnectionResetError):
                pass
            assert_serving(running)


def clients_of(running: Server) -> list[str]:
    lines = map(json.loads, running.log.read_text().splitlines())
    return [line["client"] for line in lines if line.get("route") == "/v1/models"]


def test_forwarded_headers_are_ignored_by_default(running: Server) -> None:
    headers = {"X-Forwarded-For": "203.0.113.7", "X-Forwarded-Proto": "https"}
    response = httpx.get(f"{running.url}/v1/models", headers=headers)
    assert "strict-transport-security" not in response.headers
    # The line is written after the answer.
    wait_until(lambda: clients_of(running) == ["127.0.0.1"], "the log line of this request")


def test_forwarded_headers_of_trusted_proxies_are_used(model_store: Path, tmp_path: Path) -> None:
    options = {"trusted_proxies": "127.0.0.0/8", "access_log": "1", "models": TOPICS}
    with server(model_store, tmp_path, engines=1, **options) as running:
        headers = {"X-Forwarded-For": "198.51.100.1, 203.0.113.7", "X-Forwarded-Proto": "https"}
        response = httpx.get(f"{running.url}/v1/models", headers=headers)
        assert "strict-transport-security" in response.headers
        wait_until(lambda: clients_of(running) == ["203.0.113.7"], "the log line of this request")


def test_metrics_can_have_their_own_port(model_store: Path, tmp_path: Path) -> None:
    port = free_port()
    options = {"metrics_port": str(port), "models": TOPICS, "fronts": "2"}
    with server(model_store, tmp_path, engines=1, **options) as running:
        side = f"http://127.0.0.1:{port}"

        def fronts() -> dict[str, float]:
            shown = Exposition(httpx.get(f"{side}/metrics", timeout=30).text)
            started = shown.by("process", "process_start_time_seconds")
            return {name: time for name, time in started.items() if name.startswith("frontend-")}

        wait_until(lambda: len(fronts()) == 2, "both frontends")
        before = fronts()
        (victim,) = [child for child in running.children if child.name() == "frontend-0"]
        victim.kill()

        def replaced() -> bool:
            """Check that the other frontend answers probes, and compare the start times."""
            assert httpx.get(f"{side}/health/ready", timeout=30).status_code == 200
            return fronts().get("frontend-0", 0) > before["frontend-0"]

        wait_until(replaced, "the frontend that was killed", 60)
        assert running.log.read_text().count("process down") == 1
        assert httpx.get(f"{running.url}/metrics").status_code == 404
        assert "budgetformer_requests_total" in httpx.get(f"{side}/metrics").text
        for base in (running.url, side):
            assert httpx.get(f"{base}/health/ready").status_code == 200
        for path in ("/", "/v1/models", "/docs", "/openapi.json"):
            assert httpx.get(f"{side}{path}").status_code == 404
        response = httpx.post(f"{side}/classify", json={"input": "a"})
        assert response.status_code == 404
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        assert running.terminate() == 0


class TestTls:
    @pytest.fixture
    def certificates(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """Return a folder with a CA, and its certificates for a server and a client."""
        folder = tmp_path_factory.mktemp("certificates")
        new = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]

        def make(name: str, *more: str) -> None:
            files = ["-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", f"/CN={name}"]
            command = [program("openssl"), "req", "-x509", *new, *files, *more]
            subprocess.run(command, cwd=folder, check=True, capture_output=True)

        by = ["-CA", "ca.pem", "-CAkey", "ca.key", "-addext", "basicConstraints=critical,CA:FALSE"]
        make("ca", "-addext", "keyUsage=critical,keyCertSign")
        make("server", *by, "-addext", "subjectAltName=IP:127.0.0.1")
        make("client", *by)
        make("stranger")
        return folder

    def test_client_certificates_are_required(
        self, certificates: Path, model_store: Path, tmp_path: Path
    ) -> None:
        port = free_port()
        options = {
            "tls_cert": certificates / "server.pem",
            "tls_key": certificates / "server.key",
            "tls_client_ca": certificates / "ca.pem",
            "metrics_port": port,
            "models": TOPICS,
        }
        trusting = ssl.create_default_context(cafile=certificates / "ca.pem")
        stranger = ssl.create_default_context(cafile=certificates / "ca.pem")
        trusting.load_cert_chain(certificates / "client.pem", certificates / "client.key")
        stranger.load_cert_chain(certificates / "stranger.pem", certificates / "stranger.key")
        nobody = ssl.create_default_context(cafile=certificates / "ca.pem")
        probes = f"http://127.0.0.1:{port}"
        with server(
            model_store,
            tmp_path,
            engines=1,
            probes=probes,
            **{k: str(v) for k, v in options.items()},
        ) as running:
            url = running.address.replace("http:", "https:")
            response = httpx.post(f"{url}/classify", json={"input": "a"}, verify=trusting)
            assert response.status_code == 200
            assert "strict-transport-security" in response.headers
            for context in (stranger, nobody):
                with pytest.raises(httpx.TransportError):
                    httpx.get(f"{url}/health/live", verify=context)
            with pytest.raises(httpx.TransportError):
                httpx.get(f"{running.address}/health/live")

    def test_the_key_of_another_certificate_is_one_line(
        self, certificates: Path, model_store: Path
    ) -> None:
        from tests.e2e.test_serve import refused

        line = refused(
            "--port=0", f"--model-store={model_store}",
            f"--tls-cert={certificates / 'server.pem'}", f"--tls-key={certificates / 'client.key'}",
        )  # fmt: skip
        assert "tls_key" in line


def test_a_server_with_two_ports_and_slow_clients_stops(model_store: Path, tmp_path: Path) -> None:
    options = {"metrics_port": str(free_port()), "models": TOPICS, "drain_seconds": "5"}
    with (
        server(model_store, tmp_path, engines=1, **options) as running,
        connection(running) as it,
    ):
        it.sendall(b"POST /cl")
        assert_serving(running)
        assert running.terminate() == 0
