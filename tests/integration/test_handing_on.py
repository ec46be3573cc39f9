"""An engine that computes small steps only gives the rest back, and another one ends it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from service.engine.core import EngineCore, EngineOptions
from service.engine.protocol import Answer, Classify, Failed, ItemTokens, Load, ToFront, pack_ids
from service.models import open_model
from tests.support.stores import labelled_sentences

TEXTS = [text for text, _ in labelled_sentences()][:40]


@asynccontextmanager
async def running(store: Path, max_step: int | None) -> AsyncIterator[EngineCore]:
    core = EngineCore(EngineOptions(max_step=max_step), precision="float32")
    work = asyncio.create_task(core.run())
    try:
        await asked(core, Load(0, str(store / "topics" / "2")))
        yield core
    finally:
        work.cancel()


async def asked(core: EngineCore, message: Classify | Load) -> ToFront:
    future: asyncio.Future[ToFront] = asyncio.get_running_loop().create_future()
    core.receive(message, lambda told: future.done() or future.set_result(told))
    async with asyncio.timeout(60):
        return await future


@pytest.fixture
def items(model_store: Path) -> list[ItemTokens]:
    model = open_model(model_store / "topics" / "2")
    return [ItemTokens(pack_ids(encoding.ids)) for encoding in model.encoder.encode(list(TEXTS))]


def classify(items: list[ItemTokens], steps: list[int] | None = None) -> Classify:
    return Classify(7, "topics", 2, items, "best", 60.0, return_heads=True, steps=steps)


async def answered(core: EngineCore, message: Classify) -> Answer:
    answer = await asked(core, message)
    assert isinstance(answer, Answer), answer
    return answer


async def test_two_engines_answer_together_what_one_answers_alone(
    model_store: Path, items: list[ItemTokens]
) -> None:
    async with AsyncExitStack() as stack:
        alone, small, large = [
            await stack.enter_async_context(running(model_store, step)) for step in (None, 0, None)
        ]
        right = await answered(alone, classify(items))
        begun = await answered(small, classify(items))
        left = [place for place, item in enumerate(begun.items) if item.next_step]
        assert left
        steps = [begun.items[place].next_step for place in left]
        ended = await answered(large, classify([items[place] for place in left], steps))
    for place, item in enumerate(begun.items):
        if place not in left:
            assert item == right.items[place]
    for place, item in zip(left, ended.items, strict=True):
        expected = right.items[place]
        assert not item.next_step
        assert item.logits == pytest.approx(expected.logits, rel=1e-4, abs=1e-5)
        assert (item.budget, item.heads, item.chosen) == (
            expected.budget, expected.heads, expected.chosen,
        )  # fmt: skip


async def test_what_was_given_back_was_paid_for(model_store: Path, items: list[ItemTokens]) -> None:
    async with running(model_store, 0) as small:
        begun = await answered(small, classify(items))
    for item in begun.items:
        assert not item.error
        assert bool(item.next_step) != bool(item.logits)
        assert item.macs > 0
        assert item.dense_macs > item.macs


async def test_steps_that_do_not_fit_the_items_are_refused(
    model_store: Path, items: list[ItemTokens]
) -> None:
    async with running(model_store, None) as core:
        answer = await asked(core, classify(items, steps=[1]))
        assert isinstance(answer, Failed)
        assert "as many steps as items" in answer.message
