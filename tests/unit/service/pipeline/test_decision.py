"""Texts of several requests are decided at once, and each request gets its own."""

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
class Noting(Decider):
    """Decides that a text runs the step of its length, and notes what it was asked together."""

    calls: list[list[int]] = ...  # type: ignore[assignment]

    def decide(self, texts: TokenColumns, rule: BudgetRule) -> Decided:  # noqa: ARG002
        lengths = texts.lengths.tolist()
        self.calls.append(lengths)
        if 13 in lengths:
            raise RuntimeError("an unlucky text")
        steps = np.array(lengths)
        return Decided(steps, steps == 0, steps / 10, steps[:, None].astype(np.float32))


def noting() -> Noting:
    return Noting(SIZES, None, [])


async def test_requests_of_one_turn_are_decided_together() -> None:
    decider, deciding = noting(), DecisionBatcher()
    asked = [texts(1), texts(2, 3), texts(4)]
    found = await asyncio.gather(*(deciding.decide(decider, RULE, some) for some in asked))
    assert decider.calls == [[1, 2, 3, 4]]
    assert [one.steps.tolist() for one in found] == [[1], [2, 3], [4]]
    assert [one.s.tolist() for one in found] == [[0.1], [0.2, 0.3], [0.4]]
    await deciding.decide(decider, RULE, texts(5))
    assert decider.calls[1:] == [[5]]


async def test_each_rule_and_decider_has_its_own_decision() -> None:
    first, second, deciding = noting(), noting(), DecisionBatcher()
    await asyncio.gather(
        deciding.decide(first, RULE, texts(1)),
        deciding.decide(first, OTHER, texts(2)),
        deciding.decide(second, RULE, texts(3)),
        deciding.decide(first, RULE, texts(4)),
    )
    assert first.calls == [[1, 4], [2]]
    assert second.calls == [[3]]


async def test_many_texts_do_not_wait_for_others() -> None:
    decider, deciding = noting(), DecisionBatcher()
    few = asyncio.create_task(deciding.decide(decider, RULE, texts(1)))
    await asyncio.sleep(0)
    await deciding.decide(decider, RULE, texts(*[2] * FEW_TEXTS))
    await few
    assert decider.calls == [[2] * FEW_TEXTS, [1]]


async def test_whoever_is_cancelled_leaves_the_others_their_answers() -> None:
    decider, deciding = noting(), DecisionBatcher()
    tasks = [asyncio.create_task(deciding.decide(decider, RULE, texts(n))) for n in (1, 2, 3)]
    await asyncio.sleep(0)
    tasks[1].cancel()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(found[1], asyncio.CancelledError)
    assert [one.steps.tolist() for one in found if isinstance(one, Decided)] == [[1], [3]]


async def test_an_error_reaches_everyone_who_waits_and_nobody_later() -> None:
    decider, deciding = noting(), DecisionBatcher()
    asked = [deciding.decide(decider, RULE, texts(n)) for n in (1, 13)]
    found = await asyncio.gather(*asked, return_exceptions=True)
    assert [str(one) for one in found] == ["an unlucky text"] * 2
    assert (await deciding.decide(decider, RULE, texts(2))).steps.tolist() == [2]


class TestAnswers:
    @pytest.fixture
    def decided(self) -> DecidedTexts:
        decider = Decider(SIZES, None)
        steps, logits = np.array([0, 2, 0, 1]), np.arange(8, dtype=np.float32).reshape(4, 2)
        asked = np.array([True, True, True, False])
        own = Decided(steps, asked, np.zeros(4, np.float32), logits)
        window = texts(5, 6, 7, 8)
        return DecidedTexts(Texts(window, window), own, decider, RULE, "fast", 0.25)

    def test_they_stand_in_the_order_of_the_texts(self, decided: DecidedTexts) -> None:
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

    def test_heads_are_named_where_they_are_asked_for(self, decided: DecidedTexts) -> None:
        decided.decided.steps[:] = 0
        assert decided.answer(True, None).chosen == [[[]] * SIZES.layers] * 4
