"""Texts of several requests are decided in one call, and each request gets its own decisions."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import numpy as np
import pytest

from budgetformer.cost.macs import Sizes
from budgetformer.inference.decider import Decided, Decider
from budgetformer.inference.policy import BudgetRule
from budgetformer.inference.texts import Texts, TokenColumns
from service.pipeline.decision import FEW_TEXTS, DecidedTexts, DecisionBatcher
from tests.support.columns import answers_to, rows
from tests.support.networks import small_config

SIZES = Sizes.of(small_config())
RULE, OTHER = BudgetRule(num_steps=3), BudgetRule(num_steps=3, ceiling=1)


def texts(*lengths: int) -> TokenColumns:
    return TokenColumns.of([[1] * length for length in lengths])


@dataclass(frozen=True)
class RecordingDecider(Decider):
    """Decides that each text runs the step of its length, and records the lengths of each call."""

    calls: list[list[int]] = ...  # type: ignore[assignment]

    def decide(self, texts: TokenColumns, rule: BudgetRule) -> Decided:  # noqa: ARG002
        lengths = texts.lengths.tolist()
        self.calls.append(lengths)
        if 13 in lengths:
            raise RuntimeError("a text of 13 tokens")
        steps = np.array(lengths)
        return Decided(steps, steps == 0, steps / 10, steps[:, None].astype(np.float32))


def recording_decider() -> RecordingDecider:
    return RecordingDecider(SIZES, None, [])


async def test_requests_of_one_turn_are_decided_together() -> None:
    decider, deciding = recording_decider(), DecisionBatcher()
    requests = [texts(1), texts(2, 3), texts(4)]
    decisions = await asyncio.gather(*(deciding.decide(decider, RULE, own) for own in requests))
    assert decider.calls == [[1, 2, 3, 4]]
    assert [decided.steps.tolist() for decided in decisions] == [[1], [2, 3], [4]]
    assert [decided.s.tolist() for decided in decisions] == [[0.1], [0.2, 0.3], [0.4]]
    await deciding.decide(decider, RULE, texts(5))
    assert decider.calls[1:] == [[5]]


async def test_each_rule_and_decider_has_its_own_call() -> None:
    first, second, deciding = recording_decider(), recording_decider(), DecisionBatcher()
    await asyncio.gather(
        deciding.decide(first, RULE, texts(1)),
        deciding.decide(first, OTHER, texts(2)),
        deciding.decide(second, RULE, texts(3)),
        deciding.decide(first, RULE, texts(4)),
    )
    assert first.calls == [[1, 4], [2]]
    assert second.calls == [[3]]


async def test_many_texts_do_not_wait_for_others() -> None:
    decider, deciding = recording_decider(), DecisionBatcher()
    few = asyncio.create_task(deciding.decide(decider, RULE, texts(1)))
    await asyncio.sleep(0)
    await deciding.decide(decider, RULE, texts(*[2] * FEW_TEXTS))
    await few
    assert decider.calls == [[2] * FEW_TEXTS, [1]]


async def test_a_cancelled_request_does_not_affect_others() -> None:
    decider, deciding = recording_decider(), DecisionBatcher()
    tasks = [asyncio.create_task(deciding.decide(decider, RULE, texts(n))) for n in (1, 2, 3)]
    await asyncio.sleep(0)
    tasks[1].cancel()
    first, cancelled, third = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(cancelled, asyncio.CancelledError)
    assert isinstance(first, Decided)
    assert isinstance(third, Decided)
    assert (first.steps.tolist(), third.steps.tolist()) == ([1], [3])


async def test_an_error_reaches_all_requests_of_its_call_only() -> None:
    decider, deciding = recording_decider(), DecisionBatcher()
    requests = [deciding.decide(decider, RULE, texts(n)) for n in (1, 13)]
    errors = await asyncio.gather(*requests, return_exceptions=True)
    assert [str(error) for error in errors] == ["a text of 13 tokens"] * 2
    assert (await deciding.decide(decider, RULE, texts(2))).steps.tolist() == [2]


class TestAnswers:
    @pytest.fixture
    def decided(self) -> DecidedTexts:
        decider = Decider(SIZES, None)
        steps, logits = np.array([0, 2, 0, 1]), np.arange(8, dtype=np.float32).reshape(4, 2)
        asked = np.array([True, True, True, False])
        decided = Decided(steps, asked, np.zeros(4, np.float32), logits)
        window = texts(5, 6, 7, 8)
        return DecidedTexts(Texts(window, window), decided, decider, RULE, "fast", 0.25)

    def test_answers_of_step_0_and_engine_are_merged_in_order(self, decided: DecidedTexts) -> None:
        assert decided.unanswered == [1, 3]
        ran = answers_to(
            2,
            logits=[[9.0, 1.0], [0.0, 0.0]],
            step=[2, 0],
            ran=[[False, False, True, False]] * 2,
            heads=[6, 0],
            macs=[100, 0],
            dense_macs=[500, 500],
            errors={1: "the item could not be computed"},
            queue_seconds=0.5,
            compute_seconds=0.75,
            quality="fast",
        )
        answers = decided.answer(False, ran)
        first, second, third, fourth = rows(answers)
        assert first["logits"] == [0.0, 1.0]
        assert third["logits"] == [4.0, 5.0]
        for item in (first, third):
            assert (item["step"], item["predicted"], item["steps"], item["heads"]) == (0, 0, [0], 0)
            assert 0 < item["macs"] < item["dense_macs"]
            assert not item["error"]
        assert (second["logits"], second["step"], second["heads"]) == ([9.0, 1.0], 2, 6)
        assert second["steps"] == [0, 2]
        assert second["predicted"] == 2
        assert second["macs"] == 100 + decided.decider.macs(6)[0]
        assert fourth["error"] == "the item could not be computed"
        stages = (answers.budget_seconds, answers.queue_seconds, answers.compute_seconds)
        assert stages == (0.25, 0.5, 0.75)

    def test_heads_are_listed_if_requested(self, decided: DecidedTexts) -> None:
        decided.decided.steps[:] = 0
        assert decided.answer(True, None).chosen == [[[]] * SIZES.layers] * 4
