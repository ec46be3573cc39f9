"""Hostile headers on every route never cause a 500, and later requests are answered."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any, cast

import h11
import pytest
import uvloop
from uvicorn.config import Config
from uvicorn.server import ServerState

import service as package
from service.http.app import protocol_of
from service.http.authentication import HEADER as KEY
from service.http.kserve import HEADER_LENGTH
from service.http.playground import UNLISTED
from tests.fuzz.test_bodies import SAMPLES
from tests.support.connected import Wire
from tests.support.mutation import INPUTS, fuzzed, mutated_bytes
from tests.support.serving import ADMIN_KEY, Service, service
from tests.support.stores import TOPICS

PATIENCE = 60
VALUES: dict[str, list[bytes]] = {
    "accept": [
        b"*/*",
        b"application/json;q=0.5",
        b"application/vnd.apache.arrow.stream, */*;q=0.5",
        b"application/openmetrics-text; version=1.0.0",
        b"text/plain; version=abc",
    ],
    "authorization": [b"Bearer open-sesame", b"Bearer", b"Basic b3Blbg==", b"bearer  open-sesame "],
    KEY.lower(): [b"open-sesame", b"", b"a, b"],
    "content-type": [b"application/json", b"application/x+json; charset=utf-16", b"text/csv", b"/"],
    "content-encoding": [b"gzip", b"deflate", b"identity", b"gzip, gzip", b"br"],
    "content-length": [b"0", b"5", b"00", b"-1", b"5, 5", b"18446744073709551615"],
    "transfer-encoding": [b"chunked", b"gzip, chunked", b"identity"],
    "connection": [b"close", b"keep-alive", b"Upgrade", b"upgrade, close"],
    "upgrade": [b"h2c", b"websocket", b""],
    "expect": [b"100-continue", b"100-Continue ", b"200-ok"],
    "host": [b"x", b"", b"[", b"[::1]:8", b"a b", b"x:99999", b"x/y?z#", b"[::zz]"],
    "x-request-id": [b"a", b"a" * 128, b"a" * 129, b"a b"],
    "traceparent": [b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", b"00-0-0-0", b"ff"],
    "tracestate": [b"a=b", b"a=b," * 40, b"="],
    "baggage": [b"a=b", b"%zz=%", b"a" * 300],
    "origin": [b"null", b"https://x", b"https://[", b"file://"],
    "access-control-request-method": [b"POST", b"", b"x"],
    "access-control-request-headers": [b"x-api-key", b","],
    "x-forwarded-for": [b"1.2.3.4", b"1.2.3.4, ::1, x", b",", b"[::1]:99999"],
    "x-forwarded-proto": [b"https", b"javascript", b""],
    "x-forwarded-host": [b"x", b"["],
    "forwarded": [b"for=1.2.3.4;proto=https", b"="],
    HEADER_LENGTH.lower(): [b"0", b"10", b"-1", b"1e3", b"\xb2", b"9" * 30],
    "x-amzn-sagemaker-custom-attributes": [b"a=b", b"a" * 1024],
    "x-amzn-sagemaker-target-model": [b"topics", b"../.."],
    "triton-request-id": [b"a"],
    "accept-encoding": [b"gzip", b"*;q=0", b"identity;q=nan"],
    "if-none-match": [b"*", b'W/"a"', b'"'],
    "if-modified-since": [b"Thu, 01 Jan 1970 00:00:00 GMT", b"x"],
    "range": [b"bytes=0-0", b"bytes=-1", b"bytes=9-1,0-", b"x=y"],
    "cookie": [b"a=b", b"=;=;"],
    "user-agent": [b"x", b""],
}
"""Headers that this server or similar ones read, with typical values."""
HOSTILE = [
    b"", b" ", b"\t", b",", b";", b"=", b'"', b"a" * 3000, b"\xff\xfe", b"\xc3\xa9", b"\xb2",
    b"0x10", b"%00", b"%s%n", b"../../etc/passwd", b"${jndi:ldap://x}", b"<script>", b"null", b"-1",
    b"1e999", b"9" * 400, b"(" * 500, b"a," * 500, b'a="' + b"\\" * 300, b"; version=abc",
    b"text/plain; q=x",
]  # fmt: skip


Ask = Callable[[bytes], tuple[int, dict[bytes, bytes], bytes]]


class ObservedWire(Wire):
    """A transport with an event for writes and the end of the connection."""

    def __init__(self) -> None:
        super().__init__()
        self.news = asyncio.Event()

    def write(self, data: Any) -> None:
        super().write(data)
        self.news.set()

    def write_eof(self) -> None:
        super().write_eof()
        self.news.set()

    def close(self) -> None:
        super().close()
        self.news.set()


async def ask(connect: Callable[[], asyncio.Protocol], request: bytes) -> Any:
    """Return status, headers and body of the answer to a request on a new connection."""
    wire, protocol = ObservedWire(), cast(Any, connect())
    protocol.connection_made(wire)
    protocol.data_received(request)
    method = request.partition(b" ")[0]
    reader = h11.Connection(h11.CLIENT)
    reader.send(h11.Request(method=method, target="/", headers=[("host", "x")]))
    reader.send(h11.EndOfMessage())
    status, headers, body, read = 0, {}, b"", 0
    while True:
        event = reader.next_event()
        if isinstance(event, h11.Response):
            status, headers = event.status_code, dict(event.headers)
        elif isinstance(event, h11.Data):
            body += event.data
        elif isinstance(event, (h11.EndOfMessage, h11.ConnectionClosed)):
            break
        elif event is h11.NEED_DATA:
            if len(wire.sent) == read:
                wire.news.clear()
                await asyncio.wait_for(wire.news.wait(), PATIENCE)
            new, read = wire.sent[read:], len(wire.sent)
            reader.receive_data(new)
    wire.closed = True
    protocol.connection_lost(OSError())
    return status, headers, body


@pytest.fixture(scope="module")
def running(model_store: Path) -> Iterator[tuple[Service, Ask]]:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        options = {"cors_origins": ["https://x"], "models": [TOPICS], "timeout_ms": 100_000}
        opened = service(model_store, **options)
        running = runner.run(opened.__aenter__())
        settings = running.app.state.shared.settings
        config = Config(
            running.app, lifespan="off", log_config=None, access_log=False, ws="none",
            proxy_headers=True, forwarded_allow_ips=["127.0.0.1"],
        )  # fmt: skip
        config.load()

        def connect() -> asyncio.Protocol:
            protocol: asyncio.Protocol = protocol_of(running.app, settings)(
                config=config,
                server_state=ServerState(),
                app_state={},
                _loop=asyncio.get_running_loop(),
            )
            return protocol

        def run(request: bytes) -> Any:
            asking: Awaitable[Any] = ask(connect, request)
            return runner.run(cast(Any, asking))

        yield running, run
        runner.run(opened.__aexit__(None, None, None))


def routes(running: Service) -> list[tuple[str, str]]:
    """Return the method and path of every route; routes that change models name an unknown one."""
    documented = running.app.openapi()["paths"]
    found = [(method.upper(), path) for path, methods in documented.items() for method in methods]
    found += [("GET", path) for path in (*UNLISTED, "/docs", "/openapi.json", "/nowhere")]
    found += [("OPTIONS", "/classify"), ("HEAD", "/metrics"), ("PUT", "/classify")]
    filled = []
    for method, path in found:
        name = "none" if path.endswith(("/load", "/unload")) else TOPICS
        path = path.replace("{name}", name).replace("{version}", "1")
        filled.append((method, re.sub(r"{\w+}", "x", path)))
    return sorted(filled)


def request_bytes(method: str, path: str, headers: list[tuple[str, bytes]], body: bytes) -> bytes:
    lines = [f"{method} {path} HTTP/1.1".encode()]
    lines += [name.encode() + b": " + value for name, value in headers]
    return b"\r\n".join([*lines, b"", body])


def plain(method: str, path: str, body: bytes) -> list[tuple[str, bytes]]:
    headers = [("host", b"x"), ("content-type", b"application/json")]
    if path.endswith(("/load", "/unload", "/index")):
        headers.append(("authorization", b"Bearer " + ADMIN_KEY.encode()))
    return [*headers, ("content-length", b"%d" % len(body))] if method == "POST" else headers


def value_of(random: Random, name: str) -> bytes:
    """Return a valid header value, without line ends and control characters."""
    value = random.choice(random.choice([VALUES[name], HOSTILE]))
    if random.random() < 0.4:
        value = mutated_bytes(random, value)
    return re.sub(rb"[^\t -~\x80-\xff]", b"", value).strip()


@fuzzed(0.2)
def test_hostile_values_of_headers(running: tuple[Service, Ask], random: Random) -> None:
    service, run = running
    method, path = random.choice(routes(service))
    body = json.dumps(SAMPLES.get(path, {})).encode() if method == "POST" else b""
    names = random.sample(sorted(VALUES), random.choice([1, 1, 1, 2, 4]))
    headers = [header for header in plain(method, path, body) if header[0] not in names]
    headers += [(name, value_of(random, name)) for name in names]
    request = request_bytes(method, path, headers, body)
    if {"content-length", "transfer-encoding"} & set(names):
        request += b"0\r\n\r\n" * 9 + b"\x00"  # ends any body
    status, _, answer = run(request)
    assert status in range(200, 500) or status == 504, (request, answer)
    assert b"Traceback" not in answer
    assert_serving(run)


def assert_serving(run: Ask) -> None:
    """Check that a plain request is answered."""
    body = json.dumps({"input": "The otter slept under the hedge."}).encode()
    status, _, answer = run(
        request_bytes("POST", "/classify", plain("POST", "/classify", body), body)
    )
    assert status == 200, answer
    assert json.loads(answer)["data"][0]["label"] == "animals"


def test_every_header_on_every_route(running: tuple[Service, Ask]) -> None:
    """Tries a few headers on each route, or all of them if `FUZZ_INPUTS` is large."""
    service, run = running
    random = Random(INPUTS)
    for method, path in routes(service):
        body = json.dumps(SAMPLES.get(path, {})).encode() if method == "POST" else b""
        before = run(request_bytes(method, path, plain(method, path, body), body))[0]
        names = sorted(VALUES)
        for name in names if INPUTS >= 1000 else random.sample(names, 8):
            for _ in range(1 + INPUTS // 20_000):
                value = value_of(random, name)
                headers = [header for header in plain(method, path, body) if header[0] != name]
                request = (
                    request_bytes(method, path, [*headers, (name, value)], body) + b"\x00" * 20
                )
                status, _, answer = run(request)
                assert status in range(200, 500) or status == 504, (request, answer)
        assert run(request_bytes(method, path, plain(method, path, body), body))[0] == before
        assert_serving(run)
    metrics = run(request_bytes("GET", "/metrics", plain("GET", "/metrics", b""), b""))
    assert metrics[0] == 200


def test_all_headers_read_by_the_code_are_fuzzed() -> None:
    looked_up = re.compile(
        r'headers\.get(?:list)?\(\s*b?"([\w-]+)"|b"([\w-]+)" (?:not )?in headers'
    )
    source = "".join(path.read_text() for path in Path(package.__file__).parent.rglob("*.py"))
    read = {one[1] or one[2] for one in looked_up.finditer(source)}
    assert read > {"accept", "if-none-match", "traceparent"}
    # The code also reads some headers of its answers.
    assert read - {"allow", "Allow", "retry-after"} <= set(VALUES)
