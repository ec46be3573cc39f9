"""Which row of a table a distance between two tokens has, and which pairs attention multiplies.

NumPy alone: a process that only counts multiply-adds imports no torch.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]


@lru_cache(maxsize=256)
def bias_rows(tokens: int, rows: int, farthest: int) -> Rows:
    """Return the row of each distance from 1 - T to T - 1, key minus query, of T5's bias: [2T - 1].

    Half of the rows are for keys after the query; of each half, one half for a distance each, the
    rest on a logarithmic scale.
    """
    distance = np.arange(1 - tokens, tokens)
    half = rows // 2
    exact = half // 2
    size = abs(distance)
    scaled = np.log(np.maximum(size, 1).astype(np.float32) / np.float32(exact))
    scaled = scaled / np.float32(math.log(farthest / exact)) * np.float32(half - exact)
    far = np.minimum(exact + scaled.astype(np.int64), half - 1)
    found: Rows = half * (distance > 0) + np.where(size < exact, size, far)
    return found


@lru_cache(maxsize=256)
def score_rows(tokens: int, span: int, farthest: int, buckets: bool) -> Rows:
    """Return the row of each distance from 1 - T to T - 1, query minus key, of DeBERTa's: [2T - 1].

    Args:
        tokens: T.
        span: S, half of the table's rows.
        farthest: distance from which on all share a row.
        buckets: whether distances beyond half of S are on a logarithmic scale.
    """
    return _score_rows(np.arange(1 - tokens, tokens), span, farthest, buckets)


def _score_rows(distance: Rows, span: int, farthest: int, buckets: bool) -> Rows:
    if buckets:
        half = span // 2
        size = np.maximum(abs(distance), half - 1)
        scale = np.log(np.float32((farthest - 1) / half))
        scaled = np.log((size / half).astype(np.float32)) / scale * np.float32(half - 1)
        far = (np.ceil(scaled) + half).astype(np.int64)
        distance = np.where(size <= half, distance, far * np.sign(distance))
    found: Rows = (distance + span).clip(0, 2 * span - 1)
    return found


@lru_cache(maxsize=4096)
def count_score_rows(tokens: int, span: int, farthest: int, buckets: bool) -> int:
    """Count the rows of `score_rows` from the first to the last."""
    if not tokens:
        return 0
    first, last = _score_rows(np.array([1 - tokens, tokens - 1]), span, farthest, buckets)
    return int(last - first) + 1


def runs_in_blocks(tokens: int, window: int | None) -> bool:
    """Whether local attention over so many tokens multiplies blocks instead of all pairs."""
    return window is not None and tokens > 3 * window


def multiplied_pairs(tokens: int, window: int | None) -> int:
    """Count the pairs of tokens whose scores are computed: all, or those of three blocks each."""
    if window is None or not runs_in_blocks(tokens, window):
        return tokens * tokens
    return -(-tokens // window) * window * 3 * window
