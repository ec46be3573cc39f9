"""Table rows of distances between tokens, and the number of token pairs that attention scores.

Uses NumPy only, so that a process that counts multiply-adds need not import torch.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]


@lru_cache(maxsize=256)
def bias_rows(tokens: int, rows: int, max_distance: int) -> Rows:
    """Return the row in T5's bias table of each distance 1 - T .. T - 1 (key - query): [2T - 1].

    One half of the rows is for keys before the query, the other for keys after it. In each half,
    the first half of the rows has one distance each, and the others are on a logarithmic scale.

    Args:
        tokens: number of tokens T.
        rows: number of rows of the table.
        max_distance: distance from which all larger distances share a row.
    """
    distance = np.arange(1 - tokens, tokens)
    half = rows // 2
    exact = half // 2
    size = abs(distance)
    scaled = np.log(np.maximum(size, 1).astype(np.float32) / np.float32(exact))
    scaled = scaled / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)
    far = np.minimum(exact + scaled.astype(np.int64), half - 1)
    bias_row: Rows = half * (distance > 0) + np.where(size < exact, size, far)
    return bias_row


@lru_cache(maxsize=256)
def score_rows(tokens: int, span: int, max_distance: int, buckets: bool) -> Rows:
    """Return the row in DeBERTa's table of each distance 1 - T .. T - 1 (query - key): [2T - 1].

    Args:
        tokens: number of tokens T.
        span: half of the table's rows, S.
        max_distance: distance from which all larger distances share a row.
        buckets: whether distances beyond half of S are on a logarithmic scale.
    """
    return _score_rows(np.arange(1 - tokens, tokens), span, max_distance, buckets)


def _score_rows(distance: Rows, span: int, max_distance: int, buckets: bool) -> Rows:
    if buckets:
        half = span // 2
        size = np.maximum(abs(distance), half - 1)
        scale = np.log(np.float32((max_distance - 1) / half))
        scaled = np.log((size / half).astype(np.float32)) / scale * np.float32(half - 1)
        far = (np.ceil(scaled) + half).astype(np.int64)
        distance = np.where(size <= half, distance, far * np.sign(distance))
    score_row: Rows = (distance + span).clip(0, 2 * span - 1)
    return score_row


@lru_cache(maxsize=4096)
def count_score_rows(tokens: int, span: int, max_distance: int, buckets: bool) -> int:
    """Return the number of table rows between the first and the last of `score_rows`."""
    if not tokens:
        return 0
    first, last = _score_rows(np.array([1 - tokens, tokens - 1]), span, max_distance, buckets)
    return int(last - first) + 1


def uses_block_attention(tokens: int, window: int | None) -> bool:
    """Return whether local attention over this many tokens scores blocks instead of all pairs."""
    return window is not None and tokens > 3 * window


def multiplied_pairs(tokens: int, window: int | None) -> int:
    """Count the token pairs that attention scores: all, or three blocks per block of queries."""
    if window is None or not uses_block_attention(tokens, window):
        return tokens * tokens
    return -(-tokens // window) * window * 3 * window
