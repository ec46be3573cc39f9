"""What the frontend makes of engines that refuse, fail, lie or die: played by scripted engines."""

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
"""What an engine does when asked: a message, bytes that are none, or None, its death."""


class ScriptedEngine:
    """An engine that loads whatever it is told to, and answers by script.

    Whoever connects anew meets one that has just begun.

    Attributes:
        protocol: version that it speaks.
        connections: when each began, on the monotonic clock.
    """

    def __init__(self, script: Script, broken: str = "") -> None:
        self.heard: list[ToEngine] = []
        self.protocol = protocol.PROTOCOL
        self.connections: list[float] = []
        self._script = script
        self._broken = broken

    async def came(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections.append(monotonic())
        frames.write(writer, Hello(self.protocol, 1, "cpu", "2", []))
        while (message := await frames.read(reader, protocol.TO_ENGINE)) is not None:
            self.heard.append(message)
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
    def asked(self) -> int:
        return sum(isinstance(message, Classify) for message in self.heard)


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
        held = Fleet(sockets, lambda index, event: events.append((index, event)))
        if loaded:
            held.wanted[KEY] = Path("/models/topics/1")
        held.start()
        stack.push_async_callback(held.stop)
        await until(lambda: len(held.alive) == len(scripted), "hellos")
        if loaded:
            await until(lambda: all(map(held.equipped, held.clients)), "loads")
        yield held


async def test_another_protocol_is_logged_once_and_asked_again_with_backoff() -> None:
    engine = ScriptedEngine(answers)
    with capture_logs() as lines:
        async with engines(engine, loaded=False) as held:
            engine.protocol += 1
            for client in held.clients:
                client.close()
            await until(lambda: len(engine.connections) == 5, "four refused connections")
            engine.protocol += 1
            await until(lambda: len(refusals(lines)) == 2, "word of the other version")
            engine.protocol = protocol.PROTOCOL
            await until(lambda: len(held.alive) == 1, "a version that is understood")
    assert [line["peer"] for line in refusals(lines)] == ["engine-0"] * 2
    assert len({line["reason"] for line in refusals(lines)}) == 2
    pauses = [after - before for before, after in pairwise(engine.connections[1:5])]
    assert all(pause >= 2**n * 0.1 for n, pause in enumerate(pauses)), pauses


def refusals(lines: Sequence[MutableMapping[str, Any]]) -> list[MutableMapping[str, Any]]:
    return [line for line in lines if line["event"] == "connection closed: peer not understood"]


async def test_an_answer() -> None:
    async with engines(ScriptedEngine(answers)) as held:
        answer = await held.classify(submission(items=3))
    assert len(answer) == 3
    assert (answer.budget_seconds, answer.queue_seconds, answer.compute_seconds) == (0.1, 0.2, 0.3)


async def test_what_the_engine_is_told() -> None:
    engine = ScriptedEngine(answers)
    async with engines(engine) as held:
        await held.classify(submission(seconds=20.0))
    message = engine.heard[-1]
    assert isinstance(message, Classify)
    assert (message.model, message.version, message.quality) == (*KEY, "balanced")
    assert 0 < message.remaining <= 20


async def test_a_refusal() -> None:
    async with engines(ScriptedEngine(lambda m: Refused(m.id, "queue_full", 7))) as held:
        with pytest.raises(RefusedError) as caught:
            await held.classify(submission())
    assert (caught.value.reason, caught.value.retry_after) == ("queue_full", 7)


async def test_a_deadline_that_passed() -> None:
    async with engines(ScriptedEngine(lambda m: Expired(m.id))) as held:
        with pytest.raises(DeadlineError):
            await held.classify(submission())


async def test_a_deadline_that_passed_before_it_was_sent() -> None:
    engine = ScriptedEngine(answers)
    async with engines(engine) as held:
        with pytest.raises(DeadlineError):
            await held.classify(submission(seconds=-1))
    assert engine.asked == 0


async def test_a_failure_with_its_reason() -> None:
    async with engines(ScriptedEngine(lambda m: Failed(m.id, "no such level"))) as held:
        with pytest.raises(EngineFailedError, match="no such level"):
            await held.classify(submission())


async def test_an_answer_that_does_not_fit() -> None:
    async with engines(ScriptedEngine(lambda m: Done(m.id))) as held:
        with pytest.raises(EngineFailedError):
            await held.classify(submission())


@pytest.mark.parametrize("last_words", [None, b"\xff\xff\xff\xff", b"\x01\x00\x00\x00\xc1"])
async def test_a_request_whose_engine_dies_is_done_by_another(last_words: bytes | None) -> None:
    def fails(_: Classify) -> bytes | None:
        return last_words

    first, second = ScriptedEngine(fails), ScriptedEngine(answers)
    async with engines(first, second) as held:
        assert len(await held.classify(submission())) == 1
    assert (first.asked, second.asked) == (1, 1)


async def test_one_that_dies_is_asked_again_when_it_is_back() -> None:
    replies = iter([dies, answers])
    engine = ScriptedEngine(lambda message: next(replies)(message))
    async with engines(engine) as held:
        answer = await held.classify(submission())
    assert len(answer) == 1
    assert engine.asked == 2


async def test_a_request_that_kills_two_engines_is_not_tried_on_a_third() -> None:
    all_three = [ScriptedEngine(dies) for _ in range(3)]
    async with engines(*all_three) as held:
        with pytest.raises(EngineDownError):
            await held.classify(submission())
    assert sum(engine.asked for engine in all_three) == 2


async def test_without_the_model_nobody_is_asked() -> None:
    engine = ScriptedEngine(answers)
    async with engines(engine, loaded=False) as held:
        with pytest.raises(NotLoadedError):
            await held.classify(submission())
    assert engine.asked == 0


async def test_a_model_that_cannot_be_loaded_is_known_by_its_reason() -> None:
    engine = ScriptedEngine(answers, broken="config.json: missing")
    async with engines(engine) as held:
        assert held.errors == ["config.json: missing"]
        assert held.models == set()
        with pytest.raises(NotLoadedError):
            await held.classify(submission())


async def test_a_load_that_one_engine_cannot_do_is_undone_in_the_others() -> None:
    sound = ScriptedEngine(answers)
    broken = ScriptedEngine(answers, broken="out of memory")
    async with engines(sound, broken, loaded=False) as held:
        with pytest.raises(LoadFailedError, match="out of memory"):
            await held.load(KEY, Path("/models/topics/1"))
        assert held.models == set()
        assert held.wanted == {}
    assert any(isinstance(message, Unload) for message in sound.heard)


async def test_one_that_comes_back_is_given_its_models_again() -> None:
    replies = iter([dies, answers])
    engine = ScriptedEngine(lambda message: next(replies)(message))
    async with engines(engine) as held:
        await held.classify(submission())
    assert sum(isinstance(message, Load) for message in engine.heard) == 2


async def test_a_caller_that_gives_up_cancels_its_request() -> None:
    waiting = asyncio.Event()

    def never(_: Classify) -> bytes:
        waiting.set()
        return b""

    engine = ScriptedEngine(never)
    async with engines(engine) as held:
        asking = asyncio.create_task(held.classify(submission()))
        await waiting.wait()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await until(lambda: any(isinstance(m, Cancel) for m in engine.heard), "the cancellation")
        assert held.clients[0].items_in_flight == 0
    (request,) = [m for m in engine.heard if isinstance(m, Classify)]
    (cancelled,) = [m for m in engine.heard if isinstance(m, Cancel)]
    assert cancelled.id == request.id


async def test_an_engine_that_never_answers_is_not_waited_for_beyond_the_deadline() -> None:
    async with engines(ScriptedEngine(lambda _: b"")) as held:
        with pytest.raises(DeadlineError):
            await held.classify(submission(seconds=0.05))


async def test_work_goes_to_the_engine_with_the_least_in_flight() -> None:
    first, second = ScriptedEngine(lambda _: b""), ScriptedEngine(lambda _: b"")
    async with engines(first, second) as held:
        tasks = [asyncio.create_task(held.classify(submission(items=n))) for n in (8, 1, 1, 1)]
        await until(lambda: first.asked + second.asked == 4, "arrival")
        assert sorted([first.asked, second.asked]) == [1, 3]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_engines_with_equally_much_in_flight_take_turns() -> None:
    scripted = [ScriptedEngine(answers) for _ in range(3)]
    async with engines(*scripted) as held:
        for _ in range(9):
            await held.classify(submission())
    assert [engine.asked for engine in scripted] == [3, 3, 3]


async def test_one_that_is_gone_does_not_break_the_turns_of_the_others() -> None:
    scripted = [ScriptedEngine(answers) for _ in range(3)]
    async with engines(*scripted) as held:
        held.clients[1].models = {}
        for _ in range(8):
            await held.classify(submission())
    assert [engine.asked for engine in scripted] == [4, 0, 4]


async def test_the_first_requests_of_several_frontends_go_to_different_engines() -> None:
    scripted = [ScriptedEngine(answers) for _ in range(4)]
    async with engines(*scripted) as held:
        sockets = [client._address for client in held.clients if isinstance(client._address, Path)]
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
    assert [engine.asked for engine in scripted] == [2, 2, 1, 1]
