"""The cascade: steps, escalations, heads and multiply-adds of the texts of a batch."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from budgetformer.cost.macs import decision_macs, dense_macs, scorer_macs
from budgetformer.inference import cascade
from budgetformer.inference.cascade import Batch, Items, Part
from budgetformer.inference.packed import PackedPass, PackedTokens
from budgetformer.inference.policy import BudgetRule, EntryBand, Escalation, Level, OperatingPoint
from budgetformer.inference.texts import Texts, TokenColumns
from budgetformer.model.answers import confidence
from budgetformer.model.modeling import BudgetFormerForSequenceClassification
from budgetformer.model.step0 import TfidfHead
from budgetformer.tokenization import Tokens
from tests.support.counter import MacCounter, step_macs
from tests.support.networks import (
    PROPERTY,
    Item,
    assert_close,
    batches,
    networks,
    pad,
    random_items,
    random_network,
    small_config,
)

FIGURES = {"accuracy": 0.0, "points_lost": 0.0, "macs_share": 0.0, "mean_heads": 0.0}


def two_band_rule(steps: int, below: float = 0.0, step: int = 1, first: int = 1) -> BudgetRule:
    escalation = Escalation(below=below, step=step) if below else None
    entry = (EntryBand(upto=0.5, step=first), EntryBand(upto=1, step=min(first + 1, steps)))
    return OperatingPoint(entry=entry, escalation=escalation, **FIGURES).rule(steps)


@st.composite
def policy_rules(draw: st.DrawFn, steps: int, step_0: bool) -> BudgetRule:
    """Draw a rule with a chain of steps, entry bands and a threshold."""
    links = sorted(draw(st.sets(st.integers(1, steps), min_size=1)))
    entry = (
        EntryBand(upto=draw(st.floats(0, 1)), step=draw(st.sampled_from(links))),
        EntryBand(upto=1, step=draw(st.sampled_from(links))),
    )
    figures = {name: value for name, value in FIGURES.items() if name != "accuracy"}
    return BudgetRule(
        num_steps=steps,
        entry=entry,
        chain=(0, *links) if step_0 else tuple(links),
        exit_margin=draw(st.sampled_from([0.0, 0.0, 0.1, 1.0])),
        level=Level(threshold=draw(st.floats(0, 1)), **figures),
        ceiling=draw(st.none() | st.integers(1, steps)),
    )


def texts_of(items: list[Item]) -> Texts:
    window = TokenColumns.of([item.ids for item in items], [item.segments for item in items])
    return Texts(window, window)


def decided(network: PackedPass, items: list[Item], rule: BudgetRule) -> Items:
    decisions = Items(network, texts_of(items), rule)
    cascade.decide(network, batch_of_all(decisions))
    return decisions


def batch_of_all(items: Items) -> Batch:
    return Batch([Part(items, list(range(len(items))))])


def answer(
    model: BudgetFormerForSequenceClassification, items: list[Item], rule: BudgetRule
) -> Items:
    return cascade.answer(PackedPass(model), texts_of(items), rule)


def actual_and_required_confidence(
    answered: Items, index: int, problem_type: str | None
) -> tuple[float, float]:
    rule, step = answered.rule, int(answered.step[index])
    assert rule.level is not None
    actual = float(confidence(torch.from_numpy(answered.logits[index]), problem_type))
    return actual, rule.level.threshold + (0 if step else rule.exit_margin)


@st.composite
def rules(draw: st.DrawFn, model: BudgetFormerForSequenceClassification) -> BudgetRule:
    steps = model.config.num_steps
    if draw(st.booleans()):
        return BudgetRule(num_steps=steps, fixed=draw(st.integers(1, steps)))
    if draw(st.booleans()):
        return draw(policy_rules(steps, model.config.embedding_exit))
    first = (
        0 if model.config.embedding_exit and draw(st.booleans()) else draw(st.integers(1, steps))
    )
    return two_band_rule(steps, draw(st.floats(0, 1)), draw(st.integers(1, steps)), first)


@PROPERTY
@given(networks(budget_scope="input"), batches(), st.data())
def test_an_answer_equals_the_reference_network_at_its_step(
    model: BudgetFormerForSequenceClassification, items: list[Item], data: st.DataObject
) -> None:
    answered = answer(model, items, data.draw(rules(model)))
    assert answered.done.all()
    with torch.no_grad():
        expected = model(**pad(items), steps=torch.from_numpy(answered.step)).logits
    assert_close(torch.from_numpy(answered.logits), expected)


@PROPERTY
@given(networks(budget_scope="input"), batches(), st.data())
def test_a_text_follows_the_path_of_its_rule_until_it_is_confident(
    model: BudgetFormerForSequenceClassification, items: list[Item], data: st.DataObject
) -> None:
    rule = data.draw(policy_rules(model.config.num_steps, model.config.embedding_exit))
    answered = answer(model, items, rule)
    for i, item in enumerate(items):
        path = rule.path(float(answered.s[i]))
        steps, step = answered.steps(i), int(answered.step[i])
        assert tuple(steps) == path[: len(steps)]
        assert steps[-1] == step
        assert answered.predicted[i] == (steps[0] or (steps[1] if step else 0))
        assert answered.macs[i] == step_macs(model.config, steps, len(item.ids))
        actual, required = actual_and_required_confidence(answered, i, model.config.problem_type)
        assert step == path[-1] or actual >= required - 1e-6


@given(st.data())
def test_the_step_after_an_uncertain_answer_does_not_depend_on_f_o(data: st.DataObject) -> None:
    """The cascade looks it up once for all texts of a request in a batch."""
    rule = data.draw(policy_rules(6, data.draw(st.booleans())))
    assert rule.level is not None
    for step in rule.path(s := data.draw(st.floats(0, 1))):
        required = rule.required_confidence(step)
        assert rule.next_step(step, required, s) is None
        if step and required > 0:
            assert rule.next_link(step) == rule.next_step(step, math.nextafter(required, 0), s)


@given(st.data())
def test_slices_of_a_batch_have_all_of_its_texts(data: st.DataObject) -> None:
    """A batch that fails is run again in halves."""
    network = PackedPass(random_network(small_config()))
    lengths = data.draw(st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=4), min_size=1))
    requests = [
        decided(network, random_items(text_lengths), two_band_rule(4)) for text_lengths in lengths
    ]
    parts = []
    for request in requests:
        indices = data.draw(st.sets(st.integers(0, len(request) - 1), min_size=1))
        parts.append(Part(request, sorted(indices)))
    batch = Batch(parts)
    cut = data.draw(st.integers(0, len(batch)))
    texts, *halves = [
        [(id(part.items), place) for part in piece.parts for place in part.places]
        for piece in (batch, batch[:cut], batch[cut:])
    ]
    assert (len(batch[:cut]), len(batch[cut:])) == (cut, len(texts) - cut)
    assert [text for half in halves for text in half] == texts


@PROPERTY
@given(networks(), batches(), st.data())
def test_reported_multiply_adds_are_those_executed(
    model: BudgetFormerForSequenceClassification, items: list[Item], data: st.DataObject
) -> None:
    steps = model.config.num_steps
    if model.config.budget_scope == "layer":
        fixed = data.draw(st.none() | st.integers(1, steps))
        rule = BudgetRule(num_steps=steps, fixed=fixed)
    else:
        rule = data.draw(rules(model))
    network = PackedPass(model)  # maps the distance embeddings, once for all texts
    with MacCounter() as counter:
        answered = cascade.answer(network, texts_of(items), rule)
    # The counter sees only torch's products, so not those of f_o in NumPy.
    uncounted = decision_macs(model.config) - scorer_macs(model.config)
    numpy_decides = model.step0_with_numpy() is not None
    spent = answered.macs.sum() - (uncounted * len(items) if numpy_decides else 0)
    assert spent == counter.macs
    expected = [dense_macs(model.config, len(item.ids)) for item in items]
    assert answered.dense_macs.tolist() == expected


@PROPERTY
@given(networks(budget_scope="layer"), batches(), st.data())
def test_a_ceiling_limits_networks_whose_layers_decide(
    model: BudgetFormerForSequenceClassification, items: list[Item], data: st.DataObject
) -> None:
    config = model.config
    ceiling = data.draw(st.integers(1, config.num_steps))
    answered = answer(model, items, BudgetRule(num_steps=config.num_steps, ceiling=ceiling))
    max_heads = [
        max(plan[layer] for plan in config.ladder[:ceiling])
        for layer in range(config.num_hidden_layers)
    ]
    for chosen in answered.selected_heads:
        assert all(len(kept) <= k for kept, k in zip(chosen, max_heads, strict=True))


def test_an_uncertain_text_runs_again_and_both_passes_count() -> None:
    model = random_network(small_config())
    once = answer(model, random_items([6]), two_band_rule(4))
    twice = answer(model, random_items([6]), two_band_rule(4, below=1.0, step=4))
    assert twice.step == [4]
    assert twice.total_heads == once.total_heads + 3 * 4
    assert twice.macs > once.macs


def test_a_confident_answer_is_final() -> None:
    answered = answer(
        random_network(small_config()), random_items([6]), two_band_rule(4, below=0.01, step=4)
    )
    assert answered.step[0] in (1, 2)
    assert actual_and_required_confidence(answered, 0, None)[0] >= 0.01


def test_step_0_answers_without_the_encoder() -> None:
    model = random_network(small_config(embedding_exit=True))
    items = random_items([6, 3])
    answered = decided(PackedPass(model), items, BudgetRule(num_steps=4, fixed=0))
    assert answered.done.all()
    assert not answered.total_heads.any()
    expected = model(**pad(items), steps=0).logits.detach()
    assert_close(torch.from_numpy(answered.logits), expected)


def test_texts_are_packed_once_if_step_0_and_encoder_read_the_same_tokens() -> None:
    network = PackedPass(random_network(small_config()))
    assert (
        batch_of_all(decided(network, random_items([6, 3]), two_band_rule(4))).full_text() is None
    )


def test_full_text_columns_have_long_texts_uncut_and_others_unchanged() -> None:
    long = Tokens([2, 8, 3], [0, 0, 1], True, [2, 8, 9, 3, 3], [0, 0, 0, 1, 1])
    texts = Texts.of([long, Tokens([2, 4, 3], [0, 0, 0], False)])
    window, whole = (PackedTokens.of(columns) for columns in (texts.window, texts.full_text))
    assert window.input_ids.tolist() == [2, 8, 3, 2, 4, 3]
    assert whole.lengths == (5, 3)
    assert whole.input_ids.tolist() == [2, 8, 9, 3, 3, 2, 4, 3]
    assert whole.token_type_ids.tolist() == [0, 0, 0, 1, 1, 0, 0, 0]


def test_step_0_reads_the_full_text_and_the_encoder_its_window() -> None:
    shape = {"embedding_exit": True, "exit_tfidf": True, "exit_buckets": 11}
    model = random_network(small_config(**shape))
    head = model.exit_head
    assert isinstance(head, TfidfHead)
    columns, rows = len(head.scale), len(head.idf)
    head.fill(torch.randn(columns, rows), torch.randn(columns), head.idf, 1.0)
    long, (short, other) = random_items([9])[0], random_items([4, 6], seed=1)
    window = Item(long.ids[:5], long.segments[:5])
    network = PackedPass(model)
    texts = Texts(texts_of([short, window, other]).window, texts_of([short, long, other]).window)
    items = Items(network, texts, two_band_rule(4, first=1))
    cascade.decide(network, batch_of_all(items))
    full = pad([short, long, other])
    expected = head(full["input_ids"], full["attention_mask"], full["token_type_ids"])
    assert items.exit_logits is not None
    assert_close(torch.from_numpy(items.exit_logits), expected)
    assert items.dense_macs[1] == dense_macs(model.config, 5)
    items.step[:] = 1
    assert cascade.compute(network, batch_of_all(items)).logits.shape == (
        3,
        model.config.num_classes,
    )


def test_a_text_uncertain_at_step_0_continues_at_its_next_step() -> None:
    model = random_network(small_config(embedding_exit=True))
    items = decided(
        PackedPass(model), random_items([6]), two_band_rule(4, below=1.0, step=3, first=0)
    )
    assert not items.done.any()
    assert items.step[0] in (1, 3)


@PROPERTY
@given(networks(budget_scope="layer"), batches())
def test_the_reported_step_is_the_first_that_covers_the_heads_of_all_layers(
    model: BudgetFormerForSequenceClassification, items: list[Item]
) -> None:
    """On an uneven ladder, no number of heads in a layer names a step."""
    ladder = model.config.ladder
    answered = answer(model, items, BudgetRule(num_steps=len(ladder)))
    for step, chosen in zip(answered.step.tolist(), answered.selected_heads, strict=True):
        assert 1 <= step <= len(ladder)
        kept = [len(heads) for heads in chosen]
        covers = [all(a <= b for a, b in zip(kept, plan, strict=True)) for plan in ladder]
        assert step == (covers.index(True) + 1 if any(covers) else len(ladder))
