"""The compact pass against the reference network, which computes all heads and masks them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from budgetformer.cost.macs import decision_macs, encoder_macs, scorer_macs
from budgetformer.inference import precision_choice
from budgetformer.inference import weights as weights_module
from budgetformer.inference.backends import linear, private
from budgetformer.inference.backends.linear import PRECISIONS
from budgetformer.inference.packed import BudgetPrediction, PackedPass, PackedTokens, PassResult
from budgetformer.inference.precision_choice import MIN_WEIGHTS, choose_precision, load_pass
from budgetformer.model.modeling import BudgetFormerForSequenceClassification
from tests.support.counter import MacCounter
from tests.support.networks import (
    LARGE,
    POSITIONS,
    PROPERTY,
    Item,
    assert_close,
    batches,
    gates_of,
    networks,
    pack,
    pad,
    random_items,
    random_network,
    reference_logits,
    small_config,
    step_lists,
)

Network = BudgetFormerForSequenceClassification

BFLOAT16_BOUND = 0.05
"""Largest error of the bfloat16 logits of random networks, relative to the largest logit."""


def classify(
    network: Network,
    items: list[Item],
    steps: list[int] | None = None,
    precision: str = "float32",
) -> tuple[BudgetPrediction, PassResult]:
    """Run items through a new compact pass: the decision, then the encoder."""
    compact = load_pass(network, precision)
    tokens = pack(items)
    decision = compact.decide(tokens)
    return decision, compact.run(tokens, steps, decision.exit_logits, decision.ranking)


def draw_steps(data: st.DataObject, network: Network, items: list[Item]) -> list[int]:
    return data.draw(step_lists(network.config, len(items)), label="steps")


def draw_budget(data: st.DataObject, network: Network, items: list[Item]) -> list[int] | None:
    """Draw the steps, or None if the layers decide."""
    if network.config.budget_scope == "layer" and data.draw(st.booleans(), label="layers decide"):
        return None
    return draw_steps(data, network, items)


@PROPERTY
@given(networks(), batches(), st.data())
def test_equals_the_reference_at_the_same_steps(
    network: Network, items: list[Item], data: st.DataObject
) -> None:
    steps = draw_steps(data, network, items)
    _, result = classify(network, items, steps)
    assert_close(result.logits, reference_logits(network, items, steps=torch.tensor(steps)))


@PROPERTY
@given(networks(budget_scope="input"), batches(), st.data())
def test_is_close_to_the_reference_in_bfloat16(
    network: Network, items: list[Item], data: st.DataObject
) -> None:
    steps = draw_steps(data, network, items)
    _, result = classify(network, items, steps, "bfloat16")
    expected = reference_logits(network, items, steps=torch.tensor(steps))
    scale = max(1.0, expected.abs().max().item())
    assert (result.logits - expected).abs().max().item() <= BFLOAT16_BOUND * scale


@PROPERTY
@given(networks(budget_scope="layer"), batches())
def test_equals_the_reference_if_layers_decide(network: Network, items: list[Item]) -> None:
    _, result = classify(network, items)
    assert_close(result.logits, reference_logits(network, items))


@PROPERTY
@given(networks(), batches(), st.data())
def test_equals_the_reference_masked_to_the_heads_it_reports(
    network: Network, items: list[Item], data: st.DataObject
) -> None:
    steps = draw_budget(data, network, items)
    _, result = classify(network, items, steps)
    gates = gates_of(result.selected_heads, network.config.num_attention_heads)
    reference_steps = None if steps is None else torch.tensor(steps)
    expected = reference_logits(network, items, steps=reference_steps, gates=gates)
    assert_close(result.logits, expected)


@PROPERTY
@given(networks(budget_scope="input", head_selection="input"), batches(), st.data())
def test_computes_the_first_heads_of_any_ranking(
    network: Network, items: list[Item], data: st.DataObject
) -> None:
    config = network.config
    steps = draw_steps(data, network, items)
    order = st.permutations(range(config.num_attention_heads))
    layers = st.lists(order, min_size=config.num_hidden_layers, max_size=config.num_hidden_layers)
    ranking = torch.tensor([data.draw(layers) for _ in items])
    compact = load_pass(network)
    result = compact.run(
        pack(items), steps, exit_logits=compact.decide(pack(items)).exit_logits, ranking=ranking
    )
    for item, step in enumerate(steps):
        for layer, kept in enumerate(config.heads_per_layer(step)):
            assert result.selected_heads[item][layer] == tuple(
                sorted(ranking[item, layer, :kept].tolist())
            )
    gates = gates_of(result.selected_heads, config.num_attention_heads)
    reference_steps = torch.tensor(steps)
    expected = reference_logits(network, items, steps=reference_steps, gates=gates)
    assert_close(result.logits, expected)


@PROPERTY
@given(networks(budget_scope="input"), batches(), st.data())
def test_without_fusion_the_encoder_answers_alone(
    network: Network, items: list[Item], data: st.DataObject
) -> None:
    steps = draw_steps(data, network, items)
    compact, tokens = load_pass(network), pack(items)
    decision = compact.decide(tokens)
    alone = compact.run(tokens, steps, decision.exit_logits, decision.ranking, fused=False)
    network.config.encoder_weight, network.config.exit_weight = 1.0, 0.0
    assert_close(alone.logits, reference_logits(network, items, steps=torch.tensor(steps)))


@PROPERTY
@given(networks(), batches(), st.data())
def test_computes_as_many_heads_as_the_ladder_says(
    network: Network, items: list[Item], data: st.DataObject
) -> None:
    steps = draw_steps(data, network, items)
    _, result = classify(network, items, steps)
    computed = [[len(kept) for kept in item] for item in result.selected_heads]
    assert computed == [network.config.heads_per_layer(step) for step in steps]


@PROPERTY
@given(networks(head_selection="ranked"), batches(), st.data())
def test_ranked_selection_uses_the_first_heads(
    network: Network, items: list[Item], data: st.DataObject
) -> None:
    _, result = classify(network, items, draw_budget(data, network, items))
    assert all(kept == tuple(range(len(kept))) for item in result.selected_heads for kept in item)


@PROPERTY
@given(networks(budget_scope="input"), batches())
def test_decisions_equal_the_reference(network: Network, items: list[Item]) -> None:
    decision = load_pass(network).decide(pack(items))
    with torch.no_grad():
        expected = network(**pad(items), steps=1)
    assert decision.budget is not None
    assert_close(decision.budget, expected.budget[:, 0])
    assert (decision.exit_logits is None) == (expected.exit_logits is None)
    if decision.exit_logits is not None:
        assert_close(decision.exit_logits, expected.exit_logits)
    assert (decision.ranking is None) == (expected.relevance is None)
    if decision.ranking is not None:
        assert_close(
            expected.relevance.gather(-1, decision.ranking),
            expected.relevance.sort(-1, descending=True).values,
        )


@PROPERTY
@given(networks(budget_scope="layer"), batches())
def test_nothing_is_decided_in_advance_if_layers_decide(
    network: Network, items: list[Item]
) -> None:
    assert load_pass(network).decide(pack(items)) == BudgetPrediction(None, None, None)


@PROPERTY
@given(networks(), batches(smallest=2), st.data())
def test_an_answer_does_not_depend_on_the_other_items(
    network: Network, items: list[Item], data: st.DataObject
) -> None:
    steps = draw_budget(data, network, items)
    decision, together = classify(network, items, steps)
    for i, item in enumerate(items):
        alone_decision, alone = classify(network, [item], None if steps is None else [steps[i]])
        assert alone.selected_heads[0] == together.selected_heads[i]
        assert_close(together.logits[i], alone.logits[0])
        if decision.budget is not None and alone_decision.budget is not None:
            assert_close(decision.budget[i], alone_decision.budget[0])


@PROPERTY
@given(networks(), batches(smallest=2), st.data())
def test_answers_follow_the_order_of_the_batch(
    network: Network, items: list[Item], data: st.DataObject
) -> None:
    steps = draw_budget(data, network, items)
    order = data.draw(st.permutations(range(len(items))), label="order")
    _, original = classify(network, items, steps)
    _, reordered = classify(
        network, [items[i] for i in order], None if steps is None else [steps[i] for i in order]
    )
    assert reordered.selected_heads == [original.selected_heads[i] for i in order]
    assert_close(reordered.logits, original.logits[order])


@PROPERTY
@given(networks(), batches(), st.data())
def test_padding_does_not_change_the_reference(
    network: Network, items: list[Item], data: st.DataObject
) -> None:
    # the compact pass has no padding, so the padding of the reference must not matter
    steps = draw_steps(data, network, items)
    assume(all(items))
    alone = [
        reference_logits(network, [item], steps=torch.tensor([step]))
        for item, step in zip(items, steps, strict=True)
    ]
    together = reference_logits(network, items, steps=torch.tensor(steps))
    assert_close(together, torch.cat(alone))


def counted_decision(network: Network, tokens: int) -> int:
    """Return the multiply-adds of a decision that `MacCounter` counts: torch's, not NumPy's."""
    decided = decision_macs(network.config, tokens)
    if network.step0_with_numpy() is None:
        return decided
    return decided - decision_macs(network.config) + scorer_macs(network.config)


@PROPERTY
@given(networks(), batches(), st.data())
def test_executes_the_multiply_adds_of_the_selected_heads_only(
    network: Network, items: list[Item], data: st.DataObject
) -> None:
    config = network.config
    layers_decide = config.budget_scope == "layer"
    steps = None if layers_decide else draw_steps(data, network, items)
    compact, tokens = load_pass(network), pack(items)
    with MacCounter() as counter:
        decision = compact.decide(tokens)
        result = compact.run(tokens, steps, decision.exit_logits, decision.ranking)
    expected = sum(
        counted_decision(network, len(item))
        + encoder_macs(config, [len(kept) for kept in heads], len(item))
        for item, heads in zip(items, result.selected_heads, strict=True)
    )
    assert counter.macs == expected


@PROPERTY
@given(networks(budget_scope="input"), batches(), st.data())
def test_decision_and_encoder_execute_their_own_multiply_adds(
    network: Network, items: list[Item], data: st.DataObject
) -> None:
    config, compact, tokens = network.config, load_pass(network), pack(items)
    steps = draw_steps(data, network, items)
    with MacCounter() as deciding:
        decision = compact.decide(tokens)
    with MacCounter() as running:
        compact.run(tokens, steps, decision.exit_logits, decision.ranking)
    assert deciding.macs == sum(counted_decision(network, len(item)) for item in items)
    assert running.macs == sum(
        encoder_macs(config, config.heads_per_layer(step), len(item))
        for item, step in zip(items, steps, strict=True)
    )


@torch.no_grad()
def set_head_to_nan(network: Network, layer: int, head: int) -> None:
    """Set all weights of one head to NaN."""
    config, target = network.config, network.encoder.layers[layer]
    rows = slice(head * config.head_size, (head + 1) * config.head_size)
    attention, net = target.attention, target.feed_forward
    for projection in (attention.query, attention.key, attention.value):
        projection.weight[rows] = torch.nan
        projection.bias[rows] = torch.nan
    attention.output.weight[:, rows] = torch.nan
    if (count := target.spec.neurons_per_head) is not None:
        neurons = slice(head * count, (head + 1) * count)
        net.up.weight[neurons] = torch.nan
        net.up.bias[neurons] = torch.nan
        net.down.weight[:, neurons] = torch.nan


@PROPERTY
@given(networks(), batches(), st.data())
def test_no_unselected_head_is_multiplied(
    network: Network, items: list[Item], data: st.DataObject
) -> None:
    steps = draw_budget(data, network, items)
    _, clean = classify(network, items, steps)
    for layer in range(network.config.num_hidden_layers):
        used = {head for item in clean.selected_heads for head in item[layer]}
        for head in set(range(network.config.num_attention_heads)) - used:
            set_head_to_nan(network, layer, head)
    _, result = classify(network, items, steps)
    assert result.selected_heads == clean.selected_heads
    assert result.logits.isfinite().all()
    assert torch.equal(result.logits, clean.logits)


def test_a_head_of_nan_makes_answers_nan_only_if_it_is_multiplied() -> None:
    network = random_network(small_config())
    set_head_to_nan(network, layer=1, head=3)
    items = random_items([4])
    assert classify(network, items, [3])[1].logits.isfinite().all()
    assert not classify(network, items, [4])[1].logits.isfinite().all()
    assert not reference_logits(network, items, steps=torch.tensor([3])).isfinite().all()


@pytest.mark.parametrize("selection", ["input", "ranked"])
@pytest.mark.parametrize("scope", ["input", "layer"])
@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_every_kind_of_network_equals_the_reference(
    selection: str, scope: str, norm: str, pooling: str
) -> None:
    config = small_config(
        head_selection=selection,
        budget_scope=scope,
        norm_position=norm,
        pooling=pooling,
        ladder=[[0, 1, 0], [2, 1, 3], [4, 4, 4]],
    )
    network = random_network(config, seed=1)
    items = random_items([5, 0, 12, 1, 7])
    steps = [1, 2, 3, 3, 2]
    _, result = classify(network, items, steps)
    assert_close(result.logits, reference_logits(network, items, steps=torch.tensor(steps)))
    assert result.logits.abs().max() > 0.1


@pytest.mark.parametrize("length", range(13))
def test_every_length_equals_the_reference(length: int) -> None:
    network = random_network(small_config(embedding_exit=True, exit_weight=0.5))
    items = random_items([length])
    _, result = classify(network, items, [2])
    assert_close(result.logits, reference_logits(network, items, steps=torch.tensor([2])))


def test_segments_change_the_answer() -> None:
    network = random_network(small_config())
    pair = random_items([6])
    text = [Item(pair[0].ids, [0] * 6)]
    assert not torch.equal(
        classify(network, pair, [2])[1].logits, classify(network, text, [2])[1].logits
    )


def test_packing_without_segments_makes_them_zero() -> None:
    tokens = PackedTokens.pack([[4, 5], [], [6]])
    assert tokens.input_ids.tolist() == [4, 5, 6]
    assert tokens.token_type_ids.tolist() == [0, 0, 0]
    assert tokens.lengths == (2, 0, 1)


def test_packing_keeps_segments_in_order() -> None:
    tokens = PackedTokens.pack([[4, 5], [6]], [[0, 1], [1]])
    assert tokens.token_type_ids.tolist() == [0, 1, 1]


def test_packing_no_items_gives_an_empty_batch() -> None:
    tokens = PackedTokens.pack([])
    assert tokens.input_ids.shape == (0,)
    assert tokens.lengths == ()


@pytest.mark.parametrize("scope", ["input", "layer"])
@pytest.mark.parametrize("selection", ["input", "ranked"])
def test_empty_items_get_the_bias(scope: str, selection: str) -> None:
    network = random_network(small_config(budget_scope=scope, head_selection=selection))
    _, result = classify(network, [Item([], []), Item([], [])], [1, 4])
    assert result.logits.isfinite().all()
    assert_close(result.logits, network.classifier.bias.detach().expand(2, -1))


def test_empty_item_has_a_budget_and_a_step_zero_answer() -> None:
    network = random_network(small_config(embedding_exit=True))
    decision = load_pass(network).decide(pack([Item([], [])]))
    assert decision.budget is not None
    assert decision.exit_logits is not None
    assert network.exit_head is not None
    assert 0 < decision.budget.item() < 1
    assert torch.equal(decision.exit_logits[0], network.exit_head.bias)


def test_layers_without_heads_keep_the_embeddings() -> None:
    network = random_network(small_config(ladder=[[0, 0, 0], [4, 4, 4]]))
    items = random_items([5])
    _, result = classify(network, items, [1])
    embedded = network.encoder.embed(
        torch.tensor([items[0].ids]), torch.tensor([items[0].segments])
    )
    assert result.selected_heads == [[(), (), ()]]
    assert_close(result.logits, network.classifier(embedded.mean(1)).detach())


def test_a_repeated_pass_gives_equal_answers() -> None:
    network = random_network(small_config(head_selection="input"))
    compact, tokens = load_pass(network), pack(random_items([3, 8, 5]))
    ranking = compact.decide(tokens).ranking
    first = compact.run(tokens, [1, 2, 3], ranking=ranking)
    again = compact.run(tokens, [1, 2, 3], ranking=ranking)
    assert torch.equal(first.logits, again.logits)


def test_answers_do_not_depend_on_the_slice_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    network = random_network(small_config())
    items, steps = random_items([3, 8, 5]), [1, 2, 4]
    cached = classify(network, items, steps)[1]
    monkeypatch.setattr(weights_module, "CACHE_BYTES", 1)
    compact = load_pass(network)
    for _ in range(2):
        assert torch.equal(compact.run(pack(items), steps).logits, cached.logits)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("coupled", [True, False])
def test_warming_does_not_change_answers(precision: str, coupled: bool) -> None:
    network = random_network(small_config(budget_ffn=coupled))
    items, steps = random_items([3, 8, 5]), [2, 2, 2]
    cold = classify(network, items, steps, precision)[1]
    compact = load_pass(network, precision)
    compact.warm([2, 4])
    assert torch.equal(compact.run(pack(items), steps).logits, cold.logits)


@pytest.mark.parametrize("precision", ["auto", "fastest"])
def test_a_small_network_runs_in_float32(precision: str) -> None:
    assert load_pass(random_network(small_config()), precision).precision == "float32"


def test_fastest_selects_a_precision_and_frees_the_weights_of_others() -> None:
    chosen = load_pass(random_network(small_config(**LARGE)), "fastest")
    assert chosen.precision in PRECISIONS
    assert not list(chosen._slices._slices)  # packed for timing only


@pytest.mark.parametrize("supported", [True, False])
def test_fastest_does_not_time_bfloat16_without_support(
    monkeypatch: pytest.MonkeyPatch, supported: bool
) -> None:
    tried: list[str] = []

    def make_pass(model: Network, precision: str, *_: object, **__: object) -> PackedPass:
        tried.append(precision)
        return PackedPass(model)

    monkeypatch.setattr(private, "multiplies_bfloat16", lambda: supported)
    monkeypatch.setattr(precision_choice, "make_pass", make_pass)
    load_pass(random_network(small_config(**LARGE)), "fastest")
    assert ("bfloat16" in tried) == supported


def test_auto_never_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision_choice, "_time", None)
    network = random_network(small_config(**LARGE))
    chosen = {load_pass(network, "auto").precision for _ in range(3)}
    assert len(chosen) == 1


@pytest.mark.parametrize(
    ("amx", "avx2", "ranges", "weights", "expected"),
    [
        (True, True, True, MIN_WEIGHTS, "bfloat16"),
        (True, True, False, MIN_WEIGHTS, "bfloat16"),
        (False, True, True, MIN_WEIGHTS, "int8"),
        (False, True, False, MIN_WEIGHTS, "float32"),
        (False, False, True, MIN_WEIGHTS, "float32"),
        (True, True, True, MIN_WEIGHTS - 1, "float32"),
    ],
)
def test_auto_selects_by_processor_ranges_and_size(
    monkeypatch: pytest.MonkeyPatch,
    amx: bool,
    avx2: bool,
    ranges: bool,
    weights: int,
    expected: str,
) -> None:
    monkeypatch.setattr(precision_choice, "has_amx", lambda: amx)
    monkeypatch.setattr(precision_choice, "can_multiply_int8", lambda _: avx2)
    precision, reason = choose_precision(torch.device("cpu"), weights, ranges)
    assert precision == expected
    assert reason


@pytest.mark.parametrize(("supported", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_auto_selects_bfloat16_on_gpus_that_support_it(
    monkeypatch: pytest.MonkeyPatch, supported: bool, expected: str
) -> None:
    monkeypatch.setattr(precision_choice, "can_multiply_bfloat16", lambda _: supported)
    assert choose_precision(torch.device("cuda"), MIN_WEIGHTS, True)[0] == expected


def test_amx_is_detected_by_torch() -> None:
    assert "amx_bf16" in torch.cpu.get_capabilities()
    assert linear.has_amx() == torch.cpu.get_capabilities()["amx_bf16"]


def test_packed_weights_count_as_memory() -> None:
    compact = load_pass(random_network(small_config()), "bfloat16")
    before = compact.nbytes
    compact.warm([4])
    assert compact.nbytes > before


def test_a_pass_without_steps_is_refused() -> None:
    compact = load_pass(random_network(small_config()))
    with pytest.raises(ValueError, match="pass `steps`"):
        compact.run(pack(random_items([3])))


@pytest.mark.parametrize("step", [0, 5, -1])
def test_a_step_outside_the_ladder_is_refused(step: int) -> None:
    compact = load_pass(random_network(small_config()))
    with pytest.raises(ValueError, match=f"step {step} is not on the ladder"):
        compact.run(pack(random_items([3])), [step])


def test_selection_per_input_without_a_ranking_is_refused() -> None:
    compact = load_pass(random_network(small_config(head_selection="input")))
    with pytest.raises(ValueError, match="ranking"):
        compact.run(pack(random_items([3])), [2])


def test_a_pass_at_step_0_is_refused() -> None:
    compact = load_pass(random_network(small_config(embedding_exit=True)))
    tokens = pack(random_items([3]))
    with pytest.raises(ValueError, match="step 0"):
        compact.run(tokens, [0], compact.decide(tokens).exit_logits)


@pytest.mark.parametrize("length", [POSITIONS + 1, 10 * POSITIONS])
def test_items_longer_than_the_positions_are_refused(length: int) -> None:
    compact = load_pass(random_network(small_config()))
    tokens = pack(random_items([2, length]))
    with pytest.raises(
        ValueError, match=f"{length} tokens, but the network has only {POSITIONS} positions"
    ):
        compact.decide(tokens)
    with pytest.raises(
        ValueError, match=f"{length} tokens, but the network has only {POSITIONS} positions"
    ):
        compact.run(tokens, [1, 1])


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown precision 'telepathy'; known: .*float32"):
        load_pass(random_network(small_config()), "telepathy")


def test_loading_a_pass_sets_evaluation_mode() -> None:
    network = random_network(small_config()).train()
    load_pass(network)
    assert not network.training


def test_tokens_keep_all_columns_on_another_device() -> None:
    tokens = PackedTokens.pack([[4, 5], [6]], [[0, 1], [1]])
    moved = tokens.to(torch.device("cpu"))
    assert moved.lengths == tokens.lengths
    assert torch.equal(moved.input_ids, tokens.input_ids)
    assert torch.equal(moved.token_type_ids, tokens.token_type_ids)


def test_a_pass_bypasses_the_overrides_of_its_operands() -> None:
    # With packed weights, each call of `__torch_function__` costs an exception.
    calls: list[type] = []

    class Overriding(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            calls.append(cls)
            return super().__torch_function__(func, types, args, kwargs or {})

    compact = load_pass(random_network(small_config()))
    tokens = pack(random_items([5, 3]))
    overriding = replace(tokens, input_ids=tokens.input_ids.as_subclass(Overriding))
    compact.decide(overriding)
    compact.run(overriding, [2, 2])
    assert not calls
    overriding.input_ids.add(1)
    assert calls
