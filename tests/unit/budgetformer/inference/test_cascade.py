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


def rule(steps: int, below: float = 0.0, step: int = 1, first: int = 1) -> BudgetRule:
    escalation = Escalation(below=below, step=step) if below else None
    entry = (EntryBand(upto=0.5, step=first), EntryBand(upto=1, step=min(first + 1, steps)))
    return OperatingPoint(entry=entry, escalation=escalation, **FIGURES).rule(steps)


@st.composite
def policy_rules(draw: st.DrawFn, steps: int, step_0: bool) -> BudgetRule:
    """Draw the rule of a chain of several steps, its bands and its threshold."""
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


def decided(network: PackedPass, items: list[Item], wanted: BudgetRule) -> Items:
    found = Items(network, texts_of(items), wanted)
    cascade.decide(network, everything(found))
    return found


def everything(items: Items) -> Batch:
    return Batch([Part(items, list(range(len(items))))])


def finish(
    model: BudgetFormerForSequenceClassification, items: list[Item], wanted: BudgetRule
) -> Items:
    return cascade.answer(PackedPass(model), texts_of(items), wanted)


def needed_confidence(answered: Items, place: int, problem_type: str | None) -> tuple[float, float]:
    """Return the confidence of an answer, and what its step needs."""
    rule, step = answered.rule, int(answered.step[place])
    assert rule.level is not None
    confident = float(confidence(torch.from_numpy(answered.logits[place]), problem_type))
    return confident, rule.level.threshold + (0 if step else rule.exit_margin)


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
    return rule(steps, draw(st.floats(0, 1)), draw(st.integers(1, steps)), first)


@PROPERTY
@given(networks(budget_scope="input"), batches(), st.data())
def test_an_answer_is_the_reference_networks_at_the_step_that_answered(
    model: BudgetFormerForSequenceClassification, items: list[Item], data: st.DataObject
) -> None:
    answered = finish(model, items, data.draw(rules(model)))
    assert answered.done.all()
    with torch.no_grad():
        expected = model(**pad(items), steps=torch.from_numpy(answered.step)).logits
    assert_close(torch.from_numpy(answered.logits), expected)


@PROPERTY
@given(networks(budget_scope="input"), batches(), st.data())
def test_a_text_runs_its_rules_path_up_to_the_step_that_answered(
    model: BudgetFormerForSequenceClassification, items: list[Item], data: st.DataObject
) -> None:
    wanted = data.draw(policy_rules(model.config.num_steps, model.config.embedding_exit))
    answered = finish(model, items, wanted)
    for place, item in enumerate(items):
        path = wanted.path(float(answered.s[place]))
        steps, step = answered.steps(place), int(answered.step[place])
        assert tuple(steps) == path[: len(steps)]
        assert steps[-1] == step
        assert answered.predicted[place] == (steps[0] or (steps[1] if step else 0))
        assert answered.macs[place] == step_macs(model.config, steps, len(item.ids))
        confident, needed = needed_confidence(answered, place, model.config.problem_type)
        assert step == path[-1] or confident >= needed - 1e-6


@given(st.data())
def test_the_step_after_an_answer_that_does_not_stand_is_the_same_for_every_verdict(
    data: st.DataObject,
) -> None:
    """So that it is looked up once for all texts of a request in a batch."""
    wanted = data.draw(policy_rules(6, data.draw(st.booleans())))
    assert wanted.level is not None
    for step in wanted.path(s := data.draw(st.floats(0, 1))):
        needed = wanted.required_confidence(step)
        assert wanted.next_step(step, needed, s) is None
        if step and needed > 0:
            assert wanted.next_link(step) == wanted.next_step(step, math.nextafter(needed, 0), s)


@given(st.data())
def test_a_batch_is_cut_where_its_texts_are(data: st.DataObject) -> None:
    """A batch that fails is run again in halves."""
    network = PackedPass(random_network(small_config()))
    lengths = data.draw(st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=4), min_size=1))
    requests = [decided(network, random_items(own), rule(4)) for own in lengths]
    parts = []
    for request in requests:
        places = data.draw(st.sets(st.integers(0, len(request) - 1), min_size=1))
        parts.append(Part(request, sorted(places)))
    batch = Batch(parts)
    cut = data.draw(st.integers(0, len(batch)))
    every = [(id(part.items), place) for part in batch.parts for place in part.places]
    halves = [
        [(id(part.items), place) for part in half.parts for place in part.places]
        for half in (batch[:cut], batch[cut:])
    ]
    assert (len(batch[:cut]), len(batch[cut:])) == (cut, len(every) - cut)
    assert [text for half in halves for text in half] == every


@PROPERTY
@given(networks(), batches(), st.data())
def test_multiply_adds_are_what_was_executed(
    model: BudgetFormerForSequenceClassification, items: list[Item], data: st.DataObject
) -> None:
    steps = model.config.num_steps
    if model.config.budget_scope == "layer":
        fixed = data.draw(st.none() | st.integers(1, steps))
        wanted = BudgetRule(num_steps=steps, fixed=fixed)
    else:
        wanted = data.draw(rules(model))
    network = PackedPass(model)  # which maps the embeddings of distances, once for all texts
    with MacCounter() as counter:
        answered = cascade.answer(network, texts_of(items), wanted)
    # The counter sees torch's products, and not f_o's where NumPy decides.
    unseen = decision_macs(model.config) - scorer_macs(model.config)
    numpy_decides = model.step0_with_numpy() is not None
    spent = answered.macs.sum() - (unseen * len(items) if numpy_decides else 0)
    assert spent == counter.macs
    expected = [dense_macs(model.config, len(item.ids)) for item in items]
    assert answered.dense_macs.tolist() == expected


@PROPERTY
@given(networks(budget_scope="layer"), batches(), st.data())
def test_a_ceiling_holds_where_layers_decide(
    model: BudgetFormerForSequenceClassification, items: list[Item], data: st.DataObject
) -> None:
    config = model.config
    ceiling = data.draw(st.integers(1, config.num_steps))
    answered = finish(model, items, BudgetRule(num_steps=config.num_steps, ceiling=ceiling))
    most = [
        max(plan[layer] for plan in config.ladder[:ceiling])
        for layer in range(config.num_hidden_layers)
    ]
    for chosen in answered.selected_heads:
        assert all(len(kept) <= k for kept, k in zip(chosen, most, strict=True))


def test_an_unsure_answer_is_run_again_and_both_passes_count() -> None:
    model = random_network(small_config())
    once = finish(model, random_items([6]), rule(4))
    twice = finish(model, random_items([6]), rule(4, below=1.0, step=4))
    assert twice.step == [4]
    assert twice.total_heads == once.total_heads + 3 * 4
    assert twice.macs > once.macs


def test_a_sure_answer_stands() -> None:
    answered = finish(
        random_network(small_config()), random_items([6]), rule(4, below=0.01, step=4)
    )
    assert answered.step[0] in (1, 2)
    assert needed_confidence(answered, 0, None)[0] >= 0.01


def test_step_0_answers_on_arrival() -> None:
    model = random_network(small_config(embedding_exit=True))
    items = random_items([6, 3])
    answered = decided(PackedPass(model), items, BudgetRule(num_steps=4, fixed=0))
    assert answered.done.all()
    assert not answered.total_heads.any()
    expected = model(**pad(items), steps=0).logits.detach()
    assert_close(torch.from_numpy(answered.logits), expected)


def test_nothing_more_is_packed_where_step_0_reads_what_the_encoder_does() -> None:
    network = PackedPass(random_network(small_config()))
    assert everything(decided(network, random_items([6, 3]), rule(4))).full_text() is None


def test_step_0_gets_the_whole_of_a_long_text_beside_the_others_as_they_are() -> None:
    long = Tokens([2, 8, 3], [0, 0, 1], True, [2, 8, 9, 3, 3], [0, 0, 0, 1, 1])
    texts = Texts.of([long, Tokens([2, 4, 3], [0, 0, 0], False)])
    window, whole = (PackedTokens.of(columns) for columns in (texts.window, texts.full_text))
    assert window.input_ids.tolist() == [2, 8, 3, 2, 4, 3]
    assert whole.lengths == (5, 3)
    assert whole.input_ids.tolist() == [2, 8, 9, 3, 3, 2, 4, 3]
    assert whole.token_type_ids.tolist() == [0, 0, 0, 1, 1, 0, 0, 0]


def test_step_0_reads_the_whole_text_and_the_encoder_its_window() -> None:
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
    items = Items(network, texts, rule(4, first=1))
    cascade.decide(network, everything(items))
    reads = pad([short, long, other])
    expected = head(reads["input_ids"], reads["attention_mask"], reads["token_type_ids"])
    assert items.exit_logits is not None
    assert_close(torch.from_numpy(items.exit_logits), expected)
    assert items.dense_macs[1] == dense_macs(model.config, 5)
    items.step[:] = 1
    assert cascade.compute(network, everything(items)).logits.shape == (3, model.config.num_classes)


def test_an_unsure_step_0_goes_on_at_once() -> None:
    model = random_network(small_config(embedding_exit=True))
    items = decided(PackedPass(model), random_items([6]), rule(4, below=1.0, step=3, first=0))
    assert not items.done.any()
    assert items.step[0] in (1, 3)


@PROPERTY
@given(networks(budget_scope="layer"), batches())
def test_a_step_that_layers_choose_is_on_the_ladder(
    model: BudgetFormerForSequenceClassification, items: list[Item]
) -> None:
    """With an uneven ladder the heads of a layer are no step's number."""
    ladder = model.config.ladder
    answered = finish(model, items, BudgetRule(num_steps=len(ladder)))
    for step, chosen in zip(answered.step.tolist(), answered.selected_heads, strict=True):
        assert 1 <= step <= len(ladder)
        kept = [len(heads) for heads in chosen]
        covers = [all(a <= b for a, b in zip(kept, plan, strict=True)) for plan in ladder]
        assert step == (covers.index(True) + 1 if any(covers) else len(ladder))
