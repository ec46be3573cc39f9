"""What a frontend holds of the engines: one connection each, requests in flight, health."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import structlog

from budgetformer.inference.decider import Decided
from budgetformer.inference.policy import QUALITY_NAMES, QualityName
from budgetformer.inference.texts import Texts
from budgetformer.model.tfidf import Array
from service.background import Background
from service.ipc import engine_messages as protocol
from service.ipc.answers import Answers
from service.ipc.connection import (
    RECONNECT_SECONDS,
    Connection,
    DisconnectedError,
    Place,
    nowhere,
)
from service.ipc.engine_messages import (
    Answer,
    BatchRan,
    Cancel,
    Classify,
    Decisions,
    Expired,
    Failed,
    Heartbeat,
    Hello,
    LevelChanged,
    ModelInfo,
    Models,
    Refused,
    SentTexts,
    pack,
)
from service.process import on_silence
from service.settings import DEFAULT_QUALITY
from service.telemetry.context import current_request

log = structlog.get_logger()

HEARTBEAT_LIMIT = 5.0
"""Seconds without a word after which an engine does not count as alive."""
GRACE_SECONDS = 1.0
"""How long past its deadline an answer is awaited, for an engine that cannot say so itself."""


@dataclass(frozen=True)
class Lost:
    """The connection to an engine broke."""


Event = Hello | Models | Lost | Heartbeat | BatchRan
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


@dataclass(frozen=True)
class Submission:
    """Texts to classify by an engine; `deadline` on the monotonic clock, the rest as `Classify`."""

    model: str
    version: int
    texts: Texts
    quality: str | float
    deadline: float
    heads: int | None = None
    max_heads: int | None = None
    return_heads: bool = False
    target: float | None = None
    decided: Decided | None = None
    steps: Array | None = None
    bulk: bool = False

    def part(self, places: list[int]) -> Submission:
        """Return a submission of the texts at some places only."""
        decided = self.decided and self.decided.part(np.array(places))
        return replace(self, texts=self.texts.take(places), decided=decided)


def request_of(submission: Submission) -> Classify:
    """Return the message that sends a submission to an engine.

    Raises:
        DeadlineError: the deadline has passed.
    """
    context = current_request()
    remaining = submission.deadline - time.monotonic()
    if remaining <= 0:
        raise DeadlineError
    return Classify(
        0, submission.model, submission.version,
        SentTexts.of(submission.texts, submission.decided is None),
        submission.quality, remaining, submission.heads, submission.max_heads,
        submission.return_heads, submission.target, context.request_id, context.traceparent,
        b"" if submission.steps is None else pack(submission.steps, "<i4"),
        None if submission.decided is None else Decisions.of(submission.decided), submission.bulk,
    )  # fmt: skip


def answers_of(reply: protocol.ToFrontend) -> Answers:
    """Return what an engine answers to a `Classify`.

    Raises:
        RefusedError, DeadlineError, EngineFailedError: see there.
    """
    match reply:
        case Answer():
            return replace(
                reply.answers.read(),
                budget_seconds=reply.budget_seconds,
                queue_seconds=reply.queue_seconds,
                compute_seconds=reply.compute_seconds,
                quality=reply.quality,
            )
        case Refused(reason=reason, retry_after=seconds):
            raise RefusedError(reason, seconds)
        case Expired():
            raise DeadlineError
        case Failed(message=text):
            raise EngineFailedError(text)
        case _:
            raise EngineFailedError("an engine gave an answer that does not fit")


class EngineClient(Connection):
    """The connection to one engine."""

    def __init__(self, index: int, place: Place, observe: Callable[[int, Event], None]) -> None:
        super().__init__(f"engine-{index}", place, protocol.TO_FRONT)
        self.index = index
        self.hello: Hello | None = None
        self.models: dict[ModelKey, ModelInfo] = {}
        self.items_in_flight = 0
        self.level = DEFAULT_QUALITY
        """Quality level in force for requests that leave it open."""
        self._observe = observe

    @classmethod
    def seen(
        cls,
        index: int,
        hello: Hello,
        heard: float,
        models: list[ModelInfo],
        items: int,
        level: QualityName,
    ) -> EngineClient:
        """Return an engine as another process has seen it; it is not connected to."""
        client = cls(index, nowhere, lambda *_: None)
        client.level = level
        client.hello, client.heard, client.items_in_flight = hello, heard, items
        client._know(models)
        return client

    @property
    def alive(self) -> bool:
        """Whether the engine has said hello and was heard of lately."""
        return self.hello is not None and time.monotonic() - self.heard < HEARTBEAT_LIMIT

    def _take(self, message: protocol.ToFrontend) -> None:
        match message:
            case Hello():
                if message.protocol != protocol.PROTOCOL:
                    self._refuse(f"protocol {message.protocol} instead of {protocol.PROTOCOL}")
                    return
                self.hello = message
                self._know(message.models)
                self._observe(self.index, message)
            case Models():
                self._know(message.models)
                self._observe(self.index, message)
            case Heartbeat():
                self.level = message.quality
                self._observe(self.index, message)
            case LevelChanged():
                self.level = message.quality
            case BatchRan():
                self._observe(self.index, message)
            case _:
                super()._take(message)

    def drop(self) -> None:
        """Give up an engine that hangs: what it was asked is asked of another."""
        log.warning("unresponsive engine disconnected", engine=self.index)
        self.close()

    def _know(self, models: list[ModelInfo]) -> None:
        self.models = {(model.name, model.version): model for model in models}

    def _given_up(self, number: int) -> None:
        self.say(Cancel(number))

    def _lost(self) -> None:
        self.hello = None
        self.models = {}
        self._observe(self.index, Lost())


class Engines:
    """All engines of this server.

    Args:
        sockets: where each one listens.
        observe: is called with the engine's index for hellos, changed models, heartbeats, batches
            and broken connections.
        first: index of the engine that gets the first request. Frontends that start with different
            engines do not all send theirs to the same one while they hold nothing.
    """

    def __init__(
        self,
        sockets: list[Path],
        observe: Callable[[int, Event], None] = lambda *_: None,
        first: int = 0,
    ) -> None:
        self.clients = [EngineClient(i, socket, observe) for i, socket in enumerate(sockets)]
        self._next = first
        self._background = Background()

    def start(self) -> None:
        """Begin to connect."""
        for client in self.clients:
            self._background.start(client.stay_connected())
        self._background.start(on_silence(self._last_words, HEARTBEAT_LIMIT, EngineClient.drop))

    async def stop(self) -> None:
        """Let the connections go."""
        await self._background.stop()

    def _last_words(self) -> dict[EngineClient, float]:
        return {client: client.heard for client in self.clients if client.hello is not None}

    @property
    def alive(self) -> list[EngineClient]:
        """The engines that were heard of lately."""
        return [client for client in self.clients if client.alive]

    @property
    def models(self) -> set[ModelKey]:
        """Every model that some live engine serves."""
        return {key for client in self.alive for key in client.models}

    @property
    def level(self) -> QualityName:
        """Quality level for requests that leave it open: the lowest in force in a live engine."""
        levels = {client.level for client in self.alive}
        return next((name for name in QUALITY_NAMES if name in levels), DEFAULT_QUALITY)

    async def classify(self, submission: Submission) -> Answers:
        """Classify on the engine with the least in flight; if it dies, on another.

        Raises:
            EngineDownError, NotLoadedError, RefusedError, DeadlineError, EngineFailedError: see
                there.
        """
        for attempt in (1, 2):
            client = await self._choose(submission, wait=attempt == 2)
            message = request_of(submission)
            client.items_in_flight += len(submission.texts)
            try:
                reply = await client.ask(message, message.remaining + GRACE_SECONDS)
            except TimeoutError as error:
                raise DeadlineError from error
            except DisconnectedError:
                log.warning(
                    "engine died with a request in flight", engine=client.index, attempt=attempt
                )
                continue
            finally:
                client.items_in_flight -= len(submission.texts)
            return answers_of(reply)
        raise EngineDownError

    async def _choose(self, submission: Submission, wait: bool) -> EngineClient:
        """Return the engine with the least in flight of those that have the model.

        Engines with equally many items take turns. `wait` lets a restart finish first.
        """
        while True:
            alive = self.alive
            able = [
                client
                for client in alive
                if (submission.model, submission.version) in client.models
            ]
            if able:
                chosen = min(able, key=self._rank)
                self._next = chosen.index + 1
                return chosen
            if not wait or time.monotonic() >= submission.deadline:
                raise NotLoadedError if alive else EngineDownError
            await asyncio.sleep(RECONNECT_SECONDS)

    def _rank(self, client: EngineClient) -> tuple[int, int]:
        turn = (client.index - self._next) % len(self.clients)
        return client.items_in_flight, turn
