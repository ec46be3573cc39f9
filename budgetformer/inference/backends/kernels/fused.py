"""Two linear maps and the norm between them, fused into one kernel.

In a layer with few heads, writing and reading states between products takes longer than the
products. Here a program computes all of it for some rows: output, sum, norm and up; or down, sum,
norm and the next layer's queries, keys and values.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, nn

from budgetformer.inference.backends.kernels.tiles import (
    MIN_SIDE,
    dot_precision,
    equal_part,
    tile_side,
)
from budgetformer.inference.backends.linear import Linear, Product
from budgetformer.inference.batch_offsets import BatchOffsets

MAX_ROWS = 64
"""Maximum rows per program."""
WARPS, TWO_PER_SM_WARPS = 8, 4
"""Warps of a program that has a multiprocessor to itself, and of one that shares it."""
MAX_SUMS = MAX_ROWS * 512
"""Float32 numbers that fit into a program's registers."""
PROGRAMS = 128
"""Programs that fully use a large GPU; small batches use fewer rows per program to reach it."""


def can_fuse(first: Linear, second: Linear | None, layer_norm: nn.Module) -> bool:
    """Return whether `map_norm_map` can run these maps."""
    if not isinstance(layer_norm, nn.LayerNorm):
        return False
    width = layer_norm.normalized_shape[0]
    maps = [each for each in (first, second) if each is not None]
    known = all(isinstance(each, Product) and each.bias is not None for each in maps)
    return known and equal_part(width) >= MIN_SIDE and MIN_SIDE * width <= MAX_SUMS


def map_norm_map(
    inputs: Tensor,
    first: Linear,
    states: Tensor,
    layer_norm: nn.Module,
    second: Linear | None,
    offsets: BatchOffsets,
    two_per_sm: bool = False,
) -> Tensor:
    """Compute `plain.map_norm_map`.

    Args:
        inputs, states: see `plain.map_norm_map`; in the precision of the maps.
        first, second, layer_norm: maps and norm that pass `can_fuse`.
        offsets: the items' offsets; results of padding rows are arbitrary.
        two_per_sm: run two programs per multiprocessor, so that one computes while the other waits
            for memory; faster with more programs than multiprocessors.
    """
    tokens, width = states.shape
    last, second = second is None, second or first
    assert isinstance(first, Product)
    assert isinstance(second, Product)
    outer = 0 if last else len(second.weight)
    mapped = states.new_empty(tokens, outer)
    rows = min(MAX_ROWS, tile_side(triton.cdiv(tokens, PROGRAMS)))
    while rows * width > MAX_SUMS:
        rows //= 2
    if tokens:
        _map_norm_map[(triton.cdiv(tokens, rows),)](
            inputs,
            first.weight,
            first.bias,
            states,
            layer_norm.weight,
            layer_norm.bias,
            second.weight,
            second.bias,
            mapped,
            offsets.starts,
            offsets.num_items,
            tokens,
            inputs.shape[1],
            first.weight.stride(0),
            outer,
            layer_norm.eps,
            ROWS=rows,
            WIDTH=width,
            CHUNK=equal_part(width),
            INNER=32,
            OUTER=128 if two_per_sm or triton.cdiv(outer, 128) % 2 else 256,
            DEPTH=min(64, equal_part(width)),
            GELU=second.gelu,
            PRECISION=dot_precision(states),
            FLAT=two_per_sm,
            num_warps=TWO_PER_SM_WARPS if two_per_sm else WARPS,
        )
    return mapped


@triton.jit(do_not_specialize=["items", "tokens"])
def _map_norm_map(
    inputs,
    first,
    first_bias,
    states,
    scale,
    shift,
    second,
    second_bias,
    mapped,
    starts,
    items,
    tokens,
    inner,
    stride,
    outer,
    eps,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    DEPTH: tl.constexpr,
    GELU: tl.constexpr,
    PRECISION: tl.constexpr,
    FLAT: tl.constexpr,
):
    kind: tl.constexpr = states.dtype.element_ty
    chunks: tl.constexpr = WIDTH // CHUNK
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    there = row < tokens
    own = row.to(tl.int64) * WIDTH
    column = tl.arange(0, CHUNK)
    # All loads are issued before the first result is used.
    used = tl.load(starts + items)
    old, biases, scales, shifts = (), (), (), ()
    for c in tl.static_range(chunks):
        biases += (tl.load(first_bias + c * CHUNK + column),)
        old += (tl.load(states + own + (c * CHUNK + column)[None, :], mask=there, other=0.0),)
        scales += (tl.load(scale + c * CHUNK + column),)
        shifts += (tl.load(shift + c * CHUNK + column),)
    if tl.program_id(0) * ROWS >= used:
        return
    sums = ()
    for c in tl.static_range(chunks):
        sums += (old[c].to(tl.float32) + biases[c][None, :].to(tl.float32),)
    for begin in tl.range(0, inner, INNER, num_stages=3):
        depth = begin + tl.arange(0, INNER)
        deep = depth < inner
        place = inputs + row.to(tl.int64) * inner + depth[None, :]
        part = tl.load(place, mask=there & deep[None, :], other=0.0)
        more = ()
        for c in tl.static_range(chunks):
            place = first + (c * CHUNK + column)[None, :] * stride + depth[:, None]
            weight = tl.load(place, mask=deep[:, None], other=0.0)
            more += (tl.dot(part, weight, sums[c], input_precision=PRECISION),)
        sums = more
    total = sums[0]
    for c in tl.static_range(1, chunks):
        total += sums[c]
    mean = (tl.sum(total, 1) / WIDTH)[:, None]
    square = (sums[0] - mean) * (sums[0] - mean)
    for c in tl.static_range(1, chunks):
        square += (sums[c] - mean) * (sums[c] - mean)
    factor = tl.rsqrt(tl.sum(square, 1) / WIDTH + eps)[:, None]
    for c in tl.static_range(chunks):
        normed = (sums[c] - mean) * factor * scales[c][None, :] + shifts[c][None, :]
        tl.store(states + own + (c * CHUNK + column)[None, :], normed.to(kind), mask=there)
    tl.debug_barrier()  # other threads load the stored states
    if FLAT:
        # A single loop, so that loading a tile's weights overlaps writing the previous tile.
        steps: tl.constexpr = WIDTH // DEPTH
        answer = tl.zeros([ROWS, OUTER], tl.float32)
        for step in tl.range(0, tl.cdiv(outer, OUTER) * steps, num_stages=3):
            place = step // steps * OUTER + tl.arange(0, OUTER)
            depth = step % steps * DEPTH + tl.arange(0, DEPTH)
            part, weight = _factors(states, second, row, place, depth, there, outer, WIDTH)
            answer = tl.dot(part, weight, answer, input_precision=PRECISION)
            if step % steps == steps - 1:
                _write(answer, second_bias, mapped, row, place, there, outer, GELU)
                answer = tl.zeros([ROWS, OUTER], tl.float32)
    else:
        for begin in range(0, outer, OUTER):
            place = begin + tl.arange(0, OUTER)
            answer = tl.zeros([ROWS, OUTER], tl.float32)
            for lead in tl.range(0, WIDTH, DEPTH, num_stages=3):
                depth = lead + tl.arange(0, DEPTH)
                part, weight = _factors(states, second, row, place, depth, there, outer, WIDTH)
                answer = tl.dot(part, weight, answer, input_precision=PRECISION)
            _write(answer, second_bias, mapped, row, place, there, outer, GELU)


@triton.jit
def _factors(states, weights, row, place, depth, there, outer, WIDTH: tl.constexpr):
    """Load a tile of the states [ROWS, DEPTH] and of the weights [DEPTH, OUTER]."""
    part = tl.load(states + row.to(tl.int64) * WIDTH + depth[None, :], mask=there, other=0.0)
    weight = weights + place[None, :] * WIDTH + depth[:, None]
    return part, tl.load(weight, mask=(place < outer)[None, :], other=0.0)


@triton.jit
def _write(answer, biases, mapped, row, place, there, outer, GELU: tl.constexpr):
    """Write a tile of the results [ROWS, OUTER]."""
    kind: tl.constexpr = mapped.dtype.element_ty
    known = place < outer
    answer += tl.load(biases + place, mask=known, other=0.0).to(tl.float32)[None, :]
    if GELU:
        answer = _gelu(answer, kind == tl.float32)
    target = mapped + row.to(tl.int64) * outer + place[None, :]
    tl.store(target, answer.to(kind), mask=there & known[None, :])


@triton.jit
def _gelu(x, EXACT: tl.constexpr):
    """Return GELU, in its tanh approximation unless EXACT."""
    if EXACT:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    # 0.5 * (1 + tanh(y)) = sigmoid(2 * y), computed in base two.
    return x / (1.0 + tl.exp2(x * (-2.302208198 - 0.1029432407 * x * x)))
