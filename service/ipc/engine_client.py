"""Client of the engines: connections, choice of an engine, requests in flight, health."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
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
    Address,
    Connection,
    DisconnectedError,
    unreachable,
)
from service.ipc.engine_messages import (
    Answer,
    BatchReport,
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
"""Seconds without a message after which an engine counts as hung."""
GRACE_SECONDS = 1.0
"""Time past the deadline in which the engine itself can report that the deadline passed."""


@dataclass(frozen=True)
class Disconnected:
    """The connection to an engine broke."""


Event = Hello | Models | Disconnected | Heartbeat | BatchReport
ModelKey = tuple[str, int]
"""Name and version."""


class EngineDownError(Exception):
    """No engine is alive, or two attempts ended with a lost connection."""


class NotLoadedError(Exception):
    """Engines are alive, but none has the model."""


class DeadlineError(Exception):
    """The deadline passed before the answer."""


class EngineFailedError(Exception):
    """The engine failed to handle the request."""


@dataclass
class RefusedError(Exception):
    """The engine did not admit the request."""

    reason: str
    retry_after: int


@dataclass(frozen=True)
class Submission:
    """Texts to classify, with options as in `Classify`; `deadline` is on the monotonic clock."""

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
        """Return the submission for the texts with these indices."""
        decided = self.decided and self.decided.part(np.array(places))
        return replace(self, texts=self.texts.take(places), decided=decided)


def request_of(submission: Submission) -> Classify:
    """Return the message for a submission.

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
    """Return the answers in the reply to a `Classify`.

    Raises:
        RefusedError, DeadlineError, EngineFailedError: the reply is not an `Answer`.
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
            raise EngineFailedError(f"unexpected reply of an engine: {type(reply).__name__}")


class EngineState(msgspec.Struct, frozen=True, array_like=True):
    """State of an engine as a process that is connected to it knows it.

    Attributes:
        index: index of the engine.
        hello: first message of the engine.
        silent_seconds: time since its last message.
        models: loaded models.
        items: number of unanswered items.
        level: quality level in force.
    """

    index: int
    hello: Hello
    silent_seconds: float
    models: list[ModelInfo]
    items: int
    level: QualityName


class EngineClient(Connection):
    """The connection to one engine.

    Args:
        index: index of the engine.
        address: address of the engine.
        observe: called with the index and each event.

    Attributes:
        hello: first message of the engine; None: it is not connected.
        models: models that the engine serves.
        items_in_flight: number of texts that the engine has not answered yet.
    """

    def __init__(self, index: int, address: Address, observe: Callable[[int, Event], None]) -> None:
        super().__init__(f"engine-{index}", address, protocol.TO_FRONTEND)
        self.index = index
        self.hello: Hello | None = None
        self.models: dict[ModelKey, ModelInfo] = {}
        self.items_in_flight = 0
        self.level = DEFAULT_QUALITY
        """Quality level in force for requests of quality `auto`."""
        self._observe = observe

    @classmethod
    def from_state(cls, state: EngineState) -> EngineClient:
        """Return the state of an engine that another process is connected to."""
        client = cls(state.index, unreachable, lambda *_: None)
        client.hello, client.items_in_flight, client.level = state.hello, state.items, state.level
        client.last_seen = time.monotonic() - state.silent_seconds
        client._set_models(state.models)
        return client

    def state(self, items: int) -> EngineState | None:
        """Return the state of the engine, with `items` in flight; None: it is not connected."""
        if self.hello is None:
            return None
        silent, models = time.monotonic() - self.last_seen, list(self.models.values())
        return EngineState(self.index, self.hello, silent, models, items, self.level)

    @property
    def alive(self) -> bool:
        """Whether the engine is connected and not hung."""
        return self.hello is not None and time.monotonic() - self.last_seen < HEARTBEAT_LIMIT

    def _on_message(self, message: protocol.ToFrontend) -> None:
        match message:
            case Hello():
                if message.protocol != protocol.PROTOCOL:
                    self._refuse(f"protocol {message.protocol} instead of {protocol.PROTOCOL}")
                    return
                self.hello = message
                self._set_models(message.models)
                self._observe(self.index, message)
            case Models():
                self._set_models(message.models)
                self._observe(self.index, message)
            case Heartbeat():
                self.level = message.quality
                self._observe(self.index, message)
            case LevelChanged():
                self.level = message.quality
            case BatchReport():
                self._observe(self.index, message)
            case _:
                super()._on_message(message)

    def drop(self) -> None:
        """Disconnect an engine that hangs, so that its requests go to another one."""
        log.warning("unresponsive engine disconnected", engine=self.index)
        self.close()

    def _set_models(self, models: list[ModelInfo]) -> None:
        self.models = {(model.name, model.version): model for model in models}

    def _on_abandoned(self, number: int) -> None:
        self.send(Cancel(number))

    def _on_disconnect(self) -> None:
        self.hello = None
        self.models = {}
        self._observe(self.index, Disconnected())


class Engines:
    """All engines of this server.

    Args:
        sockets: socket of each engine.
        observe: called with the engine's index and each event.
        first: index of the engine that gets the first request. With a different one in each
            frontend, idle frontends do not all send to the same engine.
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
        self._background.start(on_silence(self._last_messages, HEARTBEAT_LIMIT, EngineClient.drop))

    async def stop(self) -> None:
        """Close the connections."""
        await self._background.stop()

    def _last_messages(self) -> dict[EngineClient, float]:
        return {client: client.last_seen for client in self.clients if client.hello is not None}

    @property
    def alive(self) -> list[EngineClient]:
        """The engines that are connected and not hung."""
        return [client for client in self.clients if client.alive]

    @property
    def models(self) -> set[ModelKey]:
        """Every model that a live engine serves."""
        return {key for client in self.alive for key in client.models}

    @property
    def level(self) -> QualityName:
        """Quality level for requests of quality `auto`: the lowest in force in a live engine."""
        levels = {client.level for client in self.alive}
        return next((name for name in QUALITY_NAMES if name in levels), DEFAULT_QUALITY)

    async def classify(self, submission: Submission) -> Answers:
        """Return the answers of the engine with the fewest texts in flight; retry once if it dies.

        Raises:
            EngineDownError, NotLoadedError, RefusedError, DeadlineError, EngineFailedError: there
                is no answer; the class says why.
        """
        for attempt in (1, 2):
            client = await self._choose(submission, wait=attempt == 2)
            message = request_of(submission)
            client.items_in_flight += len(submission.texts)
            try:
                reply = await client.request(message, message.remaining + GRACE_SECONDS)
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
        """Return the engine with the fewest texts in flight among those that have the model.

        Engines with equally many texts take turns. `wait` waits for an engine to restart.
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
