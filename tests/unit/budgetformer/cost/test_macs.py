"""Multiply-adds: the counter against known products, the formulas against the counter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from budgetformer.cost.macs import (
    decision_macs,
    dense_macs,
    embedding_macs,
    encoder_macs,
    fits_in_full_pass,
    layer_macs,
)
from budgetformer.model.configuration import BudgetFormerConfig
from budgetformer.model.modeling import BudgetFormerForSequenceClassification
from tests.support.counter import MacCounter, step_macs
from tests.support.networks import PROPERTY, configs, networks, small_config

TOKENS = st.integers(0, 12)
NO_FUSION = {"exit_weight": 0.0, "encoder_weight": 1.0}
"""Fusion weights that fit a ladder of any length."""


def count(*calls: object) -> int:
    """Run functions under a counter: each call is (function, arguments...)."""
    with MacCounter() as counter:
        for function, *arguments in calls:  # type: ignore[misc]
            function(*arguments)
    return counter.macs


@pytest.mark.parametrize(
    ("function", "shapes", "expected"),
    [
        (F.linear, [(5, 3), (7, 3)], 5 * 3 * 7),
        (F.linear, [(2, 5, 3), (7, 3), (7,)], 2 * 5 * 3 * 7),
        (torch.matmul, [(5, 3), (3, 7)], 5 * 3 * 7),
        (torch.matmul, [(4, 5, 3), (3, 7)], 4 * 5 * 3 * 7),
        (torch.mm, [(5, 3), (3, 7)], 5 * 3 * 7),
        (torch.bmm, [(4, 5, 3), (4, 3, 7)], 4 * 5 * 3 * 7),
        (torch.addmm, [(7,), (5, 3), (3, 7)], 5 * 3 * 7),
        (torch.Tensor.matmul, [(5, 3), (3, 7)], 5 * 3 * 7),
        (torch.Tensor.__matmul__, [(5, 3), (3, 7)], 5 * 3 * 7),
        (
            F.scaled_dot_product_attention,
            [(1, 2, 5, 3), (1, 2, 6, 3), (1, 2, 6, 3)],
            2 * 2 * 5 * 6 * 3,
        ),
        (torch.add, [(5, 3), (5, 3)], 0),
        (torch.mul, [(5, 3), (5, 3)], 0),
        (F.relu, [(5, 3)], 0),
        (torch.sum, [(5, 3)], 0),
    ],
)
def test_counter_counts_products_by_their_shapes(
    function: object, shapes: list[tuple[int, ...]], expected: int
) -> None:
    assert count((function, *(torch.ones(shape) for shape in shapes))) == expected


def test_counter_counts_nothing_outside_its_block() -> None:
    counter = MacCounter()
    torch.ones(2, 3) @ torch.ones(3, 2)
    with counter:
        torch.ones(2, 3) @ torch.ones(3, 2)
    torch.ones(2, 3) @ torch.ones(3, 2)
    assert counter.macs == 12


def test_counter_ignores_embedding_lookups_and_norms() -> None:
    embedding, norm = torch.nn.Embedding(10, 4), torch.nn.LayerNorm(4)
    assert count((embedding, torch.tensor([1, 2])), (norm, torch.ones(2, 4))) == 0


def test_layer_macs_match_a_hand_calculation() -> None:
    # width 16, head 4, 6 neurons per head; 2 heads over 5 tokens
    config = small_config()
    projections = 4 * 5 * 16 * 8
    attention = 2 * 5 * 5 * 8
    feed_forward = 2 * 5 * 16 * 12
    assert layer_macs(config, 2, 5) == projections + attention + feed_forward


def test_decision_macs_match_a_hand_calculation() -> None:
    controller = 16 * 5 + 5
    scorer = 16 * 3 * 4
    assert decision_macs(small_config()) == controller
    assert decision_macs(small_config(head_selection="input")) == controller + scorer
    assert decision_macs(small_config(budget_scope="layer")) == 3 * controller
    assert (
        decision_macs(small_config(budget_scope="layer", head_selection="input"))
        == 3 * controller + scorer
    )
    assert decision_macs(small_config(embedding_exit=True)) == controller + 2 * 5


def test_step_zero_costs_the_decision() -> None:
    config = small_config(embedding_exit=True)
    assert step_macs(config, [0], 9) == decision_macs(config)


def test_an_escalation_pays_for_both_passes_and_one_decision() -> None:
    config = small_config(ladder=[[1, 0, 1], [4, 4, 4]])
    both = step_macs(config, [1, 2], 7)
    first, second = (encoder_macs(config, config.heads_per_layer(step), 7) for step in (1, 2))
    assert both == decision_macs(config) + first + second


def test_escalating_from_step_zero_costs_one_pass() -> None:
    config = small_config(embedding_exit=True)
    assert step_macs(config, [0, 3], 7) == step_macs(config, [3], 7)


@PROPERTY
@given(
    # The reference maps distance embeddings in each call; a compact pass maps them once.
    networks().filter(lambda network: network.encoder.distances is None),
    st.integers(1, 3),
    st.integers(1, 12),
)
def test_reference_network_executes_dense_macs(
    network: BudgetFormerForSequenceClassification, count_of_items: int, tokens: int
) -> None:
    ids = torch.ones(count_of_items, tokens, dtype=torch.long)
    with torch.no_grad(), MacCounter() as counter:
        network(ids)
    # The reference embeds once, for the decision and for the encoder.
    each = dense_macs(network.config, tokens) + decision_macs(network.config)
    assert counter.macs == count_of_items * each


@PROPERTY
@given(configs(), TOKENS)
def test_full_step_costs_the_dense_network_and_the_decision(
    config: BudgetFormerConfig, tokens: int
) -> None:
    full = [config.num_attention_heads] * config.num_hidden_layers
    changes = {"ladder": [full]} | NO_FUSION
    config = BudgetFormerConfig.from_dict(config.to_dict() | changes)
    decided = decision_macs(config, tokens)
    assert step_macs(config, [1], tokens) == dense_macs(config, tokens) + decided


@PROPERTY
@given(configs(), st.integers(0, 3), TOKENS)
def test_layer_cost_rises_with_heads(config: BudgetFormerConfig, heads: int, tokens: int) -> None:
    more = layer_macs(config, heads + 1, tokens)
    fewer = layer_macs(config, heads, tokens)
    assert more >= fewer
    assert (more > fewer) == (tokens > 0)


@PROPERTY
@given(configs(), TOKENS)
def test_uniform_step_cost_rises_with_the_step(config: BudgetFormerConfig, tokens: int) -> None:
    config = BudgetFormerConfig.from_dict(config.to_dict() | {"ladder": None} | NO_FUSION)
    costs = [step_macs(config, [step], tokens) for step in range(1, config.num_steps + 1)]
    assert costs == sorted(costs)


@PROPERTY
@given(configs(), st.integers(0, 4), TOKENS)
def test_cost_rises_with_tokens(config: BudgetFormerConfig, heads: int, tokens: int) -> None:
    assert layer_macs(config, heads, tokens + 1) >= layer_macs(config, heads, tokens)
    assert dense_macs(config, tokens + 1) > dense_macs(config, tokens)


@PROPERTY
@given(configs(budget_ffn=True, ladder=None), TOKENS)
def test_coupled_neurons_save_macs_for_every_unselected_head(
    config: BudgetFormerConfig, tokens: int
) -> None:
    whole = BudgetFormerConfig.from_dict(config.to_dict() | {"budget_ffn": False})
    heads = config.num_attention_heads
    assert layer_macs(config, heads, tokens) == layer_macs(whole, heads, tokens)
    for fewer in range(1, heads):
        saved = layer_macs(whole, fewer, tokens) - layer_macs(config, fewer, tokens)
        maps = 3 if config.gated_ffn else 2
        neurons = (heads - fewer) * config.neurons_per_head
        assert saved == maps * tokens * config.hidden_size * neurons


def top_macs(config: BudgetFormerConfig) -> int:
    """Return the multiply-adds between the pooled state and the logits."""
    width = config.hidden_size
    return width * config.num_labels + (width * width if config.head_activation else 0)


@PROPERTY
@given(configs(), TOKENS)
def test_a_layer_without_heads_costs_nothing(config: BudgetFormerConfig, tokens: int) -> None:
    assert layer_macs(config, 0, tokens) == 0
    none = [0] * config.num_hidden_layers
    embedded = embedding_macs(config, tokens)
    assert encoder_macs(config, none, tokens) == embedded + top_macs(config)


@PROPERTY
@given(configs())
def test_an_empty_item_costs_its_decision_and_the_classifier(config: BudgetFormerConfig) -> None:
    assert dense_macs(config, 0) == top_macs(config)
    assert step_macs(config, [config.num_steps], 0) == decision_macs(config) + top_macs(config)


@PROPERTY
@given(configs(budget_scope="input", **NO_FUSION), st.data())
def test_a_chain_that_fits_never_costs_more_than_the_full_step(
    config: BudgetFormerConfig, data: st.DataObject
) -> None:
    chain = sorted(data.draw(st.sets(st.integers(1, config.num_steps), min_size=1)))
    tokens = data.draw(st.integers(1, 600))
    full = step_macs(config, [config.num_steps], tokens)
    fits = fits_in_full_pass(config, chain)
    if fits:
        assert step_macs(config, chain, tokens) <= full
    else:  # then the chain costs more at some length
        lengths = [1, 2, 3, 10**6]
        assert any(
            step_macs(config, chain, n) > step_macs(config, [config.num_steps], n) for n in lengths
        )


def test_a_single_step_fits_in_a_full_pass_and_two_full_ones_do_not() -> None:
    config = small_config(embedding_exit=True)
    assert all(fits_in_full_pass(config, [0, step]) for step in range(1, config.num_steps + 1))
    assert fits_in_full_pass(config, [0, 1, 2])
    assert not fits_in_full_pass(config, [0, 2, 3])
    assert not fits_in_full_pass(config, [1, config.num_steps])
