"""The recorded pass of GPUs, on a CPU: Triton's interpreter, and a plain call for each graph.

`budgetformer bench gpu` checks real graphs and streams on a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
if "TRITON_INTERPRET" not in os.environ:
    pytest.skip("on a GPU `make bench-gpu` checks the kernels", allow_module_level=True)

from triton import OutOfResources

from budgetformer.inference import graphs, packed
from budgetformer.inference.backends.kernels import gpu
from budgetformer.inference.graphs import GraphedPass, Size
from budgetformer.inference.packed import PackedTokens
from budgetformer.inference.precision_choice import load_pass
from budgetformer.model.modeling import BudgetFormerForSequenceClassification
from tests.support.networks import (
    POSITIONS,
    PROPERTY,
    Item,
    assert_close,
    batches,
    networks,
    pack,
    random_items,
    random_network,
    reference_logits,
    small_config,
)

Network = BudgetFormerForSequenceClassification
# Spare rows are uninitialized memory.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

FEW = settings(PROPERTY, max_examples=15)
"""The interpreter is slow."""
SMALL = small_config(num_hidden_layers=1)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each program more rows, because the interpreter runs programs one by one."""
    monkeypatch.setattr(gpu, "NORMED_ROWS", 32)


def gpu_networks(**fixed: Any) -> st.SearchStrategy[Network]:
    """Draw a network whose positions the kernels support."""
    return networks(**fixed).filter(lambda network: gpu.can_attend(network.config))


def graphed(network: Network, timed: bool = False) -> GraphedPass:
    return GraphedPass(network, "float32", gpu, timed)


def reference(network: Network, items: Sequence[Item], steps: Sequence[int]) -> torch.Tensor:
    return reference_logits(network, items, steps=torch.tensor(steps))


@FEW
@given(gpu_networks(head_selection="ranked"), batches(), st.data())
def test_equals_the_reference(network: Network, items: list[Item], data: st.DataObject) -> None:
    steps = [data.draw(st.integers(1, network.config.num_steps))] * len(items)
    compact, tokens = graphed(network), pack(items)
    exits = compact.decide(tokens).exit_logits
    result = compact.run(tokens, steps, exits)
    plain = load_pass(network).run(tokens, steps, exits)
    assert result.selected_heads == plain.selected_heads
    assert_close(result.logits, plain.logits)
    assert_close(result.logits, reference(network, items, steps))


@FEW
@given(gpu_networks(), batches(), st.data())
def test_batches_of_several_steps_equal_the_reference(
    network: Network, items: list[Item], data: st.DataObject
) -> None:
    last = network.config.num_steps
    steps = data.draw(st.lists(st.integers(1, last), min_size=len(items), max_size=len(items)))
    compact, tokens = graphed(network), pack(items)
    arrival = compact.decide(tokens)
    result = compact.run(tokens, steps, arrival.exit_logits, arrival.ranking)
    assert_close(result.logits, reference(network, items, steps))


def test_a_recorded_pass_keeps_nothing_of_the_previous_batch() -> None:
    network = random_network(
        small_config(num_hidden_layers=1, embedding_exit=True, exit_weight=0.5)
    )
    compact = graphed(network)
    for lengths in ([12, 12, 12, 12], [3], [1, 0, 5], [12, 12, 12, 12], [7, 2]):
        items = random_items(lengths, seed=len(lengths))
        tokens = pack(items)
        exits = compact.decide(tokens).exit_logits
        result = compact.run(tokens, [2] * len(items), exits)
        assert_close(result.logits, reference(network, items, [2] * len(items)))
    with_exit, without = pack(random_items([5])), pack(random_items([5]))
    compact.run(with_exit, [2], compact.decide(with_exit).exit_logits)
    assert_close(compact.run(without, [2]).logits, load_pass(network).run(without, [2]).logits)


@FEW
@given(networks(), batches())
def test_decisions_equal_those_of_the_plain_pass(network: Network, items: list[Item]) -> None:
    tokens = pack(items)
    actual, expected = graphed(network).decide(tokens), load_pass(network).decide(tokens)
    for ours, plain in (
        (actual.budget, expected.budget),
        (actual.exit_logits, expected.exit_logits),
    ):
        assert (ours is None) == (plain is None)
        if ours is not None and plain is not None:
            assert_close(ours, plain)
    if expected.ranking is not None:
        assert torch.equal(cast(torch.Tensor, actual.ranking), expected.ranking)


@pytest.mark.parametrize("step", [1, 3])
def test_fused_layers_equal_unfused_ones(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ladder = [[1, 0, 2], [2, 2, 2], [4, 0, 3]]
    network, tokens = random_network(small_config(ladder=ladder)), pack(random_items([12, 0, 5]))
    fused, unfused = graphed(network), graphed(network)
    monkeypatch.setattr(unfused, "_can_fuse", lambda _: False)
    calls: list[int] = []
    run_fused = fused._fused
    monkeypatch.setattr(fused, "_fused", lambda *args: calls.append(1) or run_fused(*args))
    assert_close(fused.run(tokens, [step] * 3).logits, unfused.run(tokens, [step] * 3).logits)
    assert calls


@pytest.mark.parametrize(("wave", "two_per_sm"), [(64, True), (80, False)])
def test_two_programs_share_an_sm_only_beyond_one_wave(
    wave: int, two_per_sm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, items = random_network(SMALL), random_items([12] * 6)
    compact, seen = graphed(network), set[bool]()
    monkeypatch.setattr(compact, "_wave", wave)
    map_norm_map = gpu.map_norm_map

    def spied(*arguments: object) -> torch.Tensor:
        seen.add(bool(arguments[-1]))
        return map_norm_map(*arguments)

    monkeypatch.setattr(gpu, "map_norm_map", spied)
    assert_close(compact.run(pack(items), [2] * 6).logits, reference(network, items, [2] * 6))
    assert seen == {two_per_sm}


def test_the_fastest_variant_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.time = now[0]

        def synchronize(self) -> None: ...

        def elapsed_time(self, other: Event) -> float:
            return other.time - self.time

    def program(*seconds: float) -> graphs.Program:
        taken = iter(seconds)
        nothing = torch.empty(0)
        return graphs.Program(nothing, [], lambda: now.__setitem__(0, now[0] + next(taken)), [])

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(graphs, "TIMING_ROUNDS", 3)
    assert graphs._fastest([program(5, 4, 4), program(9, 3, 9)]) == 1
    assert graphs._fastest([program()]) == 0


def test_a_size_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compact, tokens = graphed(random_network(SMALL), timed=True), pack(random_items([5]))
    monkeypatch.setattr(compact, "_candidates", lambda *_: [compact._unfused, compact._fused])
    timed: list[int] = []
    monkeypatch.setattr(graphs, "_fastest", lambda programs: timed.append(len(programs)) or 0)
    for _ in range(2):
        compact.run(tokens, [2])
        compact._programs.clear()
    assert timed == [2, 1]
    assert list(compact._variants.values()) == [[compact._unfused]]


def test_by_default_the_size_decides_the_variant_and_nothing_is_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compact = graphed(random_network(SMALL))
    timed: list[int] = []
    monkeypatch.setattr(graphs, "_fastest", lambda programs: timed.append(len(programs)) or 0)
    for lengths in ([5], [9, 3], [12] * 6):
        compact.run(pack(random_items(lengths)), [2] * len(lengths))
    assert set(timed) == {1}


@pytest.mark.parametrize("timed", [True, False])
def test_a_variant_too_large_for_the_gpu_is_skipped(
    monkeypatch: pytest.MonkeyPatch, timed: bool
) -> None:
    def too_large(*_: object) -> torch.Tensor:
        raise OutOfResources(200, 100, "shared memory")

    network, items = random_network(SMALL), random_items([5])
    compact = graphed(network, timed)
    monkeypatch.setattr(compact, "_candidates", lambda *_: [too_large, compact._unfused])
    assert_close(compact.run(pack(items), [2]).logits, reference(network, items, [2]))


def test_the_next_batch_does_not_overwrite_answers() -> None:
    compact = graphed(random_network(SMALL))
    first = compact.run(pack(random_items([5])), [2]).logits
    kept = first.clone()
    compact.run(pack(random_items([6], seed=1)), [2])
    assert torch.equal(first, kept)


def test_each_step_and_size_is_recorded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compact = graphed(random_network(SMALL))
    recorded: list[tuple[int, Size]] = []
    record = compact._record

    def counted(step: int, size: Size) -> graphs.Program:
        recorded.append((step, size))
        return record(step, size)

    monkeypatch.setattr(compact, "_record", counted)
    for lengths in ([5, 6, 7], [12, 12, 12], [1, 2, 3, 4]):
        compact.run(pack(random_items(lengths)), [2] * len(lengths))
    assert recorded == [(2, Size(64, 4, 3))]
    compact.run(pack(random_items([5, 6, 7])), [3] * 3)
    compact.run(pack(random_items([12] * 6)), [2] * 6)
    assert recorded[1:] == [(3, Size(64, 4, 3)), (2, Size(80, 8, 3))]


@torch.inference_mode()
def test_a_recorded_pass_can_be_replayed() -> None:
    network, tokens = random_network(SMALL), pack(random_items([5, 9]))
    compact = graphed(network)
    for step in (graphs.DECISION, 2):
        replay = compact.recorded(step, tokens)
        assert replay is not None
        (program,) = (p for (of, _), p in compact._programs.items() if of == step)
        result = program.results[0]
        assert result is not None
        before = result.clone()
        result.zero_()
        replay()
        assert torch.equal(result, before)
    assert compact.recorded(2, pack([])) is None
    selecting = graphed(random_network(small_config(head_selection="input", budget_scope="input")))
    assert selecting.recorded(2, tokens) is None
    assert load_pass(network).recorded(2, tokens) is None


def test_the_least_recently_used_passes_are_evicted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MAX_PROGRAMS", 2)
    network = random_network(SMALL)
    compact, items = graphed(network), random_items([4, 9])
    for step in (1, 2, 3, 1, 4, 1):
        result = compact.run(pack(items), [step] * 2)
        assert_close(result.logits, reference(network, items, [step] * 2))
    assert [step for step, _ in compact._programs] == [4, 1]


def test_large_batches_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "CPU_ROWS", 20)
    network = random_network(small_config())
    items = random_items([12, 9, 7, 1, 12])
    result = graphed(network).run(pack(items), [3] * 5)
    assert_close(result.logits, reference(network, items, [3] * 5))


def test_warming_records_common_sizes_of_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "WARM_BATCHES", (1, 5))
    compact = graphed(random_network(SMALL))
    compact.warm([2, 4])
    assert {step for step, _ in compact._programs} == {graphs.DECISION, 2, 4}
    for count in graphs.WARM_BATCHES:
        size = Size.of([POSITIONS] * count, compact.config.num_classes)
        assert (2, size) in compact._programs


def test_warming_records_no_size_beyond_the_largest_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "WARM_BATCHES", (1, 5, 6))
    monkeypatch.setattr(packed, "CPU_ROWS", 5 * POSITIONS)
    compact = graphed(random_network(SMALL))
    compact.warm([2])
    assert (2, compact._size([POSITIONS] * 5)) in compact._programs
    assert (2, compact._size([POSITIONS] * 6)) not in compact._programs


def test_items_longer_than_the_positions_are_refused() -> None:
    compact = graphed(random_network(small_config()))
    with pytest.raises(ValueError, match="only 12 positions"):
        compact.run(PackedTokens.pack([[1] * (POSITIONS + 1)]), [2])


@pytest.mark.parametrize(
    ("lengths", "rows", "items"),
    [
        ([], 64, 4),
        ([1], 64, 4),
        ([65], 80, 5),
        ([97], 112, 7),
        ([40] * 9, 384, 24),
        ([3] * 50, 160, 64),
        ([300, 20], 320, 20),
    ],
)
def test_sizes_are_rounded_up(lengths: list[int], rows: int, items: int) -> None:
    assert Size.of(lengths, 3) == Size(rows, items, 3)


@pytest.mark.parametrize(
    ("tokens", "rows"),
    [
        (8192, 8192),
        (8193, 8448),
        (8449, 10240),
        (16_384, 16_384),
        (16_385, 16_896),
        (17_000, 20480),
    ],
)
def test_a_full_wave_is_a_size(tokens: int, rows: int) -> None:
    assert Size.of([tokens], 3, wave=8448).rows == rows


@given(st.lists(st.integers(0, 400), min_size=1, max_size=200))
def test_sizes_hold_the_batch_with_little_spare(lengths: list[int]) -> None:
    size = Size.of(lengths, 2)
    assert sum(lengths) <= size.rows <= max(64, 1.25 * sum(lengths))
    assert len(lengths) <= size.items <= max(size.rows // 16, 2 * len(lengths))
