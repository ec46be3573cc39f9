"""The client of engines, with scripted engines that refuse, fail, stop or do not answer."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Callable, MutableMapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import pairwise
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from structlog.testing import capture_logs

from service.control.fleet import Fleet, LoadFailedError
from service.ipc import engine_messages as protocol
from service.ipc import frames
from service.ipc.engine_client import (
    DeadlineError,
    EngineDownError,
    EngineFailedError,
    Engines,
    Event,
    NotLoadedError,
    RefusedError,
    Submission,
)
from service.ipc.engine_messages import (
    Answer,
    Cancel,
    Classify,
    Done,
    Expired,
    Failed,
    Hello,
    Load,
    ModelInfo,
    Models,
    Refused,
    SentAnswers,
    ToEngine,
    ToFrontend,
    Unload,
)
from tests.support.columns import answers_to, texts_of
from tests.support.waiting import until

KEY = ("topics", 1)
Script = Callable[[Classify], ToFrontend | bytes | None]
"""How an engine replies: with a message, with these bytes, or by closing the connection (None)."""


class ScriptedEngine:
    """An engine that loads any model and replies by a script; each connection is like a new one.

    Attributes:
        protocol: the version of the protocol that it states.
        connections: when each connection began, on the monotonic clock.
    """

    def __init__(self, script: Script, broken: str = "") -> None:
        self.received: list[ToEngine] = []
        self.protocol = protocol.PROTOCOL
        self.connections: list[float] = []
        self._script = script
        self._broken = broken

    async def came(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections.append(monotonic())
        frames.write(writer, Hello(self.protocol, 1, "cpu", "2", []))
        while (message := await frames.read(reader, protocol.TO_ENGINE)) is not None:
            self.received.append(message)
            match message:
                case Load() if self._broken:
                    frames.write(writer, Failed(message.id, self._broken))
                case Load():
                    frames.write(writer, Models([ModelInfo(*KEY, 0.1, 100, "float32")]))
                    frames.write(writer, Done(message.id))
                case Unload():
                    frames.write(writer, Models([]))
                    frames.write(writer, Done(message.id))
                case Classify():
                    reply = self._script(message)
                    if reply is None:
                        break
                    if isinstance(reply, bytes):
                        writer.write(reply)
                    else:
                        frames.write(writer, reply)
        writer.close()

    @property
    def request_count(self) -> int:
        return sum(isinstance(message, Classify) for message in self.received)


def answers(message: Classify) -> ToFrontend:
    sent = SentAnswers.of(answers_to(len(message.texts.read())))
    return Answer(message.id, sent, 0.1, 0.2, 0.3, "fast")


def dies(_: Classify) -> None:
    return None


def submission(seconds: float = 20.0, items: int = 1) -> Submission:
    texts = texts_of(*[[2, 5, 3]] * items)
    return Submission(*KEY, texts, "balanced", monotonic() + seconds)


@asynccontextmanager
async def engines(*scripted: ScriptedEngine, loaded: bool = True) -> AsyncIterator[Fleet]:
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bf-")))
        sockets = [folder / str(index) for index in range(len(scripted))]
        for one, socket in zip(scripted, sockets, strict=True):
            listening = await asyncio.start_unix_server(one.came, socket)
            stack.callback(listening.close)
        events: list[tuple[int, Event]] = []
        fleet = Fleet(sockets, lambda index, event: events.append((index, event)))
        if loaded:
            fleet.wanted[KEY] = Path("/models/topics/1")
        fleet.start()
        stack.push_async_callback(fleet.stop)
        await until(lambda: len(fleet.alive) == len(scripted), "hellos")
        if loaded:
            await until(lambda: all(map(fleet.equipped, fleet.clients)), "loads")
        yield fleet


async def test_another_protocol_version_is_logged_once_and_retried_with_backoff() -> None:
    engine = ScriptedEngine(answers)
    with capture_logs() as lines:
        async with engines(engine, loaded=False) as fleet:
            engine.protocol += 1
            for client in fleet.clients:
                client.close()
            await until(lambda: len(engine.connections) == 5, "four refused connections")
            engine.protocol += 1
            await until(lambda: len(refusals(lines)) == 2, "word of the other version")
            engine.protocol = protocol.PROTOCOL
            await until(lambda: len(fleet.alive) == 1, "a version that is understood")
    assert [line["peer"] for line in refusals(lines)] == ["engine-0"] * 2
    assert len({line["reason"] for line in refusals(lines)}) == 2
    pauses = [after - before for before, after in pairwise(engine.connections[1:5])]
    assert all(pause >= 2**n * 0.1 for n, pause in enumerate(pauses)), pauses


def refusals(lines: Sequence[MutableMapping[str, Any]]) -> list[MutableMapping[str, Any]]:
    return [line for line in lines if line["event"] == "connection closed: peer not understood"]


async def test_answers_are_returned_with_their_times() -> None:
    async with engines(ScriptedEngine(answers)) as fleet:
        answer = await fleet.classify(submission(items=3))
    assert len(answer) == 3
    assert (answer.budget_seconds, answer.queue_seconds, answer.compute_seconds) == (0.1, 0.2, 0.3)


async def test_the_request_contains_model_quality_and_remaining_time() -> None:
    engine = ScriptedEngine(answers)
    async with engines(engine) as fleet:
        await fleet.classify(submission(seconds=20.0))
    message = engine.received[-1]
    assert isinstance(message, Classify)
    assert (message.model, message.version, message.quality) == (*KEY, "balanced")
    assert 0 < message.remaining <= 20


async def test_a_refusal_raises_refused_error() -> None:
    async with engines(ScriptedEngine(lambda m: Refused(m.id, "queue_full", 7))) as fleet:
        with pytest.raises(RefusedError) as caught:
            await fleet.classify(submission())
    assert (caught.value.reason, caught.value.retry_after) == ("queue_full", 7)


async def test_an_expired_request_raises_deadline_error() -> None:
    async with engines(ScriptedEngine(lambda m: Expired(m.id))) as fleet:
        with pytest.raises(DeadlineError):
            await fleet.classify(submission())


async def test_requests_past_their_deadline_are_not_sent() -> None:
    engine = ScriptedEngine(answers)
    async with engines(engine) as fleet:
        with pytest.raises(DeadlineError):
            await fleet.classify(submission(seconds=-1))
    assert engine.request_count == 0


async def test_a_failure_is_raised_with_its_reason() -> None:
    async with engines(ScriptedEngine(lambda m: Failed(m.id, "no such level"))) as fleet:
        with pytest.raises(EngineFailedError, match="no such level"):
            await fleet.classify(submission())


async def test_an_unexpected_message_is_an_engine_failure() -> None:
    async with engines(ScriptedEngine(lambda m: Done(m.id))) as fleet:
        with pytest.raises(EngineFailedError):
            await fleet.classify(submission())


@pytest.mark.parametrize("last_words", [None, b"\xff\xff\xff\xff", b"\x01\x00\x00\x00\xc1"])
async def test_another_engine_takes_over_the_requests_of_a_lost_one(
    last_words: bytes | None,
) -> None:
    def fails(_: Classify) -> bytes | None:
        return last_words

    first, second = ScriptedEngine(fails), ScriptedEngine(answers)
    async with engines(first, second) as fleet:
        assert len(await fleet.classify(submission())) == 1
    assert (first.request_count, second.request_count) == (1, 1)


async def test_the_only_engine_gets_the_request_again_after_reconnecting() -> None:
    replies = iter([dies, answers])
    engine = ScriptedEngine(lambda message: next(replies)(message))
    async with engines(engine) as fleet:
        answer = await fleet.classify(submission())
    assert len(answer) == 1
    assert engine.request_count == 2


async def test_a_request_that_stops_two_engines_is_not_sent_to_a_third() -> None:
    all_three = [ScriptedEngine(dies) for _ in range(3)]
    async with engines(*all_three) as fleet:
        with pytest.raises(EngineDownError):
            await fleet.classify(submission())
    assert sum(engine.request_count for engine in all_three) == 2


async def test_engines_without_the_model_get_no_request() -> None:
    engine = ScriptedEngine(answers)
    async with engines(engine, loaded=False) as fleet:
        with pytest.raises(NotLoadedError):
            await fleet.classify(submission())
    assert engine.request_count == 0


async def test_the_reason_of_a_failed_load_is_kept() -> None:
    engine = ScriptedEngine(answers, broken="config.json: missing")
    async with engines(engine) as fleet:
        assert fleet.errors == ["config.json: missing"]
        assert fleet.models == set()
        with pytest.raises(NotLoadedError):
            await fleet.classify(submission())


async def test_a_load_that_fails_in_one_engine_is_undone_in_the_others() -> None:
    sound = ScriptedEngine(answers)
    broken = ScriptedEngine(answers, broken="out of memory")
    async with engines(sound, broken, loaded=False) as fleet:
        with pytest.raises(LoadFailedError, match="out of memory"):
            await fleet.load(KEY, Path("/models/topics/1"))
        assert fleet.models == set()
        assert fleet.wanted == {}
    assert any(isinstance(message, Unload) for message in sound.received)


async def test_a_reconnected_engine_loads_its_models_again() -> None:
    replies = iter([dies, answers])
    engine = ScriptedEngine(lambda message: next(replies)(message))
    async with engines(engine) as fleet:
        await fleet.classify(submission())
    assert sum(isinstance(message, Load) for message in engine.received) == 2


async def test_cancelling_a_call_cancels_its_request() -> None:
    waiting = asyncio.Event()

    def never(_: Classify) -> bytes:
        waiting.set()
        return b""

    engine = ScriptedEngine(never)
    async with engines(engine) as fleet:
        asking = asyncio.create_task(fleet.classify(submission()))
        await waiting.wait()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await until(lambda: any(isinstance(m, Cancel) for m in engine.received), "the cancellation")
        assert fleet.clients[0].items_in_flight == 0
    (request,) = [m for m in engine.received if isinstance(m, Classify)]
    (cancelled,) = [m for m in engine.received if isinstance(m, Cancel)]
    assert cancelled.id == request.id


async def test_the_wait_for_an_engine_ends_at_the_deadline() -> None:
    async with engines(ScriptedEngine(lambda _: b"")) as fleet:
        with pytest.raises(DeadlineError):
            await fleet.classify(submission(seconds=0.05))


async def test_requests_go_to_the_engine_with_the_fewest_items_in_flight() -> None:
    first, second = ScriptedEngine(lambda _: b""), ScriptedEngine(lambda _: b"")
    async with engines(first, second) as fleet:
        tasks = [asyncio.create_task(fleet.classify(submission(items=n))) for n in (8, 1, 1, 1)]
        await until(lambda: first.request_count + second.request_count == 4, "arrival")
        assert sorted([first.request_count, second.request_count]) == [1, 3]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_engines_with_equally_many_items_take_turns() -> None:
    scripted = [ScriptedEngine(answers) for _ in range(3)]
    async with engines(*scripted) as fleet:
        for _ in range(9):
            await fleet.classify(submission())
    assert [engine.request_count for engine in scripted] == [3, 3, 3]


async def test_the_others_take_turns_when_one_engine_has_no_model() -> None:
    scripted = [ScriptedEngine(answers) for _ in range(3)]
    async with engines(*scripted) as fleet:
        fleet.clients[1].models = {}
        for _ in range(8):
            await fleet.classify(submission())
    assert [engine.request_count for engine in scripted] == [4, 0, 4]


async def test_the_first_requests_of_several_frontends_go_to_different_engines() -> None:
    scripted = [ScriptedEngine(answers) for _ in range(4)]
    async with engines(*scripted) as fleet:
        sockets = [client._address for client in fleet.clients if isinstance(client._address, Path)]
        frontends = [Engines(sockets, first=index) for index in range(6)]
        async with AsyncExitStack() as stack:
            for frontend in frontends:
                frontend.start()
                stack.push_async_callback(frontend.stop)
            await until(lambda: all(len(frontend.alive) == 4 for frontend in frontends), "hellos")
            for frontend in frontends:
                for client in frontend.clients:
                    client.models = {KEY: ModelInfo(*KEY, 0.1, 100, "float32")}
                await frontend.classify(submission())
    assert [engine.request_count for engine in scripted] == [2, 2, 1, 1]
