"""The kernels in Triton, for GPUs: one launch each for any number of items.

The host passes only upper bounds, and the kernels read the number of items and their lengths on the
device, so a CUDA graph can hold them. Tests compare each with the function of that name in `plain`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

from budgetformer.inference.backends.kernels import plain
from budgetformer.inference.backends.kernels.decision import bag, exit_evidence, table_rows
from budgetformer.inference.backends.kernels.fused import can_fuse, map_norm_map
from budgetformer.inference.backends.kernels.tiles import dot_precision, tile_side
from budgetformer.inference.batch_offsets import BatchOffsets
from budgetformer.model.architecture import Architecture
from budgetformer.model.embeddings import Embeddings
from budgetformer.model.layer import AttentionHeads
from budgetformer.model.positions import DistanceBias, Rotary

__all__ = [
    "add_norm",
    "attend",
    "bag",
    "can_attend",
    "can_fuse",
    "classify",
    "embed",
    "exit_evidence",
]
__all__ += ["map_norm_map", "mean"]

ROWS = 64
"""Queries and keys per tile of attention."""
NORMED_ROWS, NORMED_WARPS = 2, 1
"""One warp per program, so that no warp waits for another's sum."""
POOLED_ROWS, POOLED_COLUMNS, POOLED_WARPS = 64, 32, 2
CLASSIFIED_WARPS = 4
LABELS = 8
"""Classes per tile of the classifier."""


def embed(
    ids: Tensor, kinds: Tensor, offsets: BatchOffsets, embeddings: Embeddings, dtype: torch.dtype
) -> Tensor:
    """Compute `plain.embed`, with float32 sums."""
    if embeddings.position is None or embeddings.map is not None:
        return plain.embed(ids, kinds, offsets, embeddings, dtype)
    tokens, width = len(ids), embeddings.word.embedding_dim
    result = torch.empty(tokens, width, dtype=dtype, device=ids.device)
    norm = embeddings.norm if isinstance(embeddings.norm, nn.LayerNorm) else None
    if tokens:
        _embed[(triton.cdiv(tokens, NORMED_ROWS),)](
            ids,
            kinds,
            offsets.positions,
            embeddings.word.weight,
            embeddings.segment.weight,
            embeddings.position.weight,
            None if norm is None else norm.weight,
            None if norm is None else norm.bias,
            result,
            tokens,
            width,
            0.0 if norm is None else norm.eps,
            ROWS=NORMED_ROWS,
            WIDTH=tile_side(width),
            NORMED=norm is not None,
            num_warps=NORMED_WARPS,
        )
    return result


@triton.jit
def _embed(
    ids,
    kinds,
    positions,
    words,
    segments,
    places,
    weight,
    bias,
    result,
    tokens,
    width,
    eps,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    NORMED: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    state = table_rows(words, ids, row, tokens, column, width)
    state += table_rows(segments, kinds, row, tokens, column, width)
    state += table_rows(places, positions, row, tokens, column, width)
    if NORMED:
        state = _normed(state, weight, bias, column[None, :], width, eps)
    place = row[:, None].to(tl.int64) * width + column[None, :]
    there = (row < tokens)[:, None] & (column < width)[None, :]
    tl.store(result + place, state.to(result.dtype.element_ty), mask=there)


@triton.jit
def _normed(state, weight, bias, column, width, eps):
    """Normalise states [ROWS, WIDTH]."""
    inside = column < width
    centred = tl.where(inside, state - (tl.sum(state, 1) / width)[:, None], 0.0)
    scaled = centred * tl.rsqrt(tl.sum(centred * centred, 1) / width + eps)[:, None]
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    return scaled * scale + shift


def can_attend(config: Architecture) -> bool:
    """Return whether `attend` supports a network's positions."""
    return config.relative_positions != "disentangled"


def attend(projected: Tensor, offsets: BatchOffsets, weights: AttentionHeads) -> Tensor:
    """Compute `plain.attend`, with one program per head and `ROWS` rows of any items."""
    tokens, width = projected.shape
    num_heads, positions, window = weights.num_heads, weights.positions, weights.spec.window
    size = width // (3 * num_heads)
    if isinstance(positions, Rotary) and tokens:
        query, key, value = projected.view(tokens, num_heads, 3, size).unbind(2)
        places = offsets.positions[:tokens]
        places = F.pad(places, (0, tokens - len(places)))
        turned = [positions.rotate_at(part, places) for part in (query, key)]
        projected = torch.stack([*turned, value], dim=2).view(tokens, width)
    biases, max_distance = projected, 0
    if isinstance(positions, DistanceBias):
        max_distance = positions.max_distance
        biases = positions.by_distance(max_distance + 1).contiguous()
    contexts = projected.new_empty(tokens, num_heads * size)
    if offsets.num_tokens:
        _attend[(triton.cdiv(offsets.num_tokens, ROWS), num_heads)](
            projected,
            contexts,
            offsets.positions,
            offsets.ends,
            biases,
            offsets.num_tokens,
            math.log2(math.e) / math.sqrt(size),
            num_heads,
            size,
            window or 0,
            max_distance,
            ROWS=ROWS,
            SIDE=tile_side(size),
            PRECISION=dot_precision(projected),
            LOCAL=window is not None,
            BIASED=max_distance > 0,
        )
    return contexts


@triton.jit(do_not_specialize=["tokens", "num_heads", "window", "max_distance"])
def _attend(
    projected,
    contexts,
    positions,
    ends,
    biases,
    tokens,
    scale,
    num_heads,
    size,
    window,
    max_distance,
    ROWS: tl.constexpr,
    SIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    LOCAL: tl.constexpr,
    BIASED: tl.constexpr,
):
    lead, head = tl.program_id(0) * ROWS, tl.program_id(1)
    row = lead + tl.arange(0, ROWS)
    end = tl.load(ends + row, mask=row < tokens, other=0).to(tl.int32)
    start = row - tl.load(positions + row, mask=row < tokens, other=0).to(tl.int32)
    asked = row < end
    # Keys range from the start of the first row's item to the end of the last row's item.
    first = lead - tl.load(positions + lead).to(tl.int32)
    last = tl.load(ends + tl.minimum(lead + ROWS, tokens) - 1).to(tl.int32)
    if LOCAL:
        first = tl.maximum(first, lead - window)
        last = tl.minimum(last, lead + ROWS + window)
    side = tl.arange(0, SIDE)
    inside = (side < size)[None, :]
    stride = num_heads * 3 * size
    own = projected + head * 3 * size + side[None, :]
    place = own + row[:, None].to(tl.int64) * stride
    query = tl.load(place, mask=asked[:, None] & inside, other=0.0)
    # Online softmax in base two: running maximum, sum and weighted values. The maximum starts
    # finite, because a row may see none of the first keys.
    most = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    context = tl.zeros([ROWS, SIDE], tl.float32)
    for begin in range(first, last, ROWS):
        other = begin + tl.arange(0, ROWS)
        seen = (other < last)[:, None] & inside
        place = own + other[:, None].to(tl.int64) * stride
        key = tl.load(place + size, mask=seen, other=0.0)
        value = tl.load(place + 2 * size, mask=seen, other=0.0)
        score = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
        mine = (start[:, None] <= other[None, :]) & (other[None, :] < end[:, None])
        distance = other[None, :] - row[:, None]
        if LOCAL:
            mine = mine & (distance <= window) & (distance >= -window)
        if BIASED:
            near = tl.minimum(tl.maximum(distance, -max_distance), max_distance) + max_distance
            bias = tl.load(biases + head * (2 * max_distance + 1) + near)
            score += bias.to(tl.float32) * 1.4426950408889634  # log2(e), as scores are in base two
        score = tl.where(mine, score, float("-inf"))
        higher = tl.maximum(most, tl.max(score, 1))
        weight = tl.exp2(score - higher[:, None])
        kept = tl.exp2(most - higher)
        total = total * kept + tl.sum(weight, 1)
        added = tl.dot(weight.to(value.dtype), value, input_precision=PRECISION)
        context = context * kept[:, None] + added
        most = higher
    place = contexts + row[:, None].to(tl.int64) * (num_heads * size) + head * size + side[None, :]
    # The total is at least 1 in rows of items, and 0 in padding rows.
    result = (context / tl.maximum(total, 1.0)[:, None]).to(contexts.dtype.element_ty)
    tl.store(place, result, mask=asked[:, None] & inside)


def add_norm(states: Tensor, change: Tensor, layer_norm: nn.Module) -> Tensor:
    """Compute `plain.add_norm`, with float32 sums and a result of the states' type."""
    tokens, width = states.shape
    result = torch.empty_like(states)
    if tokens:
        _add_norm[(triton.cdiv(tokens, NORMED_ROWS),)](
            states,
            change,
            layer_norm.weight,
            layer_norm.bias,
            result,
            tokens,
            width,
            layer_norm.eps,
            ROWS=NORMED_ROWS,
            WIDTH=tile_side(width),
            num_warps=NORMED_WARPS,
        )
    return result


@triton.jit
def _add_norm(
    states,
    change,
    weight,
    bias,
    result,
    tokens,
    width,
    eps,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)[None, :]
    inside = column < width
    there = (row < tokens)[:, None] & inside
    place = row[:, None].to(tl.int64) * width + column
    state = tl.load(states + place, mask=there, other=0.0).to(tl.float32)
    state += tl.load(change + place, mask=there, other=0.0).to(tl.float32)
    state = _normed(state, weight, bias, column, width, eps)
    tl.store(result + place, state.to(result.dtype.element_ty), mask=there)


def mean(states: Tensor, offsets: BatchOffsets) -> Tensor:
    """Compute `plain.mean`; the order of an item's sum does not depend on its batch."""
    width = states.shape[-1]
    result = states.new_empty(offsets.num_items, width, dtype=torch.float32)
    grid = (offsets.num_items, triton.cdiv(width, POOLED_COLUMNS))
    if math.prod(grid):
        _mean[grid](
            states,
            result,
            offsets.starts,
            width,
            ROWS=POOLED_ROWS,
            COLUMNS=POOLED_COLUMNS,
            num_warps=POOLED_WARPS,
        )
    return result


@triton.jit
def _mean(states, result, starts, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    item = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mean = _averaged(states, starts, item, column, width, ROWS, COLUMNS)
    tl.store(result + item.to(tl.int64) * width + column, mean, mask=column < width)


@triton.jit
def _averaged(states, starts, item, column, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the mean of an item's states in these columns, [COLUMNS] in float32."""
    start, stop = tl.load(starts + item), tl.load(starts + item + 1)
    total = tl.zeros([COLUMNS], tl.float32)
    for begin in range(start, stop, ROWS):
        row = begin + tl.arange(0, ROWS)
        seen = (row < stop)[:, None] & (column < width)[None, :]
        place = row[:, None].to(tl.int64) * width + column[None, :]
        total += tl.sum(tl.load(states + place, mask=seen, other=0.0).to(tl.float32), 0)
    return total / tl.maximum(stop - start, 1)


def classify(states: Tensor, offsets: BatchOffsets, classifier: nn.Linear) -> Tensor:
    """Compute `plain.classify`; the order of an item's sum does not depend on its batch."""
    width, labels = classifier.in_features, classifier.out_features
    result = states.new_empty(offsets.num_items, labels, dtype=torch.float32)
    if offsets.num_items:
        _classify[(offsets.num_items,)](
            states,
            offsets.starts,
            classifier.weight,
            classifier.bias,
            result,
            width,
            labels,
            ROWS=POOLED_ROWS,
            WIDTH=tile_side(width),
            LABELS=LABELS,
            num_warps=CLASSIFIED_WARPS,
        )
    return result


@triton.jit
def _classify(
    states,
    starts,
    weight,
    bias,
    result,
    width,
    labels,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    LABELS: tl.constexpr,
):
    item = tl.program_id(0)
    column = tl.arange(0, WIDTH)
    mean = _averaged(states, starts, item, column, width, ROWS, WIDTH)[None, :]
    for begin in range(0, labels, LABELS):
        label = begin + tl.arange(0, LABELS)
        there = label < labels
        place = weight + label[:, None] * width + column[None, :]
        known = there[:, None] & (column < width)[None, :]
        own = tl.load(place, mask=known, other=0.0).to(tl.float32)
        logit = tl.sum(own * mean, 1) + tl.load(bias + label, mask=there, other=0.0).to(tl.float32)
        tl.store(result + item.to(tl.int64) * labels + label, logit, mask=there)
