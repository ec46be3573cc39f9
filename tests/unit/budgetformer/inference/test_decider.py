"""Budgets decided with NumPy alone are those of the reference network and of the engine."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from budgetformer.cost.macs import Sizes, decision_macs, dense_macs
from budgetformer.inference import cascade
from budgetformer.inference.cascade import Work
from budgetformer.inference.decider import Decider
from budgetformer.inference.packed import PackedPass
from budgetformer.inference.policy import BudgetRule
from budgetformer.model.modeling import BudgetFormerForSequenceClassification
from budgetformer.tokenization import Tokens
from tests.support.networks import (
    PROPERTY,
    Item,
    batches,
    networks,
    pad,
    random_network,
    small_config,
)
from tests.unit.budgetformer.inference.test_cascade import rules

DECIDABLE = {"budget_scope": "input", "embedding_exit": True, "exit_tfidf": True}


def decider_of(model: BudgetFormerForSequenceClassification) -> Decider:
    step0 = model.step0_with_numpy()
    assert step0 is not None
    return Decider(Sizes.of(model.config), step0)


def tokens_of(items: list[Item]) -> list[Tokens]:
    return [Tokens(item.ids, item.segments, False) for item in items]


@PROPERTY
@given(networks(**DECIDABLE), batches())
def test_logits_and_verdicts_are_the_reference_networks(
    model: BudgetFormerForSequenceClassification, items: list[Item]
) -> None:
    rule = BudgetRule(num_steps=model.config.num_steps)
    decided = decider_of(model).decide(tokens_of(items), rule)
    with torch.no_grad():
        logits, found = model.step0(**pad(items))
        decision = model.encoder.decision
        assert decision is not None
        s = decision.budget(torch.zeros(len(items), 1), found)
    assert np.abs(decided.exit_logits - logits.numpy()).max() < 1e-5
    assert np.abs(decided.s - s.numpy()).max() < 1e-5


@PROPERTY
@given(networks(**DECIDABLE), batches(), st.data())
def test_steps_are_those_that_an_engine_would_decide(
    model: BudgetFormerForSequenceClassification, items: list[Item], data: st.DataObject
) -> None:
    rule = data.draw(rules(model))
    network, texts = PackedPass(model), tokens_of(items)
    decided = decider_of(model).decide(texts, rule)
    works = [Work.of(text, rule) for text in texts]
    cascade.arrive(network, works)
    assert decided.steps.tolist() == [work.step for work in works]
    assert decided.asked.tolist() == [work.steps == [0] for work in works]
    assert decided.exit_logits is not None
    for work, logits, s in zip(works, decided.exit_logits, decided.s.tolist(), strict=True):
        assert work.s is not None
        assert work.exit_logits is not None
        assert logits.tolist() == work.exit_logits.tolist()
        assert rule.path(s) == rule.path(work.s)


@PROPERTY
@given(networks(**DECIDABLE), batches(), st.data())
def test_a_text_is_decided_alone_as_it_is_among_others(
    model: BudgetFormerForSequenceClassification, items: list[Item], data: st.DataObject
) -> None:
    rule, decider = data.draw(rules(model)), decider_of(model)
    together = decider.decide(tokens_of(items), rule)
    for place, item in enumerate(items):
        alone = decider.decide(tokens_of([item]), rule)
        assert alone.steps.tolist() == [together.steps[place]]
        assert alone.exit_logits is not None
        assert together.exit_logits is not None
        assert alone.exit_logits[0] == pytest.approx(together.exit_logits[place], abs=1e-6)


@PROPERTY
@given(networks(**DECIDABLE), batches(), st.data())
def test_what_begins_at_a_decided_step_is_answered_as_by_an_engine_that_decides(
    model: BudgetFormerForSequenceClassification, items: list[Item], data: st.DataObject
) -> None:
    rule = data.draw(rules(model))
    network, texts, decider = PackedPass(model), tokens_of(items), decider_of(model)
    decided = decider.decide(texts, rule)
    assert decided.exit_logits is not None
    whole = [Work.of(text, rule) for text in texts]
    cascade.answer(network, whole, lambda some: [some])
    for place, expected in enumerate(whole):
        decision, dense = decider.macs(len(texts[place]))
        assert decision == decision_macs(network.sizes, len(texts[place]))
        assert dense == dense_macs(network.sizes, len(texts[place])) == expected.dense_macs
        if not decided.steps[place]:
            assert expected.steps == ([0] if decided.asked[place] else [])
            assert expected.logits is not None
            assert expected.logits.tolist() == decided.exit_logits[place].tolist()
            continue
        work = Work.of(texts[place], rule)
        logits = torch.from_numpy(decided.exit_logits[place])
        cascade.begin(network, work, int(decided.steps[place]), float(decided.s[place]), logits)
        while not work.done:
            cascade.run(network, [work])
        assert expected.logits is not None
        assert work.logits is not None
        assert work.logits.tolist() == pytest.approx(expected.logits.tolist(), abs=1e-5)
        assert [0] * bool(decided.asked[place]) + work.steps == expected.steps
        assert work.heads == expected.heads
        assert work.macs + decision == expected.macs


def test_a_network_with_one_budget_decides_nothing() -> None:
    config = small_config(ladder=[[2, 2, 2]], embedding_exit=False, head_selection="ranked")
    network = PackedPass(random_network(config))
    assert network.sizes.one_budget
    decider = Decider(network.sizes, None)
    rule = BudgetRule(num_steps=1)
    decided = decider.decide(tokens_of([Item([1, 2], [0, 0]), Item([3], [0])]), rule)
    assert decided.steps.tolist() == [1, 1]
    assert decided.exit_logits is None
    assert not decided.asked.any()
