"""Triton kernels of the decision: step 0's sums, and f_o's features of its answer."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from budgetformer.inference.backends.kernels.tiles import tile_side
from budgetformer.inference.batch_offsets import BatchOffsets
from budgetformer.model.architecture import EVIDENCE_SIZE, MULTI_LABEL
from budgetformer.model.step0 import ExitHead
from budgetformer.model.tfidf import HASHED_LEFT, HASHED_RIGHT, MAX_ODDS

BAGGED_ROWS, BAGGED_COLUMNS, BAGGED_WARPS = 32, 64, 4


def bag(ids: Tensor, offsets: BatchOffsets, exit_head: ExitHead) -> Tensor:
    """Compute `plain.bag`; the order of an item's sum does not depend on its batch."""
    width = exit_head.weight.embedding_dim
    result = torch.empty(offsets.num_items, width, dtype=exit_head.bias.dtype, device=ids.device)
    columns = min(tile_side(width), BAGGED_COLUMNS)
    if offsets.num_items:
        _bag[(offsets.num_items, triton.cdiv(width, columns))](
            ids,
            offsets.starts,
            exit_head.weight.weight,
            result,
            width,
            exit_head.vocab_size,
            exit_head.buckets,
            ROWS=BAGGED_ROWS,
            COLUMNS=columns,
            PAIRS=exit_head.buckets > 0,
            LEFT=HASHED_LEFT,
            RIGHT=HASHED_RIGHT,
            num_warps=BAGGED_WARPS,
        )
    return result


@triton.jit
def _bag(
    ids,
    starts,
    table,
    result,
    width,
    words,
    buckets,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PAIRS: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
):
    item = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    start, stop = tl.load(starts + item), tl.load(starts + item + 1)
    total = tl.zeros([COLUMNS], tl.float32)
    for begin in range(start, stop, ROWS):
        row = begin + tl.arange(0, ROWS)
        left = tl.load(ids + row, mask=row < stop, other=0).to(tl.int64)
        total += tl.sum(_gathered(table, left, row < stop, column, width), 0)
        if PAIRS:
            right = tl.load(ids + row + 1, mask=row + 1 < stop, other=0).to(tl.int64)
            pair = words + (left * LEFT + right * RIGHT) % buckets
            total += tl.sum(_gathered(table, pair, row + 1 < stop, column, width), 0)
    count = tl.maximum(stop - start, 1)
    if PAIRS:
        count = 2 * count - 1
    total = total / tl.sqrt(count.to(tl.float32))
    place = result + item.to(tl.int64) * width + column
    tl.store(place, total.to(result.dtype.element_ty), mask=column < width)


def exit_evidence(exit_logits: Tensor, problem_type: str | None) -> Tensor:
    """Compute `plain.exit_evidence`."""
    items, labels = exit_logits.shape
    result = torch.empty(items, EVIDENCE_SIZE, dtype=exit_logits.dtype, device=exit_logits.device)
    if items:
        _exit_evidence[(items,)](
            exit_logits,
            result,
            labels,
            MAX_ODDS,
            LABELS=tile_side(labels),
            EACH=problem_type == MULTI_LABEL,
            num_warps=1,
        )
    return result


@triton.jit
def _exit_evidence(logits, result, labels, most, LABELS: tl.constexpr, EACH: tl.constexpr):
    item, label = tl.program_id(0), tl.arange(0, LABELS)
    there = label < labels
    place = logits + item.to(tl.int64) * labels + label
    logit = tl.load(place, mask=there, other=float("-inf")).to(tl.float32)
    if EACH:
        odds = tl.min(tl.abs(logit), 0)  # infinite in the padding
        likelier = 1 / (1 + tl.exp(-tl.abs(logit)))  # max(p, 1 - p)
        each = tl.where(there, _entropy(likelier) + _entropy(1 - likelier), 0.0)
        entropy = tl.sum(each, 0) / labels
    else:
        other = tl.where(label == tl.argmax(logit, 0), float("-inf"), logit)
        odds = tl.max(logit, 0) - _logsumexp(other)
        entropy = tl.sum(_entropy(tl.exp(logit - _logsumexp(logit))), 0)
    kind = result.dtype.element_ty
    tl.store(result + 2 * item, tl.minimum(odds, most).to(kind))
    tl.store(result + 2 * item + 1, entropy.to(kind))


@triton.jit
def _logsumexp(values):
    most = tl.max(values, 0)
    total = tl.sum(tl.exp(values - tl.where(most > float("-inf"), most, 0.0)), 0)
    return most + tl.log(tl.maximum(total, 1.0))  # the largest value adds 1


@triton.jit
def _entropy(share):
    """Return -p log p, which is 0 for p = 0."""
    return tl.where(share > 0, -share * tl.log(tl.where(share > 0, share, 1.0)), 0.0)


@triton.jit
def table_rows(table, numbers, row, rows, column, width):
    """Return columns of the table rows with the indices `numbers`, [ROWS, COLUMNS] in float32."""
    there = row < rows
    number = tl.load(numbers + row, mask=there, other=0).to(tl.int64)
    return _gathered(table, number, there, column, width)


@triton.jit
def _gathered(table, number, there, column, width):
    """Return columns of table rows, [ROWS, COLUMNS] in float32; zeros out of bounds."""
    place = table + number[:, None] * width + column[None, :]
    known = there[:, None] & (column < width)[None, :]
    return tl.load(place, mask=known, other=0.0).to(tl.float32)
