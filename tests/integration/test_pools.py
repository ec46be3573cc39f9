"""Pools: engines with a highest step return larger ones, which other engines compute."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import pytest

from budgetformer.cost.macs import decision_macs
from budgetformer.inference.texts import Texts
from service.cluster.pools import through_pools
from service.engine.core import EngineCore, EngineOptions
from service.ipc.answers import Answers
from service.ipc.engine_client import Submission, answers_of, request_of
from service.ipc.engine_messages import (
    Answer,
    Classify,
    Decisions,
    Failed,
    Load,
    ToFrontend,
)
from service.pipeline.decision import DecidedTexts
from service.pipeline.served_models import open_model
from tests.support.columns import rows
from tests.support.stores import CHAINED, TOPICS, labelled_sentences

TEXTS = [text for text, _ in labelled_sentences()][:40]
MODELS = {TOPICS: 2, CHAINED: 1}


@dataclass
class Pools:
    """Engines by their highest step (None: any), and the order in which they got requests."""

    model: str
    cores: dict[int | None, EngineCore]
    asked: list[int | None]

    async def ask(self, place: int, submission: Submission) -> Answers:
        highest, core = list(self.cores.items())[place]
        self.asked.append(highest)
        return answers_of(await send(core, request_of(submission)))

    async def answer(self, submission: Submission) -> Answers:
        computes = [partial(_computes, highest) for highest in self.cores]
        return await through_pools(self.ask, computes, submission)


def _computes(highest: int | None, step: int) -> bool:
    return highest is None or step <= highest


@asynccontextmanager
async def running(store: Path, model: str, *steps: int | None) -> AsyncIterator[Pools]:
    async with AsyncExitStack() as stack:
        cores = {step: EngineCore(EngineOptions(max_step=step)) for step in steps}
        for core in cores.values():
            work = asyncio.create_task(core.run())
            stack.callback(work.cancel)
            await send(core, Load(0, str(store / model / str(MODELS[model]))))
        yield Pools(model, cores, [])


async def send(core: EngineCore, message: Classify | Load) -> ToFrontend:
    future: asyncio.Future[ToFrontend] = asyncio.get_running_loop().create_future()
    core.receive(message, lambda told: future.done() or future.set_result(told))
    async with asyncio.timeout(60):
        return await future


def submission(store: Path, model: str, quality: str = "best") -> Submission:
    served = open_model(store / model / str(MODELS[model]))
    texts = Texts.of(served.encoder.encode(TEXTS))
    deadline = asyncio.get_running_loop().time() + 60
    return Submission(model, MODELS[model], texts, quality, deadline, return_heads=True)


@pytest.mark.parametrize("pools", [(0, None), (1, None)], ids=str)
@pytest.mark.parametrize("model", MODELS)
async def test_several_pools_answer_like_one_engine(
    model_store: Path, model: str, pools: tuple[int | None, ...]
) -> None:
    wanted = submission(model_store, model)
    async with running(model_store, model, None) as alone:
        expected_answers = await alone.ask(0, wanted)
        (core,) = alone.cores.values()
        decision = decision_macs(core.models[model, MODELS[model]].network.sizes)
    async with running(model_store, model, *pools) as several:
        answer = await several.answer(wanted)
    compare(answer, expected_answers, decision)
    assert several.asked == [pools[0], None]
    if model == CHAINED:
        assert set(map(tuple, answer.all_steps())) == {(0, 1), (0, 2), (0, 1, 2)}


@pytest.mark.parametrize("pools", [(0, None), (1, None), (0, 1, None)], ids=str)
async def test_decided_texts_are_sent_to_the_pool_of_their_step(
    model_store: Path, pools: tuple[int | None, ...]
) -> None:
    wanted = submission(model_store, CHAINED)
    async with running(model_store, CHAINED, None) as alone:
        expected_answers = await alone.ask(0, wanted)
    served = open_model(model_store / CHAINED / "1")
    assert served.decider is not None
    rule = served.checkpoint.rule("best")
    decided = served.decider.decide(wanted.texts.full_text, rule)
    texts = DecidedTexts(wanted.texts, decided, served.decider, rule, "best", 0.0)
    assert set(decided.steps) == {1, 2}
    direct = replace(wanted, decided=decided)
    async with running(model_store, CHAINED, *pools) as several:
        answer = texts.answer(True, await several.answer(direct))
    compare(answer, expected_answers)
    first = sorted(several.asked[:2], key=str)
    assert first == ([1, None] if 1 in pools else [None])
    # Only the texts that continue from step 1 to step 2 are sent twice.
    assert several.asked[2:] == ([None] if 1 in pools else [])


async def test_decisions_that_do_not_fit_the_items_are_refused(model_store: Path) -> None:
    wanted = submission(model_store, CHAINED)
    count = len(wanted.texts)
    steps = np.ones(count, "<i4").tobytes()
    good = Decisions(steps, bytes(4 * count), bytes(4 * 3 * count))
    sent = request_of(wanted)
    async with running(model_store, CHAINED, None) as only:
        (core,) = only.cores.values()
        for bad in (
            msgspec.structs.replace(good, steps=steps[:4]),
            msgspec.structs.replace(good, steps=steps[:-1]),
            msgspec.structs.replace(good, steps=bytes(4 * count)),
            msgspec.structs.replace(good, s=b""),
            msgspec.structs.replace(good, s=bytes(4 * count - 1)),
            msgspec.structs.replace(good, exit_logits=bytes(4 * count)),
            msgspec.structs.replace(good, exit_logits=b""),
        ):
            answer = await send(core, msgspec.structs.replace(sent, decisions=bad))
            assert isinstance(answer, Failed)
        assert isinstance(await send(core, msgspec.structs.replace(sent, decisions=good)), Answer)


async def test_texts_pass_from_pool_to_pool_along_the_chain(model_store: Path) -> None:
    wanted = submission(model_store, CHAINED)
    async with running(model_store, CHAINED, None) as alone:
        predicted = (await alone.ask(0, wanted)).predicted
        wanted = wanted.part(np.flatnonzero(predicted == 1).tolist())
        expected_answers = await alone.ask(0, wanted)
        (core,) = alone.cores.values()
        decision = decision_macs(core.models[CHAINED, 1].network.sizes)
    async with running(model_store, CHAINED, 0, 1, None) as several:
        answer = await several.answer(wanted)
    assert several.asked == [0, 1, None]
    assert set(map(tuple, answer.all_steps())) == {(0, 1), (0, 1, 2)}
    compare(answer, expected_answers, decision)


def compare(answer: Answers, expected_answers: Answers, decision: int | None = None) -> None:
    """Compare the answers of several engines with those of one.

    Every further engine decides an item again for the logits of step 0, at a cost of `decision`
    multiply-adds; None: the items were decided before.
    """
    handed_on = set[int]()
    for item, expected in zip(rows(answer), rows(expected_answers), strict=True):
        assert not item["next_step"]
        assert not item["error"]
        assert item["logits"] == pytest.approx(expected["logits"], rel=1e-4, abs=1e-5)
        for name in ("step", "predicted", "steps", "heads", "chosen", "dense_macs"):
            assert item[name] == expected[name], name
        if decision is None:
            assert item["macs"] == expected["macs"]
            continue
        more, rest = divmod(item["macs"] - expected["macs"], decision)
        assert rest == 0
        handed_on.add(more)
    assert decision is None or max(handed_on) >= 1


@pytest.mark.parametrize("model", MODELS)
async def test_returned_items_state_the_cost_of_their_decision(
    model_store: Path, model: str
) -> None:
    async with running(model_store, model, 0) as small:
        returned = await small.ask(0, submission(model_store, model))
    assert not returned.errors
    assert returned.predicted.tolist() == returned.next_step.tolist()
    assert (returned.macs > 0).all()
    assert (returned.dense_macs > returned.macs).all()


async def test_steps_that_do_not_fit_the_items_are_refused(model_store: Path) -> None:
    async with running(model_store, TOPICS, None) as only:
        (core,) = only.cores.values()
        message = msgspec.structs.replace(
            request_of(submission(model_store, TOPICS)), steps=bytes(4)
        )
        answer = await send(core, message)
        assert isinstance(answer, Failed)
        assert "as many steps as texts" in answer.message
