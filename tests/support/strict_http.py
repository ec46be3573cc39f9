"""A strict reading of HTTP/1 by RFC 9112, to hold a server against, and its answers read back.

`requests_in` is slow, small and of one piece, so that it can be checked by reading it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

METHODS = frozenset(
    b"ACL BIND CHECKOUT CONNECT COPY DELETE GET HEAD LINK LOCK M-SEARCH MERGE MKACTIVITY "
    b"MKCALENDAR MKCOL MOVE NOTIFY OPTIONS PATCH POST PROPFIND PROPPATCH PURGE PUT QUERY REBIND "
    b"REPORT SEARCH SOURCE SUBSCRIBE TRACE UNBIND UNLINK UNLOCK UNSUBSCRIBE".split()
)
_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_QUOTED = rb'"(?:[\t !#-\[\]-~\x80-\xff]|\\[\t -~\x80-\xff])*"'
# RFC 9112, section 3, lets a server take several spaces for one in this line.
_LINE = re.compile(rb"(" + _TOKEN + rb") +([!-~]+) +HTTP/(1\.[01])")
_FIELD = re.compile(rb"(" + _TOKEN + rb"):[ \t]*([\t -~\x80-\xff]*?)[ \t]*")
# A value may be empty here: it frames nothing.
_VALUE = rb"(?:[ \t]*=[ \t]*(?:" + _TOKEN + rb"|" + _QUOTED + rb")?)?"
_EXTENSION = rb"[ \t]*;[ \t]*" + _TOKEN + _VALUE
_CHUNK = re.compile(rb"([0-9A-Fa-f]+)((?:" + _EXTENSION + rb")*)")
_HOST = re.compile(rb"(?:\[[0-9A-Za-z:.%]+\]|[0-9A-Za-z._~!$&'()*+,;=%-]*)(?::[0-9]*)?")
_TARGET = re.compile(
    rb"(?:[A-Za-z]+://[0-9A-Za-z.-]+(?P<port>:[0-9]*)?)?(?P<path>/[^#]*|(?<!.)\*)(?P<fragment>#.*)?"
)


@dataclass(frozen=True)
class Request:
    """A request as the strict reader sees it.

    `target` is a path and a query. `may_be_refused` is why a server may be stricter: an unknown
    method, an odd target, white space around a chunk's extension, or a trailer that would frame a
    message.
    """

    method: bytes
    target: bytes
    body: bytes
    may_be_refused: str = ""


@dataclass
class Reading:
    """What a stream of bytes says.

    `end` is what follows the requests: nothing or an incomplete request ("open"), an error, or the
    end of the connection that the last request asks for ("close"). `begun` is the head of the
    request that is incomplete or malformed, if its head is neither.
    """

    requests: list[Request] = field(default_factory=list)
    begun: Request | None = None
    end: Literal["open", "error", "close"] = "open"


class _MalformedError(Exception):
    pass


class _IncompleteError(Exception):
    pass


def requests_in(stream: bytes) -> Reading:
    """Read all requests of a connection."""
    reading = Reading()
    rest = stream
    while reading.end == "open":
        try:
            # Empty lines before a request carry nothing, whatever ends them.
            rest = _read_request(rest.lstrip(b"\r\n"), reading)
        except _IncompleteError:
            return reading
        except _MalformedError:
            # A server may wait for the end of a head before it looks at it.
            whole = reading.begun is not None or b"\r\n\r\n" in rest.lstrip(b"\r\n")
            reading.end = "error" if whole else "open"
            return reading
    return reading


def _read_request(stream: bytes, reading: Reading) -> bytes:
    line, rest = _line(stream)
    fits = _LINE.fullmatch(line)
    if fits is None:
        raise _MalformedError
    method, target, version = fits.groups()
    fields, rest = _fields(rest)
    named = [name for name, _ in fields]
    if named.count(b"host") > 1 or (version == b"1.1" and b"host" not in named):
        raise _MalformedError
    if not all(_HOST.fullmatch(value) for name, value in fields if name == b"host"):
        raise _MalformedError
    if method == b"CONNECT":
        raise _MalformedError
    lengths = [value for name, value in fields if name == b"content-length"]
    codings = [value.lower() for name, value in fields if name == b"transfer-encoding"]
    if codings and (codings != [b"chunked"] or lengths or version == b"1.0"):
        raise _MalformedError
    if lengths and (len(lengths) > 1 or not lengths[0].isdigit() or int(lengths[0]) >= 2**64):
        raise _MalformedError
    odd = "" if method in METHODS else "unknown method"
    place = _TARGET.fullmatch(target)
    if place is None or place["fragment"] or place["port"]:
        odd = "odd target"
    if place is not None:
        target = place["path"]
    reading.begun = Request(method, target, b"", odd)
    if codings:
        body, trailers, spaces, rest = _chunks(rest)
        if spaces:
            odd = "white space in a chunk's extension"
        if {b"content-length", b"transfer-encoding"} & {name for name, _ in trailers}:
            odd = "framing trailer"
        fields += trailers
    else:
        size = int(lengths[0]) if lengths else 0
        if len(rest) < size:
            raise _IncompleteError
        body, rest = rest[:size], rest[size:]
    reading.begun = None
    reading.requests.append(Request(method, target, body, odd))
    options = b",".join(value for name, value in fields if name == b"connection").lower()
    if version == b"1.0" or b"close" in map(bytes.strip, options.split(b",")):
        reading.end = "close"
    return rest


def _line(stream: bytes) -> tuple[bytes, bytes]:
    line, end, rest = stream.partition(b"\r\n")
    if not end:
        raise _IncompleteError
    return line, rest


def _fields(stream: bytes) -> tuple[list[tuple[bytes, bytes]], bytes]:
    fields = []
    while True:
        line, stream = _line(stream)
        if not line:
            return fields, stream
        fits = _FIELD.fullmatch(line)
        if fits is None:
            raise _MalformedError
        fields.append((fits[1].lower(), fits[2]))


def _chunks(stream: bytes) -> tuple[bytes, list[tuple[bytes, bytes]], bool, bytes]:
    body, spaces = b"", False
    while True:
        line, stream = _line(stream)
        fits = _CHUNK.fullmatch(line)
        if fits is None or int(fits[1], 16) >= 2**64:
            raise _MalformedError
        spaces |= bool(re.search(rb"[ \t]", re.sub(_QUOTED, b"", fits[2])))
        size = int(fits[1], 16)
        if size == 0:
            trailers, stream = _fields(stream)
            return body, trailers, spaces, stream
        if len(stream) >= size + 2 and stream[size : size + 2] != b"\r\n":
            raise _MalformedError
        if len(stream) < size + 2:
            raise _IncompleteError
        body, stream = body + stream[:size], stream[size + 2 :]


@dataclass(frozen=True)
class Answer:
    """An answer of a server.

    `closes` is whether it says that it is the last, `number` which one it is by its application.
    """

    status: int
    closes: bool
    number: int | None


def answers_in(stream: bytes, methods: list[bytes]) -> list[Answer]:
    """Read the answers to requests with these methods; the stream must end with one.

    Every answer has a Content-Length; interim ones are left out.
    """
    answers: list[Answer] = []
    while stream:
        head, end, stream = stream.partition(b"\r\n\r\n")
        assert end, head
        first, *lines = head.split(b"\r\n")
        fits = re.fullmatch(rb"HTTP/1\.1 (\d\d\d) [ -~]*", first)
        assert fits, first
        if fits[1] == b"100":
            continue
        fields = dict(line.lower().split(b": ", 1) for line in lines)
        bare = methods[len(answers) : len(answers) + 1] == [b"HEAD"]
        size = 0 if bare else int(fields[b"content-length"])
        assert len(stream) >= size
        closes = fields.get(b"connection") == b"close"
        number = int(fields[b"x-answer"]) if b"x-answer" in fields else None
        answers.append(Answer(int(fits[1]), closes, number))
        stream = stream[size:]
    return answers
