"""The core of an engine without sockets: totals, batches, out of memory, lost devices."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from budgetformer.inference.packed import PackedTokens
from budgetformer.inference.texts import Texts
from service.engine.core import EngineCore, EngineOptions
from service.engine.device import EXIT_CODE
from service.engine.server import EngineServer
from service.ipc.engine_messages import (
    Answer,
    BatchReport,
    Cancel,
    Classify,
    Done,
    Expired,
    Failed,
    Load,
    Refused,
    SentTexts,
    ToFrontend,
)
from service.pipeline.served_models import open_model
from tests.support.serving import _replaced, held
from tests.support.stores import CHAINED, HEADS, labelled_sentences
from tests.support.waiting import until

TEXTS = [text for text, _ in labelled_sentences()][:40]
KEY = ("topics", 2)


class Clock:
    """A clock that tests advance."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Frontend:
    """Sends requests to a core, and keeps the last reply to each."""

    def __init__(self, core: EngineCore, texts: Texts) -> None:
        self.core = core
        self.replies: dict[int, ToFrontend] = {}
        self._texts = texts
        self._number = 0

    def ask(
        self, items: int, remaining: float = 1e6, heads: int | None = None, bulk: bool = False
    ) -> int:
        """Send a request; return its number."""
        self._number += 1
        some = SentTexts.of(self._texts.take([n % len(self._texts) for n in range(items)]))
        message = Classify(self._number, *KEY, some, "best", remaining, heads=heads, bulk=bulk)
        self.core.receive(message, self.reply)
        return self._number

    def cancel(self, number: int) -> None:
        """Give a request up."""
        self.core.receive(Cancel(number), self.reply)

    def reply(self, message: ToFrontend) -> None:
        number = getattr(message, "id", None)
        if number is not None:
            assert number not in self.replies, "a second reply"
            self.replies[number] = message


@pytest.fixture(scope="module")
def texts(model_store: Path) -> Texts:
    model = open_model(model_store / KEY[0] / str(KEY[1]))
    return Texts.of(model.encoder.encode(TEXTS))


@asynccontextmanager
async def loaded(
    store: Path, texts: Texts, options: EngineOptions, **parts: Any
) -> AsyncIterator[Frontend]:
    """Return a frontend of a core that has loaded a model but does not run yet."""
    core = EngineCore(options, precision="float32", **parts)
    frontend = Frontend(core, texts)
    core.receive(Load(0, str(store / KEY[0] / str(KEY[1]))), frontend.reply)
    await until(lambda: 0 in frontend.replies, "the load")
    assert isinstance(frontend.replies[0], Done)
    yield frontend


@asynccontextmanager
async def running(core: EngineCore) -> AsyncIterator[None]:
    work = asyncio.create_task(core.run())
    try:
        yield
    finally:
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)


def check_totals(core: EngineCore) -> None:
    """Compare the running totals with sums over all requests of the core."""
    beat, requests = core.heartbeat(0), list(core._requests.values())
    waiting = [span for request in requests for span in request.spans]
    seconds = sum(price for span in waiting for price in span.prices)
    undecided = sum(len(span) for span in waiting if span in core._undecided)
    assert beat.queue_items["topics"] == sum(map(len, waiting))
    assert beat.queue_seconds["topics"] == pytest.approx(seconds, abs=1e-6)
    running = sum(request.open - sum(map(len, request.spans)) for request in requests)
    assert beat.in_flight["topics"] == beat.queue_items["topics"] + running
    assert 0 <= running <= core._running  # which includes cancelled requests
    arrived = [span.owner.arrived for span in waiting]
    oldest = core._clock() - min(arrived) if arrived else 0.0
    assert beat.oldest_age["topics"] == pytest.approx(oldest)
    assert core._undecided_items == undecided
    assert len(core._buckets) == sum(map(len, waiting)) - undecided
    assert len(core._deadlines) == len(requests)


async def test_texts_wait_in_the_bucket_of_the_step_that_f_o_predicted(model_store: Path) -> None:
    model = open_model(model_store / CHAINED / "1")
    texts = [text for text, _ in labelled_sentences()]
    sent = SentTexts.of(Texts.of(model.encoder.encode(texts)))
    core, messages = EngineCore(EngineOptions(), precision="float32"), list[ToFrontend]()
    core.broadcast = messages.append
    core.receive(Load(0, str(model.checkpoint.path)), messages.append)
    await until(lambda: any(isinstance(one, Done) for one in messages), "the load")
    core.receive(Classify(1, CHAINED, 1, sent, "best", 1e6), messages.append)
    (request,) = core._requests.values()
    await core._decide()
    assert request.items.ran[:, 0].all()
    assert not request.items.ran[:, 1:].any()
    assert sum(map(len, request.spans)) == len(texts)
    for span in request.spans:
        for place in span.indices:
            assert span.bucket == (request.model, request.items.predicted[place])
    async with running(core):
        await until(lambda: isinstance(messages[-1], Answer), "the answer")
    answer = messages[-1]
    assert isinstance(answer, Answer)
    steps = answer.answers.read().all_steps()
    ran = Counter(step for own in steps for step in own if step)
    batches = [one for one in messages if isinstance(one, BatchReport)]
    assert ran == sum((Counter({one.budget: one.items}) for one in batches), Counter())
    assert set(map(tuple, steps)) == {(0, 1), (0, 2), (0, 1, 2)}
    assert core.queued_seconds == pytest.approx(0)


@pytest.mark.parametrize("seed", range(4))
async def test_totals_equal_sums_over_the_requests_after_any_sequence(
    model_store: Path, texts: Texts, seed: int
) -> None:
    draw, clock = random.Random(seed), Clock()
    options = EngineOptions(batch_items=4)
    async with loaded(model_store, texts, options, clock=clock) as frontend:
        core, asked = frontend.core, list[int]()
        async with running(core):
            for _ in range(150):
                match draw.choice(["ask", "ask", "cancel", "pass", "tick"]):
                    case "ask":
                        seconds = draw.choice([5.0, 1e6])
                        asked.append(frontend.ask(draw.choice([1, 2, 20]), seconds))
                    case "cancel" if asked:
                        frontend.cancel(draw.choice(asked))
                    case "pass":
                        await asyncio.sleep(draw.choice([0, 0.002]))
                    case "tick":
                        clock.now += draw.choice([0.5, 6.0])
                check_totals(core)
            clock.now += 1.0
            await until(lambda: not core._requests, "the last answer")
            await until(lambda: not core._running, "the last pass")
        check_totals(core)
        assert core.queued_seconds == 0.0
        assert core._queues == {}
        # Where the clock is moved while a batch runs, the engine counts itself slow and refuses.
        kinds = {type(reply) for reply in frontend.replies.values()} - {Refused}
        assert kinds == {Done, Answer, Expired}


async def test_cancelled_requests_leave_nothing_and_others_are_answered(
    model_store: Path, texts: Texts
) -> None:
    clock = Clock()
    async with (
        loaded(model_store, texts, EngineOptions(), clock=clock) as frontend,
        running(frontend.core),
    ):
        with held(frontend.core):
            kept, left = [], []
            for _ in range(100):
                kept.append(frontend.ask(1))
                left.append(frontend.ask(3))
            for number in left:
                frontend.cancel(number)
            frontend.cancel(12345)
            check_totals(frontend.core)
        await until(lambda: all(number in frontend.replies for number in kept), "answers")
        assert not set(left) & set(frontend.replies)
        check_totals(frontend.core)
        assert frontend.core.queued_seconds == 0.0


def short_of_memory(run: Callable[..., Any], room: list[int]) -> Callable[..., Any]:
    """Raise out of memory for batches of more than `room[0]` items."""

    def call(packed: PackedTokens, *arguments: Any) -> Any:
        if len(packed.lengths) > room[0]:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return run(packed, *arguments)

    return call


async def test_batches_grow_again_after_memory_is_free(model_store: Path, texts: Texts) -> None:
    async with loaded(model_store, texts, EngineOptions(batch_items=8)) as frontend:
        core = frontend.core
        network, room = core.models[KEY].network, [2]
        sizes: list[int] = []
        with _replaced(network, run=short_of_memory(network.run, room)):
            async with running(core):
                for _ in range(12):
                    if len(sizes) == 2:
                        room[0] = 100
                    number = frontend.ask(120, heads=HEADS)
                    await until(lambda n=number: n in frontend.replies, "answers")  # type: ignore[misc]
                    sizes.append(core.batch_items)
    assert sizes[1] <= 3
    assert sizes[2:] == sorted(sizes[2:])
    assert sizes[-1] == 8
    answers = [reply for reply in frontend.replies.values() if isinstance(reply, Answer)]
    assert len(answers) == 12
    assert not any(answer.answers.errors for answer in answers)


LOST = "CUDA error: an illegal memory access was encountered"


class LostDevice:
    """A device that is lost in the first pass, which a probe then reports."""

    def __init__(self) -> None:
        self.passes = 0

    def run(self, *_: Any) -> Any:
        self.passes += 1
        raise RuntimeError(LOST)

    def probe(self) -> None:
        if self.passes:
            raise RuntimeError(LOST)


async def test_a_lost_device_ends_the_engine_without_failing_texts(
    model_store: Path, texts: Texts
) -> None:
    device, codes = LostDevice(), list[int]()
    async with loaded(model_store, texts, EngineOptions(), probe=device.probe) as frontend:
        network = frontend.core.models[KEY].network
        with _replaced(network, run=device.run):
            for _ in range(192):
                frontend.ask(1, heads=HEADS)
            async with asyncio.timeout(20):
                await EngineServer(frontend.core, exit=codes.append).work()
    assert codes == [EXIT_CODE]
    assert device.passes == 1
    assert set(frontend.replies) == {0}


async def test_a_device_lost_during_a_load_ends_the_engine(
    model_store: Path, texts: Texts, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, codes = LostDevice(), list[int]()
    async with loaded(model_store, texts, EngineOptions(), probe=device.probe) as frontend:
        monkeypatch.setattr("service.engine.core.load_model", device.run)
        working = asyncio.create_task(EngineServer(frontend.core, exit=codes.append).work())
        frontend.core.receive(Load(7, "another/1"), frontend.reply)
        async with asyncio.timeout(20):
            await working
    assert codes == [EXIT_CODE]
    assert isinstance(frontend.replies[7], Failed)


async def test_only_the_failing_text_fails_on_a_working_device(
    model_store: Path, texts: Texts
) -> None:
    async with loaded(model_store, texts, EngineOptions()) as frontend:
        network = frontend.core.models[KEY].network
        run, lengths = network.run, texts.window.lengths

        def poisoned(packed: PackedTokens, *arguments: Any) -> Any:
            if lengths.max() in packed.lengths:
                raise RuntimeError("CUDA error: invalid argument")
            return run(packed, *arguments)

        with _replaced(network, run=poisoned):
            async with running(frontend.core):
                number = frontend.ask(len(texts), heads=HEADS)
                await until(lambda: number in frontend.replies, "answers")
    answer = frontend.replies[number]
    assert isinstance(answer, Answer)
    longest = np.flatnonzero(lengths == lengths.max()).tolist()
    assert sorted(answer.answers.errors) == longest


async def test_waiting_and_running_items_both_fill_the_queue(
    model_store: Path, texts: Texts
) -> None:
    options = EngineOptions(max_queue_items=10)
    async with loaded(model_store, texts, options) as frontend, running(frontend.core):
        with held(frontend.core):
            first = frontend.ask(4)
            await until(lambda: frontend.core._running == 4, "a pass")
            second, third = frontend.ask(6), frontend.ask(1)
            assert isinstance(frontend.replies[third], Refused)
            frontend.cancel(second)
            fourth = frontend.ask(6)
        await until(lambda: {first, fourth} <= set(frontend.replies), "answers")
    assert isinstance(frontend.replies[fourth], Answer)


async def test_interactive_texts_overtake_single_bulk_texts(
    model_store: Path, texts: Texts
) -> None:
    options = EngineOptions(batch_items=1)
    async with loaded(model_store, texts, options) as frontend:
        bulk = [frontend.ask(1, heads=1, bulk=True) for _ in range(20)]
        interactive = [frontend.ask(1, heads=1) for _ in range(4)]
        async with running(frontend.core):
            await until(lambda: set(bulk + interactive) <= set(frontend.replies), "all answers")
        answered = list(frontend.replies)
        assert max(answered.index(number) for number in interactive) < 8
