"""Mutated HTTP streams: each request gets one answer, and no body is ever read as a request."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator
from random import Random

import h11
import pytest
import uvloop

from tests.support.connected import EARLY, Connected, connected
from tests.support.mutation import fuzzed, mutated_bytes
from tests.support.strict_http import METHODS, Reading, answers_in, requests_in

SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: s\r\n\r\n"
BODIES = [
    b"",
    b"a",
    b'{"input": "a"}',
    SMUGGLED,
    SMUGGLED * 3,
    b"0\r\n\r\n",
    b"\r\n" * 3,
    b"x" * 300,
]
HOSTS = [b"Host: x"] * 12 + [
    b"host:x:80",
    b"Host:",
    b"Host: [::1]:8",
    b"Host: a b",
    b"Host: a/b",
    b"",
]
PLAIN_HEADERS = [
    b"Accept: */*", b"X-Empty:", b"X: \xff\x80", b"X: a \t b \t", b"X:\ta", b"Expect: 100-continue",
    b"Connection: close", b"Connection: keep-alive", b"Connection: close, keep-alive",
    b"Connection: x, Close ,y", b"Connection: closed", b"Connection: close;q=1",
    b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__",
    b"Upgrade: websocket\r\nConnection: upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZQ==",
    b"Connection: keep-alive, Upgrade\r\nUpgrade: TLS/1.2", b"Connection: Upgrade", b"Upgrade: h2c",
    b"Connection: Upgrade\r\nUpgrade: a\r\nUpgrade: b\r\nConnection: close",
]  # fmt: skip
FRAMING = [b"Content-Length:" + value for value in [
    b" 0", b" 5", b" 5, 5", b" +5", b" 0x5", b" 5_0", b"", b" 18446744073709551621",
]] + [b"Transfer-Encoding" + value for value in [
    b": chunked", b": gzip, chunked", b": chunked, identity", b": identity", b":\x0bchunked",
    b": x", b" : chunked", b"",
]]  # fmt: skip
ODD_HEADERS = [
    b"X: a\r\n b", b"X: a\r\n\tTransfer-Encoding: chunked", b"X: a\nTransfer-Encoding: chunked",
    b"X: a\rContent-Length: 9", b"X: a\x00b", b" X: a", b": a", b"X\x01: a", b"Host: y",
]  # fmt: skip
HEADERS = PLAIN_HEADERS + FRAMING + ODD_HEADERS
TARGETS = [
    b"/",
    b"/a?b=c%20d",
    b"/guarded",
    b"http://x/a",
    b"*",
    b"/%00",
    b"//a/..//b",
    b"a",
    b"http://x",
    b"/\xff",
    b"/a#b",
]
LINES = [b"%s %s HTTP/1.1"] * 20 + [
    b"%s %s HTTP/1.0", b"%s  %s HTTP/1.1", b"%s %s HTTP/1.1 ", b"%s\t%s HTTP/1.1",
    b"%s %s HTTP/2.0", b"%s %s HTTP/0.9", b"%s %s", b"%s %s http/1.1", b"%s %s HTTP/1.10",
    b" %s %s HTTP/1.1", b"%s %s HTTP/1.1\r",
]  # fmt: skip
EXTENSIONS = [b""] * 8 + [
    b";a",
    b";a=b",
    b';a="b;\\"c"',
    b" ;a",
    b"; a = b",
    b";",
    b";a=",
    b";a\nb",
    b";\x00",
    b" ",
]
TRAILERS = [b""] * 6 + [
    b"X: y\r\n", b"Content-Length: 9\r\n", b"Transfer-Encoding: chunked\r\n", b"Host: z\r\n",
    b"Connection: close\r\n", b"Connection: upgrade\r\nUpgrade: h2c\r\n", b"no colon\r\n",
    b"X: y\r\n z\r\n", b"X: y\n",
]  # fmt: skip
SEPARATORS = [b""] * 12 + [b"\r\n", b"\n", b"\r", b"\r\n\r\n", b" ", b"\x00"]

Respond = Callable[[list[bytes], bool], Connected]


@pytest.fixture(scope="module")
def respond() -> Iterator[Respond]:
    """Return a function that sends parts of a stream over a new connection, and returns it."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:

        async def run(parts: list[bytes], half_closes: bool) -> Connected:
            with connected(half_closes) as connection:
                await connection.send(parts)
            return connection

        yield lambda parts, half_closes: runner.run(run(parts, half_closes))


def random_request(random: Random, early: bool) -> bytes:
    """Return a request in which a part is sometimes unusual or invalid."""

    def sometimes(usual: bytes, unusual: list[bytes]) -> bytes:
        return random.choice(unusual) if random.random() < 0.12 else usual

    method = sometimes(random.choice([b"GET", b"POST"]), [*sorted(METHODS), b"get", b"FOO"])
    target = sometimes(b"/a", TARGETS)
    if early and random.random() < 0.3:
        method, target = b"POST", EARLY
    lines = [random.choice(LINES) % (method, target), random.choice(HOSTS)]
    headers = PLAIN_HEADERS if random.random() < 0.8 else HEADERS
    lines += random.sample(headers, random.choice([0, 0, 1, 2]))
    body = random.choice(BODIES)
    match random.randrange(5):
        case 0 | 1 if body:
            lines.append(b"Content-Length: %d" % len(body))
        case 2 | 3:
            lines.append(b"Transfer-Encoding: chunked")
            body = chunked(random, body)
        case _:
            body = b""
    first, *fields = filter(None, lines)
    random.shuffle(fields)
    return b"\r\n".join([first, *fields, b"", body])


def chunked(random: Random, body: bytes) -> bytes:
    cuts = sorted(random.choices(range(len(body) + 1), k=random.randrange(3)))
    parts = [body[start:end] for start, end in itertools.pairwise([0, *cuts, len(body)])]
    pattern = random.choice([b"%x", b"%X", b"00%x"]) if random.random() < 0.95 else b"0x%x"
    coded = [
        pattern % len(part) + random.choice(EXTENSIONS) + b"\r\n" + part + b"\r\n"
        for part in parts
        if part
    ]
    return b"".join(
        [*coded, b"0", random.choice(EXTENSIONS), b"\r\n", random.choice(TRAILERS), b"\r\n"]
    )


def random_stream(random: Random, early: bool = False) -> bytes:
    """Return one to four requests, sometimes with a few bytes changed."""
    parts = []
    for _ in range(random.randint(1, 4)):
        parts += [random.choice(SEPARATORS), random_request(random, early)]
    stream = b"".join(parts)
    return mutated_bytes(random, stream) if random.random() < 0.3 else stream


def split(random: Random, stream: bytes) -> list[bytes]:
    """Split a stream like a client may: not at all, byte by byte, or into some parts."""
    match random.randrange(8):
        case 0 if len(stream) < 300:
            return [stream[i : i + 1] for i in range(len(stream))]
        case 1 | 2:
            return [stream]
        case _:
            cuts = sorted(random.choices(range(len(stream) + 1), k=random.randint(1, 5)))
            return [stream[a:b] for a, b in itertools.pairwise([0, *cuts, len(stream)]) if a < b]


def assert_agrees(connection: Connected, reading: Reading) -> None:
    """Check that the served requests are the sent ones, in order, with one answer each."""
    served = connection.served
    answers = answers_in(connection.wire.sent, [method for method, _, _ in served])
    if served and served[-1][2] is None and answers[len(served) - 1].status == 400:
        served = served[:-1]  # found to be malformed before its answer was sent
    for number, answer in enumerate(answers[: len(served)], start=1):
        assert (answer.status in (200, 401), answer.number) == (True, number)
    # There is at most one error, and no answer follows one that closes the connection.
    assert len(answers) - len(served) in (0, 1)
    refused = len(answers) > len(served)
    closed = bool(answers) and answers[-1].closes
    assert not any(answer.closes for answer in answers[:-1])
    assert closed <= connection.over
    if refused:
        assert 400 <= answers[-1].status < 500
        assert closed
    sent = [(one.method, one.target, one.body) for one in reading.requests]
    if reading.begun is not None:
        sent.append((reading.begun.method, reading.begun.target, None))
    assert len(served) <= len(sent)
    for (*got, body), (*expected, whole) in zip(served, sent, strict=False):
        assert got == expected
        assert body in (whole, None)
    if any(body is None for _, _, body in served) and (closed or connection.over):
        return  # an early answer before a large body was the last
    if len(served) < len(reading.requests):
        assert refused
        assert reading.requests[len(served)].may_be_refused
    elif reading.end == "error":
        assert refused
    elif reading.end == "close":
        assert closed
        assert not refused


def respond_to(respond: Respond, random: Random, early: bool) -> None:
    stream = random_stream(random, early)
    connection = respond(split(random, stream), random.random() < 0.5)
    reading = requests_in(stream)
    try:
        assert_agrees(connection, reading)
    except AssertionError as error:
        error.add_note(f"sent {stream!r}\n\nserved {connection.served}\n\nread {reading}")
        error.add_note(f"answered {connection.wire.sent!r}")
        raise


@fuzzed(0.9)
def test_mutated_streams(respond: Respond, random: Random) -> None:
    respond_to(respond, random, early=False)


@fuzzed(0.1)
def test_mutated_streams_with_early_answers(respond: Respond, random: Random) -> None:
    respond_to(respond, random, early=True)


@fuzzed(0.1)
def test_the_strict_reader_agrees_with_h11(random: Random) -> None:
    # h11 accepts only single spaces in the request line.
    stream = random_request(random, early=False).replace(b"  ", b" ")
    reading = requests_in(stream)
    if not reading.requests or reading.requests[0].may_be_refused:
        return
    reader = h11.Connection(h11.SERVER)
    reader.receive_data(stream)
    begun = reader.next_event()
    assert isinstance(begun, h11.Request)
    body = b""
    while isinstance(event := reader.next_event(), h11.Data):
        body += event.data
    assert isinstance(event, h11.EndOfMessage)
    assert (begun.method, body) == (reading.requests[0].method, reading.requests[0].body)
