"""Each HTTP request gets exactly one answer, and no body is ever read as a request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
from uvicorn.server import ServerState

from service.http import lingering
from tests.support.connected import EARLY, HEAD_BYTES, Connected, Wire, connected
from tests.support.strict_http import Answer, answers_in, requests_in

SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: s\r\n\r\n"
NEXT = b"GET /next HTTP/1.1\r\nHost: x\r\n\r\n"
HEAD = b"POST /a HTTP/1.1\r\nHost: x\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
FRAMED = {
    "length": b"Content-Length: %d\r\n\r\n%s" % (len(SMUGGLED), SMUGGLED),
    "chunks": b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n"
    % (len(SMUGGLED), SMUGGLED),
    "nothing": b"\r\n",
}
OFFERS = {
    "h2c": b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n",
    "websocket": b"upgrade: websocket\r\nconnection: keep-alive, Upgrade\r\n",
    "several": b"Connection: upgrade\r\nUpgrade: TLS/1.2, h2c\r\nUpgrade: x\r\nConnection: x\r\n",
}
MALFORMED = {
    "no request": b"no request at all\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "HTTP/0.9": b"GET /\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "CONNECT": b"CONNECT x:443 HTTP/1.1\r\nHost: x\r\n\r\n",
    "no Host": b"GET / HTTP/1.1\r\n\r\n",
    "two Hosts": b"GET / HTTP/1.1\r\nHost: x\r\nHost: x\r\n\r\n",
    "two Hosts in HTTP/1.0": b"GET / HTTP/1.0\r\nHost: x\r\nHost: y\r\n\r\n",
    "odd Host": b"GET / HTTP/1.1\r\nHost: x/y?\r\n\r\n",
    "list of Hosts": b"GET / HTTP/1.1\r\nHost: x, y\r\n\r\n",
    "broken Host": b"GET / HTTP/1.1\r\nHost: [\r\n\r\n",
    "length and chunks": HEAD + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunks and length": HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
    "two lengths": HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    "the same length twice": HEAD + b"Content-Length: 1\r\nContent-Length: 1\r\n\r\na",
    "list of lengths": HEAD + b"Content-Length: 1, 1\r\n\r\na",
    "signed length": HEAD + b"Content-Length: +1\r\n\r\na",
    "empty length": HEAD + b"Content-Length:\r\n\r\n",
    "huge length": HEAD + b"Content-Length: 18446744073709551617\r\n\r\na",
    "another coding": HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "another coding last": HEAD + b"Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
    "chunked twice": HEAD + b"Transfer-Encoding: chunked\r\n" * 2 + b"\r\n0\r\n\r\n",
    "identity": HEAD + b"Transfer-Encoding: identity\r\n\r\n",
    "empty item": HEAD + b"Transfer-Encoding: ,chunked\r\n\r\n0\r\n\r\n",
    "chunks in HTTP/1.0": b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "no size": CHUNKED + b"zz\r\n",
    "hexadecimal prefix": CHUNKED + b"0x1\r\na\r\n0\r\n\r\n",
    "huge size": CHUNKED + b"10000000000000001\r\na\r\n",
    "space after size": CHUNKED + b"1 \r\na\r\n0\r\n\r\n",
    "line end after size": CHUNKED + b"1\na\r\n0\r\n\r\n",
    "longer than its size": CHUNKED + b"1\r\nab\r\n0\r\n\r\n",
    "line end in extension": CHUNKED + b"1;a\nb\r\na\r\n0\r\n\r\n",
    "line end in quotes": CHUNKED + b'1;a="\r\n"\r\na\r\n0\r\n\r\n',
    "bare line end after chunk": CHUNKED + b"1\r\na\n0\r\n\r\n",
    "bare line end after last": CHUNKED + b"0\r\n\n",
    "trailer without colon": CHUNKED + b"0\r\ntrailer\r\n\r\n",
    "length as trailer": CHUNKED + b"0\r\nContent-Length: 9\r\n\r\n",
    "folded header": HEAD + b"X: a\r\n b\r\n\r\n",
    "folded length": HEAD + b"Content-Length:\r\n 3\r\n\r\nabc",
    "folded coding": HEAD + b"Transfer-Encoding:\r\n\tchunked\r\n\r\n0\r\n\r\n",
    "folded first": b"GET / HTTP/1.1\r\n X: a\r\nHost: x\r\n\r\n",
    "bare line ends": b"GET / HTTP/1.1\nHost: x\n\n",
    "bare line end": b"GET / HTTP/1.1\r\nHost: x\nX: a\r\n\r\n",
    "bare last line end": b"GET / HTTP/1.1\r\nHost: x\r\n\n",
    "bare carriage return": b"GET / HTTP/1.1\r\nHost: x\rX: a\r\n\r\n",
    "space before colon": HEAD + b"Content-Length : 3\r\n\r\nabc",
    "nameless": HEAD + b": a\r\n\r\n",
    "no colon": HEAD + b"X\r\n\r\n",
    "NUL in a name": HEAD + b"X\x00: a\r\n\r\n",
    "NUL in a value": HEAD + b"X: a\x00b\r\n\r\n",
    "control character": HEAD + b"X: a\x01\r\n\r\n",
    "high byte in the target": b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
    "relative target": b"GET a HTTP/1.1\r\nHost: x\r\n\r\n",
    "target without path": b"GET http:// HTTP/1.1\r\nHost: x\r\n\r\n",
    "unknown method": b"FOO / HTTP/1.1\r\nHost: x\r\n\r\n",
    "unknown version": b"GET / HTTP/1.2\r\nHost: x\r\n\r\n",
    "closing, and malformed": b"GET http:// HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
}  # fmt: skip


def splits(stream: bytes) -> Iterator[list[bytes]]:
    """Return a stream whole, byte by byte, and in two parts for every position of the cut."""
    yield [stream]
    yield [stream[at : at + 1] for at in range(len(stream))]
    for at in range(1, len(stream)):
        yield [stream[:at], stream[at:]]


def answers(connection: Connected) -> list[Answer]:
    return answers_in(connection.wire.sent, [method for method, _, _ in connection.served])


def statuses(connection: Connected) -> list[int]:
    return [answer.status for answer in answers(connection)]


@pytest.mark.parametrize("framed", FRAMED)
@pytest.mark.parametrize("offer", OFFERS)
async def test_an_offered_protocol_upgrade_is_ignored(offer: str, framed: str) -> None:
    stream = HEAD + b"X: y\r\n" + OFFERS[offer] + FRAMED[framed]
    body = b"" if framed == "nothing" else SMUGGLED
    for parts in splits(stream + stream + NEXT):
        with connected() as connection:
            await connection.send(parts)
        assert connection.served == [(b"POST", b"/a", body)] * 2 + [(b"GET", b"/next", b"")]
        assert statuses(connection) == [200] * 3
        assert not connection.breaks
        for headers in connection.headers[:2]:
            names = [name for name, _ in headers]
            assert (b"x", b"y") in headers
            assert not {b"upgrade", b"http2-settings"} & set(names)
            options = b",".join(value for name, value in headers if name == b"connection")
            assert b"upgrade" not in options.lower()
            assert (b"keep-alive" in options) == (offer == "websocket")


async def test_a_request_with_an_upgrade_may_close_the_connection() -> None:
    with connected() as connection:
        await connection.send(
            [HEAD + b"Connection: close, Upgrade\r\nUpgrade: h2c\r\n" + FRAMED["length"] + NEXT]
        )
        assert [answer.closes for answer in answers(connection)] == [True]
        assert connection.over


@pytest.mark.parametrize("before", [b"", NEXT, NEXT + HEAD + FRAMED["chunks"]])
@pytest.mark.parametrize("kind", MALFORMED)
async def test_a_malformed_request_is_answered_once_and_ends_the_connection(
    kind: bytes, before: bytes
) -> None:
    stream = before + MALFORMED[kind] + SMUGGLED * 2
    variants = splits(stream) if not before else iter(([stream], [before, stream[len(before) :]]))
    expected = requests_in(before).requests
    for parts in variants:
        with connected() as connection:
            await connection.send(parts)
            assert connection.over
        assert [target for _, target, _ in connection.served] == [
            request.target for request in expected
        ]
        *earlier, last = answers(connection)
        assert [answer.status for answer in earlier] == [200] * len(expected)
        assert (last.status, last.closes) == (400, True)
        assert connection.breaks == ["malformed"]


async def test_earlier_requests_are_answered_before_the_error() -> None:
    with connected(held=True) as connection:
        await connection.send([NEXT + HEAD + FRAMED["length"] + b"malformed\r\n" + SMUGGLED])
        assert connection.wire.sent == b""
        await connection.send([SMUGGLED])
        assert connection.hold is not None
        connection.hold.set()
        await connection.settle()
        assert statuses(connection) == [200, 200, 400]
        assert connection.over


@pytest.mark.parametrize(
    "last",
    [
        b"GET /a HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        b"GET /a HTTP/1.1\r\nHost: x\r\nConnection: x, CLOSE\r\nConnection: keep-alive\r\n\r\n",
        b"GET /a HTTP/1.0\r\n\r\n",
        b"GET /a HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
        CHUNKED + b"0\r\nConnection: close\r\n\r\n",
    ],
)
@pytest.mark.parametrize("more", [NEXT, b"\x00", b"\r\n" + SMUGGLED])
async def test_nothing_is_served_after_the_last_request(last: bytes, more: bytes) -> None:
    for parts in splits(last + more):
        with connected() as connection:
            await connection.send(parts)
            assert connection.over
        assert len(connection.served) == 1
        assert [(answer.status, answer.closes) for answer in answers(connection)] == [(200, True)]
        assert not connection.breaks


async def test_trailers_are_not_headers() -> None:
    trailers = b"Authorization: Bearer x\r\nContent-Encoding: br\r\nX-Forwarded-For: 9.9.9.9\r\n"
    for parts in splits(CHUNKED + b"1\r\na\r\n0\r\n" + trailers + b"\r\n" + NEXT):
        with connected() as connection:
            await connection.send(parts)
        assert statuses(connection) == [200, 200]
        assert connection.headers[0] == [(b"host", b"x"), (b"transfer-encoding", b"chunked")]


async def test_100_continue_is_sent_only_in_http_1_1() -> None:
    expecting = b"Expect: 100-continue\r\nContent-Length: 1\r\n\r\n"
    for version, interim in ((b"1.1", 1), (b"1.0", 0)):
        with connected() as connection:
            await connection.send([b"POST /a HTTP/%s\r\nHost: x\r\n" % version + expecting])
            assert connection.wire.sent.count(b"100 Continue") == interim
            await connection.send([b"a"])
            assert statuses(connection) == [200]


class TestEarlyAnswers:
    """Answers sent before the request is complete."""

    @pytest.mark.parametrize(
        "head",
        [
            b"Content-Length: 300000\r\n\r\n",
            b"Transfer-Encoding: chunked\r\n\r\n",
            b"Expect: 100-continue\r\nContent-Length: 35\r\n\r\n",
        ],
        ids=["large", "chunks", "expecting"],
    )
    async def test_the_connection_closes_if_a_large_body_may_follow(self, head: bytes) -> None:
        for half_closes in (True, False):
            with connected(half_closes) as connection:
                await connection.send([b"POST " + EARLY + b" HTTP/1.1\r\nHost: x\r\n" + head])
                assert [(answer.status, answer.closes) for answer in answers(connection)] == [
                    (401, True)
                ]
                assert connection.wire.half_closed is half_closes
                await connection.send([b"23\r\n", SMUGGLED, b"0\r\n\r\n", SMUGGLED * 9])
                assert not connection.wire.closed
                assert len(connection.served) == 1

    async def test_the_connection_stays_open_if_a_small_body_follows(self) -> None:
        head = b"POST " + EARLY + b" HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
        with connected() as connection:
            await connection.send([head % len(SMUGGLED), SMUGGLED[:9], SMUGGLED[9:], NEXT])
            assert [(answer.status, answer.closes) for answer in answers(connection)] == [
                (401, False), (200, False),
            ]  # fmt: skip

    async def test_a_shed_request_closes_the_connection_only_with_a_large_body(self) -> None:
        head = b"POST /guarded HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
        for size, closes in ((len(SMUGGLED), False), (10**6, True)):
            with connected() as connection:
                shedding = connection.admission.shedding
                shedding.enter(1, 1.0, 0.0)
                shedding.learn_refusal(1, 1)
                await connection.send([head % size, SMUGGLED])
                assert [(answer.status, answer.closes) for answer in answers(connection)] == [
                    (429, closes)
                ]
                assert connection.served == []
                assert connection.over is closes


class Clock:
    """Moves the time of the running event loop, and so its timers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        loop = asyncio.get_running_loop()
        self._offset = 0.0
        real: Callable[[], float] = loop.time
        monkeypatch.setattr(loop, "time", lambda: real() + self._offset)

    async def advance(self, seconds: float) -> None:
        self._offset += seconds
        for _ in range(3):
            await asyncio.sleep(0)


@pytest.fixture
async def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


class TestLingering:
    """Limits for a client that continues to send after the last answer."""

    async def test_bytes_are_limited(self) -> None:
        with connected() as connection:
            await connection.send([b"malformed\r\n"])
            mebibyte = b"a" * 2**20
            sent = 0
            while not connection.wire.closed:
                connection.protocol.data_received(mebibyte)
                sent += len(mebibyte)
            assert sent == lingering.LINGER_BYTES
            assert statuses(connection) == [400]

    async def test_time_is_limited(self, clock: Clock) -> None:
        with connected() as connection:
            await connection.send([b"malformed\r\n"])
            for _ in range(60):
                assert not connection.wire.closed
                await clock.advance(1.0)
                connection.protocol.data_received(b"a")
            await clock.advance(0.1)
            assert connection.wire.closed

    async def test_silence_is_limited(self, clock: Clock) -> None:
        with connected() as connection:
            await connection.send([b"malformed\r\n"])
            await clock.advance(lingering.LINGER_SECONDS - 0.5)
            assert not connection.wire.closed
            await clock.advance(1.0)
            assert connection.wire.closed

    async def test_bytes_are_limited_while_earlier_requests_wait(self) -> None:
        with connected(held=True) as connection:
            await connection.send([NEXT + b"malformed\r\n"])
            for _ in range(lingering.LINGER_BYTES // 2**20 + 1):
                if not connection.wire.closed:
                    connection.protocol.data_received(b"a" * 2**20)
            assert connection.wire.closed

    async def test_the_time_for_the_rest_of_a_small_body_is_limited(self, clock: Clock) -> None:
        with connected() as connection:
            await connection.send(
                [b"POST " + EARLY + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n"]
            )
            assert not connection.over
            await clock.advance(lingering.LINGER_SECONDS + 0.1)
            assert connection.wire.half_closed
            await clock.advance(lingering.LINGER_SECONDS + 0.1)
            assert connection.wire.closed

    async def test_a_large_head_gets_431(self) -> None:
        with connected() as connection:
            await connection.send([HEAD, b"X: " + b"a" * HEAD_BYTES, SMUGGLED])
            assert statuses(connection) == [431]
            assert connection.breaks == ["head_too_large"]
            assert connection.over


@pytest.mark.parametrize(
    ("target", "mebibytes", "status"),
    [
        (b"/upload", 3, 200), (b"/upload?model=a", 3, 200), (b"/upload", 5, 431),
        (b"/uploads", 3, 431), (b"/other?/upload", 3, 431),
    ],
)  # fmt: skip
async def test_uploads_may_be_larger_than_other_requests(
    target: bytes, mebibytes: int, status: int
) -> None:
    size = mebibytes * 2**20
    head = b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (target, size)
    with connected() as connection:
        await connection.send([head, *[b"a" * 2**16] * (size // 2**16), NEXT])
        assert statuses(connection) == ([200, 200] if status == 200 else [431])


class TestConnectionLimit:
    async def test_a_connection_above_the_limit_gets_503(self) -> None:
        state = ServerState()
        with connected(server_state=state) as first:
            others = [Connected(Wire(), state) for _ in range(4)]  # in their TLS handshake
            with connected(server_state=state) as refused:
                (answer,) = answers(refused)
                assert (answer.status, answer.closes) == (503, True)
                assert b"(limit 5)" in refused.wire.sent
                assert refused.breaks == ["too_many"]
            others.pop().protocol.connection_lost(cast(Any, OSError("no TLS")))
            with connected(server_state=state) as admitted:
                await admitted.send([NEXT])
                assert statuses(admitted) == [200]
            await first.send([NEXT])
            assert statuses(first) == [200]

    async def test_a_server_can_stop_during_handshakes(self) -> None:
        state = ServerState()
        handshaking = Connected(Wire(), state)
        assert len(state.connections) == 1
        handshaking.protocol.shutdown()
        assert not state.connections


def test_the_strict_reader_of_these_tests_refuses_malformed_requests() -> None:
    stream = HEAD + FRAMED["chunks"] + HEAD + FRAMED["length"] + NEXT
    read = requests_in(stream)
    assert [(request.target, request.body) for request in read.requests] == [
        (b"/a", SMUGGLED), (b"/a", SMUGGLED), (b"/next", b""),
    ]  # fmt: skip
    assert read.end == "open"
    for kind, malformed in MALFORMED.items():
        if kind not in (
            "relative target",
            "target without path",
            "unknown method",
            "length as trailer",
            "closing, and malformed",
        ):
            assert not requests_in(malformed + SMUGGLED * 2).requests, kind
