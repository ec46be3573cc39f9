"""Budgets decided in NumPy equal those of the reference network and of the engine."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from budgetformer.cost.macs import Sizes, decision_macs
from budgetformer.inference import cascade
from budgetformer.inference.cascade import Batch, Items, Part
from budgetformer.inference.decider import Decider
from budgetformer.inference.packed import PackedPass
from budgetformer.inference.policy import BudgetRule
from budgetformer.inference.texts import TokenColumns
from budgetformer.model.modeling import BudgetFormerForSequenceClassification
from tests.support.networks import (
    PROPERTY,
    Item,
    batches,
    networks,
    pad,
    random_network,
    small_config,
)
from tests.unit.budgetformer.inference.test_cascade import decided, rules, texts_of

DECIDABLE = {"budget_scope": "input", "embedding_exit": True, "exit_tfidf": True}


def decider_of(model: BudgetFormerForSequenceClassification) -> Decider:
    step0 = model.step0_with_numpy()
    assert step0 is not None
    return Decider(Sizes.of(model.config), step0)


@PROPERTY
@given(networks(**DECIDABLE), batches())
def test_logits_and_predictions_equal_the_reference_network(
    model: BudgetFormerForSequenceClassification, items: list[Item]
) -> None:
    rule = BudgetRule(num_steps=model.config.num_steps)
    decided_steps = decider_of(model).decide(texts_of(items).full_text, rule)
    with torch.no_grad():
        logits, evidence = model.step0(**pad(items))
        decision = model.encoder.decision
        assert decision is not None
        s = decision.budget(torch.zeros(len(items), 1), evidence)
    assert np.abs(decided_steps.exit_logits - logits.numpy()).max() < 1e-5
    assert np.abs(decided_steps.s - s.numpy()).max() < 1e-5


@PROPERTY
@given(networks(**DECIDABLE), batches(), st.data())
def test_steps_equal_those_that_an_engine_decides(
    model: BudgetFormerForSequenceClassification, items: list[Item], data: st.DataObject
) -> None:
    rule = data.draw(rules(model))
    network, texts = PackedPass(model), texts_of(items)
    decided_steps = decider_of(model).decide(texts.full_text, rule)
    engine = decided(network, items, rule)
    assert decided_steps.steps.tolist() == engine.step.tolist()
    assert decided_steps.asked.tolist() == engine.ran[:, 0].tolist()
    assert decided_steps.exit_logits is not None
    assert engine.exit_logits is not None
    assert decided_steps.exit_logits.tolist() == engine.exit_logits.tolist()
    for s, engine_s in zip(decided_steps.s.tolist(), engine.s.tolist(), strict=True):
        assert rule.path(s) == rule.path(engine_s)


@PROPERTY
@given(networks(**DECIDABLE), batches(), st.data())
def test_decisions_do_not_depend_on_the_other_texts(
    model: BudgetFormerForSequenceClassification, items: list[Item], data: st.DataObject
) -> None:
    rule, decider = data.draw(rules(model)), decider_of(model)
    together = decider.decide(texts_of(items).full_text, rule)
    for i, item in enumerate(items):
        alone = decider.decide(texts_of([item]).full_text, rule)
        assert alone.steps.tolist() == [together.steps[i]]
        assert alone.exit_logits is not None
        assert together.exit_logits is not None
        assert alone.exit_logits[0] == pytest.approx(together.exit_logits[i], abs=1e-6)


@PROPERTY
@given(networks(**DECIDABLE), batches(), st.data())
def test_texts_that_begin_at_a_decided_step_get_the_answers_of_a_deciding_engine(
    model: BudgetFormerForSequenceClassification, items: list[Item], data: st.DataObject
) -> None:
    rule = data.draw(rules(model))
    network, texts, decider = PackedPass(model), texts_of(items), decider_of(model)
    decided_steps = decider.decide(texts.full_text, rule)
    assert decided_steps.exit_logits is not None
    whole = cascade.answer(network, texts, rule)
    begun = Items(network, texts, rule)
    begun.begin(decided_steps)
    assert begun.done.tolist() == (decided_steps.steps == 0).tolist()
    while not begun.done.all():
        step = begun.step[~begun.done][0]
        indices = np.flatnonzero(~begun.done & (begun.step == step)).tolist()
        cascade.run(network, Batch([Part(begun, indices)]))
    assert begun.logits == pytest.approx(whole.logits, abs=1e-5)
    for name in ("step", "ran", "total_heads", "dense_macs", "predicted"):
        assert getattr(begun, name).tolist() == getattr(whole, name).tolist(), name
    decisions = [decision_macs(network.sizes, len(item.ids)) for item in items]
    assert (begun.macs + decisions).tolist() == whole.macs.tolist()
    for i, item in enumerate(items):
        assert decider.macs(len(item.ids)) == (decisions[i], whole.dense_macs[i])


def test_a_network_with_one_budget_needs_no_decision() -> None:
    config = small_config(ladder=[[2, 2, 2]], embedding_exit=False, head_selection="ranked")
    network = PackedPass(random_network(config))
    assert network.sizes.one_budget
    decider = Decider(network.sizes, None)
    rule = BudgetRule(num_steps=1)
    decided = decider.decide(TokenColumns.of([[1, 2], [3]]), rule)
    assert decided.steps.tolist() == [1, 1]
    assert decided.exit_logits is None
    assert not decided.asked.any()
