"""What the front holds of the engines: one connection each, requests in flight, health."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import structlog

from service.background import Background
from service.engine import protocol
from service.engine.protocol import (
    Answer,
    BatchRan,
    Cancel,
    Classify,
    Done,
    Expired,
    Failed,
    Heartbeat,
    Hello,
    ItemTokens,
    Load,
    ModelInfo,
    Refused,
    ToFront,
    Unload,
)
from service.observability.context import current_request

log = structlog.get_logger()

HEARTBEAT_LIMIT = 5.0
"""Seconds without a word after which an engine does not count as alive."""
RECONNECT_SECONDS = 0.05
GRACE_SECONDS = 1.0
"""How long past its deadline an answer is awaited, for an engine that cannot say so itself."""


@dataclass(frozen=True)
class Lost:
    """The connection to an engine broke."""


Event = Hello | Lost | Heartbeat | BatchRan | ModelInfo
ModelKey = tuple[str, int]
"""Name and version."""


class EngineDownError(Exception):
    """No engine could answer: none is there, or those that were died with the request twice."""


class NotLoadedError(Exception):
    """Engines are there, but none has the model."""


class DeadlineError(Exception):
    """The deadline passed before the answer was there."""


class EngineFailedError(Exception):
    """The engine says that it cannot do what was asked."""


@dataclass
class RefusedError(Exception):
    """The engine did not admit the request."""

    reason: str
    retry_after: int


class _DiedError(Exception):
    """The connection broke while a request was in flight."""


@dataclass(frozen=True)
class Job:
    """What to classify; `deadline` on the monotonic clock."""

    model: str
    version: int
    items: list[ItemTokens]
    quality: str | float
    deadline: float
    heads: int | None = None
    max_heads: int | None = None
    return_heads: bool = False
    target: float | None = None


class EngineClient:
    """The connection to one engine; it is made anew whenever it breaks."""

    def __init__(self, index: int, socket: Path, observe: Callable[[int, Event], None]) -> None:
        self.index = index
        self.hello: Hello | None = None
        self.models: dict[ModelKey, ModelInfo] = {}
        self.errors: dict[ModelKey, str] = {}
        self.heard = 0.0
        self.items_in_flight = 0
        self._socket = socket
        self._observe = observe
        self._writer: asyncio.StreamWriter | None = None
        self._pending: dict[int, asyncio.Future[ToFront]] = {}
        self._numbers = itertools.count()

    @property
    def alive(self) -> bool:
        """Whether the engine has said hello and was heard of lately."""
        return self.hello is not None and time.monotonic() - self.heard < HEARTBEAT_LIMIT

    async def stay_connected(self) -> None:
        """Connect, listen, and connect again, until cancelled."""
        while True:
            await asyncio.sleep(RECONNECT_SECONDS)
            try:
                reader, writer = await asyncio.open_unix_connection(self._socket)
            except OSError:
                continue
            self._writer = writer
            try:
                await self._listen(reader)
            except protocol.FrameError as error:
                log.error("an engine sent a bad frame", engine=self.index, reason=str(error))
            finally:
                self._lose(writer)

    async def ask(
        self, message: protocol.ToEngine, items: int = 0, timeout: float | None = None
    ) -> ToFront:
        """Send a message that has an `id` and await what the engine says to it.

        Raises:
            EngineDownError: the engine is not connected.
            _DiedError: the connection broke meanwhile.
            TimeoutError: no answer within `timeout` seconds.
        """
        writer = self._writer
        if writer is None or self.hello is None:
            raise EngineDownError
        number = next(self._numbers)
        future: asyncio.Future[ToFront] = asyncio.get_running_loop().create_future()
        self._pending[number] = future
        self.items_in_flight += items
        try:
            protocol.write(writer, msgspec.structs.replace(message, id=number))
            async with asyncio.timeout(timeout):
                return await future
        except BaseException:
            if not writer.is_closing():
                protocol.write(writer, Cancel(number))
            raise
        finally:
            self.items_in_flight -= items
            self._pending.pop(number, None)

    async def load(self, key: ModelKey, path: Path) -> None:
        """Load a checkpoint folder; what goes wrong is kept in `errors`.

        Raises:
            EngineFailedError: the checkpoint is damaged.
            EngineDownError: the engine is, or dies.
        """
        try:
            reply = await self.ask(Load(0, str(path)))
        except _DiedError as error:
            raise EngineDownError from error
        if isinstance(reply, Done) and reply.model is not None:
            self.models[key] = reply.model
            self.errors.pop(key, None)
            self._observe(self.index, reply.model)
            return
        self.errors[key] = (
            reply.message if isinstance(reply, Failed) else "an answer that does not fit"
        )
        raise EngineFailedError(self.errors[key])

    async def unload(self, key: ModelKey) -> None:
        """Free a model, if it is there."""
        self.errors.pop(key, None)
        if self.models.pop(key, None) is not None:
            with contextlib.suppress(_DiedError, EngineDownError):
                await self.ask(Unload(0, *key))

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        while (message := await protocol.read_to_front(reader)) is not None:
            self.heard = time.monotonic()
            match message:
                case Hello():
                    if message.protocol != protocol.PROTOCOL:
                        raise protocol.FrameError(f"it speaks protocol {message.protocol}")
                    self.hello = message
                    self._observe(self.index, message)
                case Heartbeat() | BatchRan():
                    self._observe(self.index, message)
                case _:
                    future = self._pending.get(message.id)
                    if future is not None and not future.done():
                        future.set_result(message)

    def _lose(self, writer: asyncio.StreamWriter) -> None:
        self._writer = self.hello = None
        self.models, self.errors = {}, {}
        self._observe(self.index, Lost())
        writer.close()
        for future in self._pending.values():
            if not future.done():
                future.set_exception(_DiedError())


class Engines:
    """All engines of this server, and the models that each is to have.

    An engine starts with none; whenever one says hello it is told to load what is wanted.

    Args:
        sockets: where each one listens.
        observe: is told of hellos, loaded models, heartbeats, batches and broken connections, with
            the engine's index.
    """

    def __init__(self, sockets: list[Path], observe: Callable[[int, Event], None]) -> None:
        self.wanted: dict[ModelKey, Path] = {}
        self._observe = observe
        self.clients = [EngineClient(i, socket, self._event) for i, socket in enumerate(sockets)]
        self._background = Background()

    def start(self) -> None:
        """Begin to connect."""
        for client in self.clients:
            self._background.start(client.stay_connected())

    async def stop(self) -> None:
        """Let the connections go."""
        await self._background.stop()

    @property
    def alive(self) -> list[EngineClient]:
        """The engines that were heard of lately."""
        return [client for client in self.clients if client.alive]

    @property
    def models(self) -> dict[ModelKey, ModelInfo]:
        """Every model that some live engine serves."""
        return {key: info for client in self.alive for key, info in client.models.items()}

    @property
    def errors(self) -> list[str]:
        """Checkpoints that could not be loaded, and why."""
        return sorted({error for client in self.alive for error in client.errors.values()})

    def _event(self, index: int, event: Event) -> None:
        if isinstance(event, Hello):
            self._background.start(self._equip(self.clients[index]))
        self._observe(index, event)

    async def _equip(self, client: EngineClient) -> None:
        for key, path in list(self.wanted.items()):
            try:
                await client.load(key, path)
            except EngineFailedError as error:
                log.error("model not loaded", model=key[0], engine=client.index, reason=str(error))
            except EngineDownError:
                return

    async def classify(self, job: Job) -> Answer:
        """Have a job done by the engine with the least in flight; if it dies, by another.

        Raises:
            EngineDownError, NotLoadedError, RefusedError, DeadlineError, EngineFailedError: see
                there.
        """
        context = current_request()
        for attempt in (1, 2):
            client = await self._choose(job, wait=attempt == 2)
            remaining = job.deadline - time.monotonic()
            if remaining <= 0:
                raise DeadlineError
            message = Classify(
                0, job.model, job.version, job.items, job.quality, remaining,
                job.heads, job.max_heads, job.return_heads, job.target,
                context.request_id, context.traceparent,
            )  # fmt: skip
            try:
                reply = await client.ask(message, len(job.items), remaining + GRACE_SECONDS)
            except TimeoutError as error:
                raise DeadlineError from error
            except _DiedError:
                log.warning(
                    "an engine died with a request in flight", engine=client.index, attempt=attempt
                )
                continue
            match reply:
                case Answer():
                    return reply
                case Refused(reason=reason, retry_after=seconds):
                    raise RefusedError(reason, seconds)
                case Expired():
                    raise DeadlineError
                case Failed(message=text):
                    raise EngineFailedError(text)
                case _:
                    raise EngineFailedError("an engine gave an answer that does not fit")
        raise EngineDownError

    async def load(self, key: ModelKey, path: Path) -> None:
        """Have every engine load a checkpoint folder, beside what it has.

        Raises:
            EngineFailedError: one could not; then none keeps it.
            EngineDownError: there is none, or one died.
        """
        clients = self.alive
        if not clients:
            raise EngineDownError
        results = await asyncio.gather(
            *(client.load(key, path) for client in clients), return_exceptions=True
        )
        failures = [result for result in results if isinstance(result, BaseException)]
        if failures:
            if key not in self.wanted:
                await self.unload(key)
            raise failures[0]
        self.wanted[key] = path

    async def unload(self, key: ModelKey) -> None:
        """Have every engine free a model version."""
        self.wanted.pop(key, None)
        await asyncio.gather(*(client.unload(key) for client in self.alive))

    async def _choose(self, job: Job, wait: bool) -> EngineClient:
        """Return the least loaded engine that has the model; `wait` lets a restart finish first."""
        while True:
            alive = self.alive
            able = [client for client in alive if (job.model, job.version) in client.models]
            if able:
                return min(able, key=lambda client: client.items_in_flight)
            if not wait or time.monotonic() >= job.deadline:
                raise NotLoadedError if alive else EngineDownError
            await asyncio.sleep(RECONNECT_SECONDS)
