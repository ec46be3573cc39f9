from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from budgetformer.cost.counter import MacCounter
from budgetformer.cost.macs import decision_macs, dense_macs, scorer_macs, step_macs
from budgetformer.inference import cascade
from budgetformer.inference.cascade import Work
from budgetformer.inference.packed import PackedPass
from budgetformer.inference.policy import BudgetRule, EntryBand, Escalation, Level, OperatingPoint
from budgetformer.model.answers import confidence
from budgetformer.model.modeling import BudgetFormerForSequenceClassification
from budgetformer.model.step0 import TfidfHead
from budgetformer.tokenization import Tokens
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


def works(items: list[Item], wanted: BudgetRule) -> list[Work]:
    return [Work(item.ids, item.segments, wanted) for item in items]


def finish(network: PackedPass, items: list[Work]) -> None:
    cascade.arrive(network, items)
    while waiting := [item for item in items if not item.done]:
        cascade.run(network, [item for item in waiting if item.step == waiting[0].step])


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
    answered = works(items, data.draw(rules(model)))
    finish(PackedPass(model), answered)
    with torch.no_grad():
        steps = torch.tensor([item.step for item in answered])
        expected = model(**pad(items), steps=steps).logits
    assert_close(torch.stack([item.logits for item in answered]), expected)


@PROPERTY
@given(networks(budget_scope="input"), batches(), st.data())
def test_an_item_runs_its_rules_path_up_to_the_step_that_answered(
    model: BudgetFormerForSequenceClassification, items: list[Item], data: st.DataObject
) -> None:
    wanted = data.draw(policy_rules(model.config.num_steps, model.config.embedding_exit))
    answered = works(items, wanted)
    finish(PackedPass(model), answered)
    for item in answered:
        assert item.s is not None
        path = wanted.path(item.s)
        assert tuple(item.steps) == path[: len(item.steps)]
        assert item.steps[-1] == item.step
        assert item.predicted == (item.steps[0] or (item.steps[1] if item.step else 0))
        assert item.macs == step_macs(model.config, item.steps, len(item.ids))
        sure = float(confidence(item.logits, model.config.problem_type))
        needed = wanted.level.threshold + (0 if item.step else wanted.exit_margin)
        assert item.step == path[-1] or sure >= needed - 1e-6


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
    answered = works(items, wanted)
    network = PackedPass(model)  # which maps the embeddings of distances, once for all texts
    with MacCounter() as counter:
        finish(network, answered)
    # The counter sees torch's products, and not f_o's where NumPy decides.
    unseen = decision_macs(model.config) - scorer_macs(model.config)
    numpy_decides = model.step0_with_numpy() is not None
    spent = sum(item.macs for item in answered) - (unseen * len(items) if numpy_decides else 0)
    assert spent == counter.macs
    for item in answered:
        assert item.dense_macs == dense_macs(model.config, len(item.ids))


@PROPERTY
@given(networks(budget_scope="layer"), batches(), st.data())
def test_a_ceiling_holds_where_layers_decide(
    model: BudgetFormerForSequenceClassification, items: list[Item], data: st.DataObject
) -> None:
    config = model.config
    ceiling = data.draw(st.integers(1, config.num_steps))
    answered = works(items, BudgetRule(num_steps=config.num_steps, ceiling=ceiling))
    finish(PackedPass(model), answered)
    most = [
        max(plan[layer] for plan in config.ladder[:ceiling])
        for layer in range(config.num_hidden_layers)
    ]
    for item in answered:
        assert all(len(kept) <= k for kept, k in zip(item.chosen, most, strict=True))


def test_an_unsure_answer_is_run_again_and_both_passes_count() -> None:
    model = random_network(small_config())
    network = PackedPass(model)
    (once,) = works(random_items([6]), rule(4))
    (twice,) = works(random_items([6]), rule(4, below=1.0, step=4))
    finish(network, [once])
    finish(network, [twice])
    assert twice.step == 4
    assert sum(twice.heads) == sum(once.heads) + 3 * 4
    assert twice.macs > once.macs


def test_a_sure_answer_stands() -> None:
    model = random_network(small_config())
    (item,) = works(random_items([6]), rule(4, below=0.01, step=4))
    finish(PackedPass(model), [item])
    assert item.step in (1, 2)
    assert confidence(item.logits, None) >= 0.01


def test_step_0_answers_on_arrival() -> None:
    model = random_network(small_config(embedding_exit=True))
    items = works(random_items([6, 3]), BudgetRule(num_steps=4, fixed=0))
    cascade.arrive(PackedPass(model), items)
    assert all(item.done for item in items)
    assert all(sum(item.heads) == 0 for item in items)
    assert_close(
        torch.stack([item.logits for item in items]),
        model(**pad(random_items([6, 3])), steps=0).logits.detach(),
    )


def test_nothing_more_is_packed_where_step_0_reads_what_the_encoder_does() -> None:
    items = works(random_items([6, 3]), rule(4))
    assert cascade.pack_whole(items) is None
    assert [item.exit_tokens for item in items] == [6, 3]


def test_step_0_gets_the_whole_of_a_long_text_beside_the_others_as_they_are() -> None:
    fixed = BudgetRule(num_steps=4, fixed=0)
    long = Work.of(Tokens([2, 8, 3], [0, 0, 1], True, [2, 8, 9, 3, 3], [0, 0, 0, 1, 1]), fixed)
    short = Work.of(Tokens([2, 4, 3], [0, 0, 0], False), fixed)
    window, whole = cascade.pack([long, short]), cascade.pack_whole([long, short])
    assert whole is not None
    assert window.input_ids.tolist() == [2, 8, 3, 2, 4, 3]
    assert (whole.lengths, long.exit_tokens, short.exit_tokens) == ((5, 3), 5, 3)
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
    items = works([short, window, other], rule(4))
    items[1].whole, items[1].whole_segments = long.ids, long.segments
    cascade.arrive(PackedPass(model), items)
    reads = pad([short, long, other])
    expected = head(reads["input_ids"], reads["attention_mask"], reads["token_type_ids"])
    assert_close(torch.stack([item.exit_logits for item in items]), expected)
    assert items[1].dense_macs == dense_macs(model.config, 5)
    result = cascade.compute(PackedPass(model), items, [1, 1, 1])
    assert result.logits.shape == (3, model.config.num_classes)


def test_an_unsure_step_0_goes_on_at_once() -> None:
    model = random_network(small_config(embedding_exit=True))
    (item,) = works(random_items([6]), rule(4, below=1.0, step=3, first=0))
    cascade.arrive(PackedPass(model), [item])
    assert not item.done
    assert item.step in (1, 3)


@PROPERTY
@given(networks(budget_scope="layer"), batches())
def test_a_step_that_layers_choose_is_on_the_ladder(
    model: BudgetFormerForSequenceClassification, items: list[Item]
) -> None:
    """With an uneven ladder the heads of a layer are no step's number."""
    ladder = model.config.ladder
    answered = works(items, BudgetRule(num_steps=len(ladder)))
    finish(PackedPass(model), answered)
    for item in answered:
        assert 1 <= item.step <= len(ladder)
        kept = [len(heads) for heads in item.chosen]
        covers = [all(a <= b for a, b in zip(kept, plan, strict=True)) for plan in ladder]
        assert item.step == (covers.index(True) + 1 if any(covers) else len(ladder))
