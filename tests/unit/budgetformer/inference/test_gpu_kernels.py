"""The Triton kernels, run by Triton's interpreter, give the results of the plain kernels."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import nn

pytest.importorskip("triton")
if "TRITON_INTERPRET" not in os.environ:
    pytest.skip("on a GPU `make bench-gpu` checks the kernels", allow_module_level=True)

from budgetformer.inference.backends.kernels import gpu, plain
from budgetformer.inference.backends.linear import Product
from budgetformer.inference.batch_offsets import BatchOffsets
from budgetformer.inference.routed import ItemRun
from budgetformer.model.architecture import MULTI_LABEL
from budgetformer.model.embeddings import Embeddings
from budgetformer.model.layer import LayerSpec
from budgetformer.model.positions import DistanceBias, Positions, Rotary
from budgetformer.model.step0 import ExitHead
from tests.support.networks import assert_close, small_config

LENGTHS = [(5,), (1, 0, 3), (64, 65, 1), (0, 0), (130, 7, 0, 31)]
CPU = torch.device("cpu")


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def heads_of(heads: int, positions: Positions | None = None, window: int | None = None) -> ItemRun:
    """Return the item run of some heads of a layer."""
    spec = replace(LayerSpec.of(small_config(), 0), window=window)
    return ItemRun(heads, spec, positions)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("position", ["post", "pre"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_embedding(lengths: Sequence[int], position: str, dtype: torch.dtype) -> None:
    config = small_config(
        norm_position=position, hidden_size=20, num_attention_heads=2, max_position_embeddings=200
    )
    by = Embeddings(config).to(dtype).requires_grad_(False).eval()
    by.states_dtype = torch.float32
    by.norm.float()
    offsets = BatchOffsets(tuple(lengths), CPU)
    ids = torch.arange(offsets.num_tokens) % config.vocab_size
    kinds = torch.arange(offsets.num_tokens) % 2
    expected = plain.embed(ids, kinds, offsets, by, torch.float32)
    assert_close(gpu.embed(ids.int(), kinds.int(), offsets, by, torch.float32), expected)
    assert gpu.embed(ids, kinds, offsets, by, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("heads", "size"), [(1, 32), (2, 6), (3, 64)])
@pytest.mark.parametrize("spare", [0, 3])
def test_attention(lengths: Sequence[int], heads: int, size: int, spare: int) -> None:
    offsets = BatchOffsets(tuple(lengths), CPU)
    projected = random(offsets.num_tokens + spare, heads * 3 * size)
    used = offsets.num_tokens
    expected = plain.attend(projected, offsets, heads_of(heads))[:used]
    assert_close(gpu.attend(projected, offsets, heads_of(heads))[:used], expected)


@pytest.mark.parametrize(
    ("positions", "window"),
    [("absolute", 1), ("absolute", 9), ("rotary", None), ("rotary", 70), ("bias", None)],
)
def test_attention_with_positions(positions: str, window: int | None) -> None:
    offsets = BatchOffsets((130, 7, 0, 71), CPU)
    schemes: dict[str, Positions | None] = {
        "absolute": None,
        "rotary": Rotary(100.0),
        "bias": DistanceBias(random(16, 2), 40),
    }
    run = heads_of(2, schemes[positions], window)
    projected = random(offsets.num_tokens, 2 * 3 * 8)
    expected = plain.attend(projected, offsets, run)
    assert_close(gpu.attend(projected, offsets, run), expected)


def test_attention_in_half_precision() -> None:
    offsets = BatchOffsets((70, 3), CPU)
    projected = random(73, 2 * 3 * 32)
    expected = plain.attend(projected, offsets, heads_of(2))
    # float16: the interpreter multiplies the bits of bfloat16, not its values.
    actual = gpu.attend(projected.half(), offsets, heads_of(2))
    assert actual.dtype == torch.float16
    assert_close(
        actual[: offsets.num_tokens].float(), expected[: offsets.num_tokens], tolerance=0.005
    )


def test_attention_of_an_item_reads_no_other_item() -> None:
    offsets = BatchOffsets((20, 70), CPU)
    projected = random(90, 2 * 3 * 32)
    before = gpu.attend(projected, offsets, heads_of(2))[:20]
    projected[20:] = 50 * projected[20:].flip(0)
    assert torch.equal(gpu.attend(projected, offsets, heads_of(2))[:20], before)


def test_attention_of_large_scores_does_not_overflow() -> None:
    offsets = BatchOffsets((70,), CPU)
    projected = 100 * random(70, 3 * 32)
    assert_close(
        gpu.attend(projected, offsets, heads_of(1)), plain.attend(projected, offsets, heads_of(1))
    )


def test_attention_does_not_depend_on_the_position_in_the_batch() -> None:
    projected, before = random(100, 3 * 32), random(37, 3 * 32)
    alone = gpu.attend(projected, BatchOffsets((100,), CPU), heads_of(1))
    behind = gpu.attend(torch.cat([before, projected]), BatchOffsets((37, 100), CPU), heads_of(1))[
        37:
    ]
    assert_close(behind, alone)


@pytest.mark.parametrize("width", [1, 16, 20, 384])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_add_and_norm(width: int, dtype: torch.dtype) -> None:
    norm = nn.LayerNorm(width, eps=1e-5)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    states, change = random(7, width, dtype=dtype), random(7, width + 1, dtype=dtype)[:, :width]
    change = change.contiguous()
    expected = plain.add_norm(states.float(), change.float().clone(), norm).detach()
    actual = gpu.add_norm(states, change, norm)
    assert actual.dtype == dtype
    assert_close(actual.float(), expected, tolerance=1e-5 if dtype == torch.float32 else 0.02)


def test_add_and_norm_of_states_far_from_zero() -> None:
    # A variance computed from the mean of squares would lose all digits.
    norm = nn.LayerNorm(64)
    states, change = random(3, 64) + 4096, torch.zeros(3, 64)
    assert_close(
        gpu.add_norm(states, change, norm), plain.add_norm(states, change, norm).detach(), 1e-3
    )


@pytest.mark.parametrize("lengths", [*LENGTHS, (1, 1), (2, 31, 33)])
@pytest.mark.parametrize(("labels", "rank"), [(1, 0), (5, 0), (70, 0), (5, 24)])
@pytest.mark.parametrize("buckets", [0, 1000])
def test_bag(lengths: Sequence[int], labels: int, rank: int, buckets: int) -> None:
    config = small_config(
        embedding_exit=True, num_labels=labels, exit_rank=rank, exit_buckets=buckets
    )
    head, offsets = ExitHead(config).requires_grad_(False), BatchOffsets(tuple(lengths), CPU)
    nn.init.normal_(head.weight.weight)
    ids = torch.randint(config.vocab_size, (offsets.num_tokens,), generator=torch.Generator())
    spare = torch.zeros(3, dtype=torch.int32)
    actual = gpu.bag(torch.cat([ids.int(), spare]), offsets, head)
    assert_close(actual, plain.bag(ids, offsets, head))


def test_bag_of_large_ids() -> None:
    # The hash of two ids exceeds 32 bits.
    config = small_config(embedding_exit=True, vocab_size=200_000, exit_buckets=64)
    head, offsets = ExitHead(config).requires_grad_(False), BatchOffsets((3,), CPU)
    ids = torch.tensor([199_999, 199_998, 5])
    assert_close(gpu.bag(ids.int(), offsets, head), plain.bag(ids, offsets, head))


@pytest.mark.parametrize("problem", ["single_label_classification", MULTI_LABEL])
@pytest.mark.parametrize("labels", [1, 2, 3, 19])
def test_exit_evidence(problem: str, labels: int) -> None:
    logits = torch.cat([random(4, labels), 100 * random(3, labels), torch.zeros(1, labels)])
    assert_close(gpu.exit_evidence(logits, problem), plain.exit_evidence(logits, problem))


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("width", [1, 20, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mean(lengths: Sequence[int], width: int, dtype: torch.dtype) -> None:
    offsets = BatchOffsets(tuple(lengths), CPU)
    states = random(offsets.num_tokens + 2, width, dtype=dtype)
    assert_close(gpu.mean(states, offsets), plain.mean(states, offsets))
    assert gpu.mean(states, offsets).dtype == torch.float32


def test_mean_does_not_depend_on_the_batch() -> None:
    states = random(90, 48)
    together = gpu.mean(states, BatchOffsets((50, 40), CPU))
    assert torch.equal(together[1:], gpu.mean(states[50:], BatchOffsets((40,), CPU)))


def test_kernels_accept_empty_batches() -> None:
    offsets = BatchOffsets((), CPU)
    assert gpu.attend(torch.empty(0, 12), offsets, heads_of(2)).shape == (0, 4)
    assert gpu.add_norm(torch.empty(0, 8), torch.empty(0, 8), nn.LayerNorm(8)).shape == (0, 8)
    assert gpu.mean(torch.empty(0, 8), offsets).shape == (0, 8)
    assert gpu.classify(torch.empty(0, 8), offsets, nn.Linear(8, 2)).shape == (0, 2)
    first, states, norm = linear(4, 16, False), torch.empty(0, 16), nn.LayerNorm(16)
    assert gpu.map_norm_map(torch.empty(0, 4), first, states, norm, None, offsets).shape == (0, 0)
    head = ExitHead(small_config(embedding_exit=True))
    assert gpu.bag(torch.empty(0, dtype=torch.int32), offsets, head).shape == (0, 3)
    assert gpu.exit_evidence(torch.empty(0, 3), None).shape == (0, 2)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("width", "labels"), [(20, 1), (48, 3), (300, 19)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_classify(lengths: Sequence[int], width: int, labels: int, dtype: torch.dtype) -> None:
    offsets = BatchOffsets(tuple(lengths), CPU)
    states = random(offsets.num_tokens + 2, width, dtype=dtype)
    by = linear(width, labels, gelu=False)
    module = nn.Linear(width, labels).requires_grad_(False)
    module.weight.copy_(by.weight)
    module.bias.copy_(by.bias)
    assert_close(gpu.classify(states, offsets, module), plain.classify(states, offsets, module))


def linear(width: int, results: int, gelu: bool, dtype: torch.dtype = torch.float32) -> Product:
    weight, bias = random(results, width) / width**0.5, random(results)
    return Product(weight.to(dtype), bias.to(dtype), gelu)


@pytest.mark.parametrize("tokens", [1, 16, 70])
@pytest.mark.parametrize("spare", [0, 80])
@pytest.mark.parametrize(
    ("inner", "width", "outer"), [(4, 16, 9), (70, 48, 16), (64, 384, 192), (100, 96, 300)]
)
@pytest.mark.parametrize(("gelu", "two_per_sm"), [(False, False), (True, False), (True, True)])
def test_fused_maps_and_norm(
    tokens: int, spare: int, inner: int, width: int, outer: int, gelu: bool, two_per_sm: bool
) -> None:
    offsets = BatchOffsets((tokens,), CPU)
    first, second = linear(inner, width, False), linear(width, outer, gelu)
    norm = nn.LayerNorm(width).requires_grad_(False)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    inputs, states = random(tokens + spare, inner), random(tokens + spare, width)
    for then in (second, None):
        assert gpu.can_fuse(first, then, norm)
        ours, theirs = states.clone(), states.clone()
        expected = plain.map_norm_map(inputs, first, theirs, norm, then)
        actual = gpu.map_norm_map(inputs, first, ours, norm, then, offsets, two_per_sm)
        assert_close(actual[:tokens], expected[:tokens])
        assert_close(ours[:tokens], theirs[:tokens])


def test_fused_maps_and_norm_in_half_precision() -> None:
    offsets, half = BatchOffsets((33,), CPU), torch.float16
    first, second = linear(32, 64, False, half), linear(64, 128, True, half)
    norm, inputs = nn.LayerNorm(64).requires_grad_(False), random(33, 32).half()
    ours, theirs = random(33, 64).half(), random(33, 64).half()
    expected = plain.map_norm_map(inputs, first, theirs, norm.half(), second)
    actual = gpu.map_norm_map(inputs, first, ours, norm.float(), second, offsets)
    assert actual.dtype == half
    assert_close(actual.float(), expected.float(), tolerance=0.01)
    assert_close(ours.float(), theirs.float(), tolerance=0.01)


def test_unsupported_maps_are_not_fused() -> None:
    some, norm = linear(16, 32, False), nn.LayerNorm(32)
    assert not gpu.can_fuse(lambda states: states, some, norm)
    assert not gpu.can_fuse(some, lambda states: states, norm)
    assert not gpu.can_fuse(Product(some.weight, None), some, norm)
    assert not gpu.can_fuse(linear(16, 20, False), some, nn.LayerNorm(20))
