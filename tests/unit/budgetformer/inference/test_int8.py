"""Passes in int8: states are quantized by ranges that calibration has measured."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from budgetformer.inference import precision_choice
from budgetformer.inference.backends import private
from budgetformer.inference.backends.linear import (
    CHECK_EVERY,
    RangeCheck,
    can_multiply_int8,
    int8_linear,
)
from budgetformer.inference.packed import PackedPass
from budgetformer.inference.precision_choice import load_pass
from budgetformer.inference.range_observer import measure_ranges
from budgetformer.inference.ranges import LayerRanges, StateRange
from budgetformer.model.modeling import BudgetFormerForSequenceClassification
from tests.support.networks import (
    LARGE,
    POSITIONS,
    PROPERTY,
    Item,
    assert_close,
    batches,
    networks,
    pack,
    pad,
    random_items,
    random_network,
    small_config,
    step_lists,
)

Network = BudgetFormerForSequenceClassification

pytestmark = pytest.mark.skipif(
    not can_multiply_int8(torch.device("cpu")), reason="no products in int8 here"
)

BOUND = 0.4
"""Largest error of the int8 logits of random networks, relative to the largest logit."""
EMPTY_RANGE = StateRange(low=0, high=0)


def rounded(
    states: Tensor, weight: Tensor, bias: Tensor, reads: StateRange, outliers: list[int]
) -> Tensor:
    """Multiply in exact arithmetic what int8 multiplies: weights of 127 levels, states of 256."""
    exact = states[:, outliers].double() @ weight[:, outliers].double().T
    weight = weight.index_fill(1, torch.tensor(outliers, dtype=torch.long), 0.0)
    scales = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / 63
    scale = (reads.high - reads.low) / 255 or 1.0
    zero = round(-reads.low / scale)
    levels = ((states / scale).round() + zero).clamp(0, 255) - zero
    weights = (weight / scales).round()
    return levels.double() @ weights.double().T * (scale * scales.double().T) + bias + exact


FLIP = 2e-2
"""Largest relative change of an answer when a few states are rounded to the next level.

Processors sum the rows of other batches in another order, and a state half way between two levels
may be rounded to either.
"""


def in_int8(network: Network, items: list[Item]) -> PackedPass:
    """Return an int8 pass with the ranges of the states of some items."""
    return load_pass(network, "int8", measure_ranges(network, [pack(items)]))


def answer(compact: PackedPass, items: list[Item], steps: list[int] | None) -> Tensor:
    tokens = pack(items)
    decision = compact.decide(tokens)
    return compact.run(tokens, steps, decision.exit_logits, decision.ranking).logits


@PROPERTY
@given(
    st.integers(1, 70),
    st.integers(1, 70),
    st.integers(1, 70),
    st.floats(-5, 0, width=32),
    st.floats(0, 5, width=32),
    st.lists(st.integers(0, 69), max_size=4, unique=True),
    st.integers(0, 2**16),
)
def test_a_product_is_that_of_the_quantized_numbers(
    rows: int,
    inner: int,
    columns: int,
    low: float,
    high: float,
    outliers: list[int],
    seed: int,
) -> None:
    reads = StateRange(low=low, high=high)
    outliers = [column for column in outliers if column < inner]
    random = torch.Generator().manual_seed(seed)
    states = torch.randn(rows, inner, generator=random) * 3
    weight = torch.randn(columns, inner, generator=random)
    bias = torch.randn(columns, generator=random)
    result = int8_linear(weight, bias, reads, outliers)(states)
    expected = rounded(states, weight, bias, reads, outliers)
    # A state half way between two levels may be rounded to either.
    level = (high - low) / 255 * weight.abs().max()
    assert (result - expected).abs().max() <= level + 1e-4 * expected.abs().max()
    assert (result - expected).abs().median() <= 1e-4 * (1 + expected.abs().max())


@pytest.mark.parametrize("state", [-1e6, 1e6, -2.0, 3.0])
def test_states_outside_their_range_are_clipped(state: float) -> None:
    result = int8_linear(torch.ones(1, 1), None, StateRange(low=-2, high=3))(
        torch.full((1, 1), state)
    )
    assert result.item() == pytest.approx(max(-2.0, min(3.0, state)), abs=0.02)


def test_states_outside_their_range_are_counted() -> None:
    check = RangeCheck()
    product = int8_linear(torch.eye(3), None, StateRange(low=-1, high=1), [2], check=check)
    states = torch.tensor([[0.5, 1.0, 9.0], [1.2, -1.0, -9.0], [-3.0, 0.0, 0.0]])
    product(states)
    assert (check.checked, check.clipped) == (6, 2)  # the outlier column is not in int8
    for _ in range(CHECK_EVERY):
        product(states)
    assert check.take() == (12, 4)
    assert check.take() == (0, 0)


def test_a_pass_counts_the_states_that_exceed_their_ranges() -> None:
    network = random_network(small_config())
    calibrated, others = random_items([5]), random_items([POSITIONS, 3, 7], seed=1)
    compact = in_int8(network, calibrated)
    compact.warm([1])
    assert compact.range_check.take() == (0, 0)
    last = network.config.num_steps
    answer(compact, others, [last] * len(others))
    checked, clipped = compact.range_check.take()
    assert 0 < clipped < checked


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (-0.17, 30.0), (-8.0, 0.0)])
def test_the_largest_products_do_not_overflow(low: float, high: float) -> None:
    # Processors without a better instruction add two products in 16 bits.
    inner = 512
    states = torch.full((3, inner), max(low, high, key=abs))
    reads = StateRange(low=low, high=high)
    for sign in (1.0, -1.0):
        result = int8_linear(torch.full((5, inner), sign), None, reads)(states)
        assert_close(result, sign * inner * states[:, :5], tolerance=0.005)


def test_zero_weights_give_the_bias() -> None:
    bias = torch.tensor([1.0, -2.0])
    result = int8_linear(torch.zeros(2, 9), bias, EMPTY_RANGE)(torch.randn(4, 9))
    assert torch.equal(result, bias.expand(4, -1))


@PROPERTY
@given(networks(hidden_size=48, budget_scope="input"), batches(), st.data())
def test_stays_near_the_reference(network: Network, items: list[Item], data: st.DataObject) -> None:
    steps = data.draw(step_lists(network.config, len(items)), label="steps")
    result = answer(in_int8(network, items), items, steps)
    with torch.no_grad():
        expected = network(**pad(items), steps=torch.tensor(steps)).logits
    scale = max(1.0, expected.abs().max().item())
    assert (result - expected).abs().max().item() <= BOUND * scale


@PROPERTY
@given(networks(head_selection="ranked"), batches(smallest=2), batches(), st.data())
def test_an_answer_does_not_depend_on_the_other_items(
    network: Network, items: list[Item], calibrated: list[Item], data: st.DataObject
) -> None:
    # One step for all, because texts with other heads are summed in another order.
    steps = [data.draw(st.integers(1, network.config.num_steps), label="step")] * len(items)
    compact = in_int8(network, calibrated)
    together = answer(compact, items, steps)
    order = data.draw(st.permutations(range(len(items))), label="order")
    reordered = answer(compact, [items[i] for i in order], [steps[i] for i in order])
    for i, item in enumerate(items):
        alone = answer(compact, [item], [steps[i]])[0]
        assert_close(together[i], alone, tolerance=FLIP)
        assert_close(reordered[order.index(i)], alone, tolerance=FLIP)


def test_states_are_not_quantized_by_the_range_of_their_batch() -> None:
    """Otherwise, nearly every answer would change with the batch."""
    changed = []
    for seed in range(60):
        compact = in_int8(random_network(small_config()), random_items([6, 4], seed + 1))
        items = random_items([3 + seed % 7, 5, 9], seed)
        together = answer(compact, items, [4] * len(items))
        alone = torch.cat([answer(compact, [item], [4]) for item in items])
        changed.append((together - alone).abs().amax(-1) > 1e-6 * alone.abs().amax(-1))
    # A few answers change, because the order of sums moves single states to the next level.
    assert torch.cat(changed).float().mean() < 0.05


@pytest.mark.parametrize("coupled", [True, False])
def test_ranges_cover_the_states_of_all_calibration_texts(coupled: bool) -> None:
    network = random_network(small_config(budget_ffn=coupled))
    first, others = random_items([5]), random_items([POSITIONS, 3, 7], seed=1)
    narrow = measure_ranges(network, [pack(first)])
    wide = measure_ranges(network, [pack(first), pack(others)])
    assert len(narrow) == network.config.num_hidden_layers
    for inner, outer in zip(narrow, wide, strict=True):
        for name in LayerRanges.model_fields:
            assert getattr(inner, name).low < getattr(inner, name).high
            if not getattr(outer, name).outliers:
                assert getattr(outer, name).low <= getattr(inner, name).low
                assert getattr(outer, name).high >= getattr(inner, name).high


def test_layers_that_never_run_have_empty_ranges() -> None:
    network = random_network(small_config(ladder=[[0, 2, 2], [0, 4, 4]]))
    items = random_items([5, 3])
    ranges = measure_ranges(network, [pack(items)])
    assert ranges[0] == LayerRanges(
        qkv=EMPTY_RANGE, output=EMPTY_RANGE, up=EMPTY_RANGE, down=EMPTY_RANGE
    )
    assert answer(load_pass(network, "int8", ranges), items, [1, 2]).isfinite().all()


def test_int8_without_ranges_is_refused() -> None:
    with pytest.raises(ValueError, match="ranges"):
        load_pass(random_network(small_config()), "int8")


@pytest.mark.parametrize(("low", "high"), [(1, 2), (-2, -1), (2, -1), (0, float("inf"))])
def test_a_range_without_zero_or_with_infinity_is_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="less than or equal|greater than or equal|finite"):
        StateRange(low=low, high=high)


def mean_error(network: Network, items: list[Item], ranges: Sequence[LayerRanges]) -> float:
    """Return the mean difference of a logit between int8 and float32, over all steps."""
    plain, compact = load_pass(network), load_pass(network, "int8", ranges)
    steps = [[step] * len(items) for step in range(1, network.config.num_steps + 1)]
    differences = [answer(compact, items, each) - answer(plain, items, each) for each in steps]
    return torch.stack(differences).abs().mean().item()


@pytest.mark.parametrize("selection", ["ranked", "input"])
def test_outlier_columns_are_multiplied_separately(selection: str) -> None:
    network = random_network(small_config(head_selection=selection))
    items, layer = random_items([5, 9, 4]), network.encoder.layers[1]
    column, neuron = 11, 2 * layer.spec.neurons_per_head + 1
    with torch.no_grad():
        layer.attention_norm.weight[column] *= 40
        layer.feed_forward.up.weight[:, column] /= 40
        layer.feed_forward.up.bias[neuron] = 300.0
        layer.feed_forward.down.weight[:, neuron] /= 300
    ranges = measure_ranges(network, [pack(items)])
    assert column in ranges[1].up.outliers
    assert neuron in ranges[1].down.outliers
    without_outliers = [
        LayerRanges(**{name: reads.model_copy(update={"outliers": ()}) for name, reads in layer})
        for layer in ranges
    ]
    error = mean_error(network, items, ranges)
    assert error < 0.5 * mean_error(network, items, without_outliers)


@pytest.mark.parametrize("ranges", [True, False])
def test_fastest_times_int8_if_there_are_ranges(
    monkeypatch: pytest.MonkeyPatch, ranges: bool
) -> None:
    network = random_network(small_config(**LARGE))
    measured = measure_ranges(network, [pack(random_items([5]))]) if ranges else ()
    monkeypatch.setattr(private, "multiplies_bfloat16", lambda: False)
    # Each pass is faster than the one before.
    monkeypatch.setattr(
        precision_choice, "_time", lambda passes: [0.5**i for i in range(len(passes))]
    )
    expected = "int8" if ranges else "float32"
    assert load_pass(network, "fastest", measured).precision == expected


def test_auto_selects_int8_with_ranges_and_without_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    network = random_network(small_config(**LARGE))
    measured = measure_ranges(network, [pack(random_items([5]))])
    monkeypatch.setattr(precision_choice, "has_amx", lambda: False)
    assert load_pass(network, "auto", measured).precision == "int8"
    assert load_pass(network, "auto").precision == "float32"


def test_int8_weights_take_one_byte_each() -> None:
    network = random_network(small_config(**LARGE))
    compact = in_int8(network, random_items([5]))
    before = compact.nbytes
    compact.warm([network.config.num_steps])
    matrices = sum(weight.numel() for weight in compact._slices.weights)
    assert compact.nbytes - before == matrices
