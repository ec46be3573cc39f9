"""A strict parser of HTTP/1 requests by RFC 9112, as a reference, and a parser of answers.

`requests_in` is slow but short, so that it can be checked by reading it.
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
# RFC 9112, section 3, allows a server to accept several spaces as one in this line.
_LINE = re.compile(rb"(" + _TOKEN + rb") +([!-~]+) +HTTP/(1\.[01])")
_FIELD = re.compile(rb"(" + _TOKEN + rb"):[ \t]*([\t -~\x80-\xff]*?)[ \t]*")
# A value may be empty, as it has no effect on the framing.
_VALUE = rb"(?:[ \t]*=[ \t]*(?:" + _TOKEN + rb"|" + _QUOTED + rb")?)?"
_EXTENSION = rb"[ \t]*;[ \t]*" + _TOKEN + _VALUE
_CHUNK = re.compile(rb"([0-9A-Fa-f]+)((?:" + _EXTENSION + rb")*)")
_HOST = re.compile(rb"(?:\[[0-9A-Za-z:.%]+\]|[0-9A-Za-z._~!$&'()*+,;=%-]*)(?::[0-9]*)?")
_TARGET = re.compile(
    rb"(?:[A-Za-z]+://[0-9A-Za-z.-]+(?P<port>:[0-9]*)?)?(?P<path>/[^#]*|(?<!.)\*)(?P<fragment>#.*)?"
)


@dataclass(frozen=True)
class Request:
    """A request as the strict parser reads it.

    `target` is a path and a query. `may_be_refused` is why a server may be stricter: an unknown
    method, an unusual target, white space around the extension of a chunk, or a trailer that
    would frame a message.
    """

    method: bytes
    target: bytes
    body: bytes
    may_be_refused: str = ""


@dataclass
class Reading:
    """The requests in a stream of bytes.

    `end` is what follows the requests: nothing or an incomplete request ("open"), an error, or the
    end of the connection that the last request asks for ("close"). `begun` is the valid head of a
    request whose body is incomplete or malformed.
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
            # Empty lines before a request are ignored, with any line ends.
            rest = _read_request(rest.lstrip(b"\r\n"), reading)
        except _IncompleteError:
            return reading
        except _MalformedError:
            # A server may wait for the end of a head before it checks it.
            whole = reading.begun is not None or b"\r\n\r\n" in rest.lstrip(b"\r\n")
            reading.end = "error" if whole else "open"
            return reading
    return reading


def _read_request(stream: bytes, reading: Reading) -> bytes:
    line, rest = _line(stream)
    match = _LINE.fullmatch(line)
    if match is None:
        raise _MalformedError
    method, target, version = match.groups()
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
    may_be_refused_because = "" if method in METHODS else "unknown method"
    parts = _TARGET.fullmatch(target)
    if parts is None or parts["fragment"] or parts["port"]:
        may_be_refused_because = "may_be_refused_because target"
    if parts is not None:
        target = parts["path"]
    reading.begun = Request(method, target, b"", may_be_refused_because)
    if codings:
        body, trailers, spaces, rest = _chunks(rest)
        if spaces:
            may_be_refused_because = "white space in a chunk's extension"
        if {b"content-length", b"transfer-encoding"} & {name for name, _ in trailers}:
            may_be_refused_because = "framing trailer"
        fields += trailers
    else:
        size = int(lengths[0]) if lengths else 0
        if len(rest) < size:
            raise _IncompleteError
        body, rest = rest[:size], rest[size:]
    reading.begun = None
    reading.requests.append(Request(method, target, body, may_be_refused_because))
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
        match = _FIELD.fullmatch(line)
        if match is None:
            raise _MalformedError
        fields.append((match[1].lower(), match[2]))


def _chunks(stream: bytes) -> tuple[bytes, list[tuple[bytes, bytes]], bool, bytes]:
    body, spaces = b"", False
    while True:
        line, stream = _line(stream)
        match = _CHUNK.fullmatch(line)
        if match is None or int(match[1], 16) >= 2**64:
            raise _MalformedError
        spaces |= bool(re.search(rb"[ \t]", re.sub(_QUOTED, b"", match[2])))
        size = int(match[1], 16)
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

    `closes`: whether it announces the end of the connection; `number`: that of the application.
    """

    status: int
    closes: bool
    number: int | None


def answers_in(stream: bytes, methods: list[bytes]) -> list[Answer]:
    """Read the answers to requests with these methods; the stream must end with one.

    Every answer must have a Content-Length; interim ones are omitted.
    """
    answers: list[Answer] = []
    while stream:
        head, end, stream = stream.partition(b"\r\n\r\n")
        assert end, head
        first, *lines = head.split(b"\r\n")
        match = re.fullmatch(rb"HTTP/1\.1 (\d\d\d) [ -~]*", first)
        assert match, first
        if match[1] == b"100":
            continue
        fields = dict(line.lower().split(b": ", 1) for line in lines)
        bare = methods[len(answers) : len(answers) + 1] == [b"HEAD"]
        size = 0 if bare else int(fields[b"content-length"])
        assert len(stream) >= size
        closes = fields.get(b"connection") == b"close"
        number = int(fields[b"x-answer"]) if b"x-answer" in fields else None
        answers.append(Answer(int(match[1]), closes, number))
        stream = stream[size:]
    return answers
