"""Two maps and the norm between them, in one launch.

A layer of few heads multiplies for less time than its states take to be written and read between
one product and the next. Here a program takes some rows all the way: output, sum and norm, and up;
or down, sum and norm, and the next layer's queries, keys and values.
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
"""Rows that a program takes, if there are so many."""
WARPS, TWO_PER_SM_WARPS = 8, 4
"""Of a program that has a multiprocessor to itself, and of one that shares it with another."""
MAX_SUMS = MAX_ROWS * 512
"""Numbers in float32 that fit into a program's registers."""
PROGRAMS = 128
"""So many keep a large card busy; with fewer rows each program takes less of them."""


def can_fuse(first: Linear, second: Linear | None, layer_norm: nn.Module) -> bool:
    """Say whether `map_norm_map` can run these maps."""
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
    """Do as `plain.map_norm_map`.

    Args:
        inputs, states: as there; in one precision, which is that of the maps.
        first, second, layer_norm: those that `can_fuse`.
        offsets: where the items are; spare rows come back as they will.
        two_per_sm: two programs share a multiprocessor. One waits while the other computes, which
            is worth it when there are more programs than multiprocessors.
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
            offsets.items,
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
    # All is asked for before the first of it is used.
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
    tl.debug_barrier()  # what one thread has stored, others load
    if FLAT:
        # As one loop, so that a tile's first weights are on their way while the last is written.
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
    """Return some columns of the states [ROWS, DEPTH], and of the weights [DEPTH, OUTER]."""
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
    """Activate; by the approximation with tanh, unless it has to be exact."""
    if EXACT:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    # x times the sigmoid of twice what the tanh is of, in base two.
    return x / (1.0 + tl.exp2(x * (-2.302208198 - 0.1029432407 * x * x)))
