"""The server's HTTP protocol on a transport in memory, in front of an application that records."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

from uvicorn.config import Config
from uvicorn.server import ServerState

from service.http.admission import Admission
from service.http.connections import ConnectionLimits, GuardedProtocol
from service.http.dialects import Dialects
from service.ipc.engine_client import Engines
from service.settings import Settings
from service.telemetry.counts import Counts

HEAD_BYTES = 4096
EARLY = b"/early"
"""The prefix of targets that are answered before the body is read."""


class Wire(asyncio.Transport):
    """A transport that records what is written.

    Args:
        half_closes: whether the writing side alone can be closed, as with TCP but not TLS.
    """

    def __init__(self, half_closes: bool = True) -> None:
        super().__init__({"peername": ("127.0.0.1", 5), "sockname": ("127.0.0.1", 80)})
        self.sent = b""
        self.half_closes = half_closes
        self.half_closed = self.closed = self.paused = False

    def write(self, data: Any) -> None:
        assert not self.closed
        assert not self.half_closed
        self.sent += data

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    abort = close

    def can_write_eof(self) -> bool:
        return self.half_closes

    def write_eof(self) -> None:
        self.half_closed = True

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False


class _RecordingCounts(Counts):
    """Records why connections ended, in order."""

    def __init__(self, breaks: list[str]) -> None:
        super().__init__()
        self._breaks = breaks

    def connection_ended(self, reason: str) -> None:
        self._breaks.append(reason)


@dataclass
class Connected:
    """A connection to the server.

    Attributes:
        protocol: the server's side.
        wire: the transport of the server.
        served: method, target and body of every request that the application has read, the body
            None where it answers without reading it; in the order of its answers.
        headers: those of every request, in the same order.
        breaks: why the connection was ended.
        dialects: the formats of answers to requests that do not reach the application.
    """

    wire: Wire
    server_state: ServerState
    served: list[tuple[bytes, bytes, bytes | None]] = field(default_factory=list)
    headers: list[list[tuple[bytes, bytes]]] = field(default_factory=list)
    breaks: list[str] = field(default_factory=list)
    hold: asyncio.Event | None = None
    """If given, no request is answered before it is set."""
    dialects: Dialects = field(default_factory=lambda: Dialects([]))

    def __post_init__(self) -> None:
        settings = Settings.model_construct(max_connections=5)
        self.admission = Admission(settings, Engines([]), _RecordingCounts(self.breaks))
        self.protocol = GuardedProtocol(
            limits=self.limits,
            admission=self.admission,
            dialects=self.dialects,
            refusable={b"/guarded": "/guarded"},
            config=_config(self._serve),
            server_state=self.server_state,
            app_state={},
            _loop=asyncio.get_running_loop(),
        )

    limits = ConnectionLimits(
        head_bytes=HEAD_BYTES, message_bytes=2**20, seconds=60, uploads={b"/upload": 2**22}
    )

    @property
    def over(self) -> bool:
        """Whether no further request can be served."""
        return self.protocol.transport.is_closing()

    async def send(self, parts: Iterable[bytes]) -> None:
        """Deliver the data of a client, part by part, as far as the server reads it."""
        for part in parts:
            while self.wire.paused and not self.wire.closed:
                await asyncio.sleep(0)
            if self.wire.closed:
                break
            self.protocol.data_received(part)
            await asyncio.sleep(0)
        await self.settle()

    async def settle(self) -> None:
        """Run the event loop until the server has answered every complete request."""
        for _ in range(6):
            await asyncio.sleep(0)
        while self.protocol.pipeline and not self.hold:
            await asyncio.sleep(0)
        for _ in range(6):
            await asyncio.sleep(0)

    async def _serve(
        self, scope: Any, receive: Callable[[], Any], send: Callable[[Any], Any]
    ) -> None:
        body, more = b"", True
        method, target, query = scope["method"].encode(), scope["raw_path"], scope["query_string"]
        target += b"?" + query if query else b""
        early = target.startswith(EARLY)
        while more and not early:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body, more = body + message["body"], message["more_body"]
        if self.hold is not None:
            await self.hold.wait()
        self.served.append((method, target, None if early else body))
        self.headers.append(list(scope["headers"]))
        headers = [(b"content-length", b"4"), (b"x-answer", b"%d" % len(self.served))]
        status = 401 if early else 200
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"well"})


_CONFIG: list[Config] = []


def _config(app: Any) -> Config:
    """Return uvicorn's configuration, which is only loaded once."""
    if not _CONFIG:
        _CONFIG.append(Config(app, lifespan="off", log_config=None, access_log=False, ws="none"))
        _CONFIG[0].load()
    _CONFIG[0].loaded_app = app
    return _CONFIG[0]


@contextmanager
def connected(
    half_closes: bool = True,
    server_state: ServerState | None = None,
    held: bool = False,
    dialects: Dialects | None = None,
) -> Iterator[Connected]:
    """Connect to the server; at the end the connection is lost."""
    connection = Connected(
        Wire(half_closes), server_state or ServerState(), dialects=dialects or Dialects([])
    )
    if held:
        connection.hold = asyncio.Event()
    connection.protocol.connection_made(connection.wire)
    yield connection
    connection.wire.closed = True
    connection.protocol.connection_lost(cast(Any, OSError()))
