"""The Triton kernels against their plain namesakes, in Triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest
import torch
from torch import nn

pytest.importorskip("triton")
if "TRITON_INTERPRET" not in os.environ:
    pytest.skip("on a GPU `make bench-gpu` checks the kernels", allow_module_level=True)

from budgetformer.compact.kernels import gpu, plain
from budgetformer.compact.layout import Layout
from budgetformer.modules import Embeddings
from tests.support.networks import assert_close, small_config

LENGTHS = [(5,), (1, 0, 3), (64, 65, 1), (0, 0), (130, 7, 0, 31)]
CPU = torch.device("cpu")


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


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
    layout = Layout(tuple(lengths), CPU)
    ids = torch.arange(layout.tokens) % config.vocab_size
    kinds = torch.arange(layout.tokens) % 2
    expected = plain.embed(ids, kinds, layout, by, torch.float32)
    assert_close(gpu.embed(ids.int(), kinds.int(), layout, by, torch.float32), expected)
    assert gpu.embed(ids, kinds, layout, by, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("heads", "size"), [(1, 32), (2, 6), (3, 64)])
@pytest.mark.parametrize("spare", [0, 3])
def test_attention(lengths: Sequence[int], heads: int, size: int, spare: int) -> None:
    layout = Layout(tuple(lengths), CPU)
    projected = random(layout.tokens + spare, heads * 3 * size)
    used = layout.tokens
    expected = plain.attend(projected, layout, heads)[:used]
    assert_close(gpu.attend(projected, layout, heads)[:used], expected)


def test_attention_in_half_precision() -> None:
    layout = Layout((70, 3), CPU)
    projected = random(73, 2 * 3 * 32)
    expected = plain.attend(projected, layout, 2)
    # float16: the interpreter multiplies the bits of bfloat16, not its values.
    actual = gpu.attend(projected.half(), layout, 2)
    assert actual.dtype == torch.float16
    assert_close(actual[: layout.tokens].float(), expected[: layout.tokens], tolerance=0.005)


def test_attention_of_one_item_reads_no_other() -> None:
    layout = Layout((20, 70), CPU)
    projected = random(90, 2 * 3 * 32)
    before = gpu.attend(projected, layout, 2)[:20]
    projected[20:] = 50 * projected[20:].flip(0)
    assert torch.equal(gpu.attend(projected, layout, 2)[:20], before)


def test_attention_of_large_scores_does_not_overflow() -> None:
    layout = Layout((70,), CPU)
    projected = 100 * random(70, 3 * 32)
    assert_close(gpu.attend(projected, layout, 1), plain.attend(projected, layout, 1))


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
    # A variance from the mean of squares would lose all of its digits here.
    norm = nn.LayerNorm(64)
    states, change = random(3, 64) + 4096, torch.zeros(3, 64)
    assert_close(
        gpu.add_norm(states, change, norm), plain.add_norm(states, change, norm).detach(), 1e-3
    )


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("width", [1, 20, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mean(lengths: Sequence[int], width: int, dtype: torch.dtype) -> None:
    layout = Layout(tuple(lengths), CPU)
    states = random(layout.tokens + 2, width, dtype=dtype)
    assert_close(gpu.mean(states, layout), plain.mean(states, layout))
    assert gpu.mean(states, layout).dtype == torch.float32


def test_mean_does_not_depend_on_the_batch() -> None:
    states = random(90, 48)
    together = gpu.mean(states, Layout((50, 40), CPU))
    assert torch.equal(together[1:], gpu.mean(states[50:], Layout((40,), CPU)))


def test_nothing_to_do() -> None:
    layout = Layout((), CPU)
    assert gpu.attend(torch.empty(0, 12), layout, 2).shape == (0, 4)
    assert gpu.add_norm(torch.empty(0, 8), torch.empty(0, 8), nn.LayerNorm(8)).shape == (0, 8)
    assert gpu.mean(torch.empty(0, 8), layout).shape == (0, 8)
