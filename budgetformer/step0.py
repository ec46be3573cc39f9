"""Step 0 and f_o with NumPy alone: what is decided of a text before the encoder runs.

Step 0 is a linear classifier on TF-IDF features: the text's tokens, and its pairs of neighbouring
tokens, which share a table of `exit_buckets` rows by their hash. f_o reads a few numbers about step
0's answer. Neither needs torch, so whoever has the tokens can decide.

Shapes: B texts, C labels, K columns of the table (C, or 1 where there are two labels).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]

HASHED_LEFT, HASHED_RIGHT = 1_000_003, 7_919
"""Factors of the two token ids in the hash of a pair of neighbours."""
HASHED_SECOND, HASHED_SHARED = 15_485_863, 32_452_843
"""Factors of a token of a pair's second text, and of whether the first text has it too."""
IDF_UNIT = 1 / 16
"""Inverse document frequencies are stored as whole multiples of this."""
EVIDENCE_FEATURES = 4
"""What f_o reads of step 0 (`evidence`)."""
MAX_ODDS = 14.0
"""Log-odds of a confidence are clipped here (about 1 - 1e-6)."""


@dataclass(frozen=True)
class Features:
    """The distinct features of B texts: for each its text `owner`, table `row` and `count`."""

    texts: int
    owner: Array
    row: Array
    count: Array


def features(
    ids: Sequence[Sequence[int] | Array],
    segments: Sequence[Sequence[int] | Array] | None,
    vocab_size: int,
    buckets: int,
) -> Features:
    """Find the distinct features of texts, counted.

    A token has the table row of its id, a pair of neighbours one of `buckets` rows behind those. A
    token of a pair's second text has a row there too: one if the first text also has it, and
    another if not.

    Args:
        ids: token ids of each text, special tokens included.
        segments: 0 or 1 for each token; None: 0 throughout.
        vocab_size: rows for single tokens.
        buckets: rows for hashed features; 0: single tokens are all that is read.
    """
    lengths = np.fromiter((len(text) for text in ids), np.int64, len(ids))
    owner = np.repeat(np.arange(len(ids)), lengths)
    flat = np.concatenate([np.asarray(text, np.int64) for text in ids]) if len(ids) else owner
    rows, owners = [flat], [owner]
    if buckets:
        if segments is not None:
            second = np.concatenate([np.asarray(part, bool) for part in segments])
            if second.any():
                shared = np.isin(owner * vocab_size + flat, (owner * vocab_size + flat)[~second])
                hashed = (flat * HASHED_SECOND + shared * HASHED_SHARED) % buckets
                rows[0] = np.where(second, vocab_size + hashed, flat)
        together = owner[:-1] == owner[1:]
        pairs = flat[:-1] * HASHED_LEFT + flat[1:] * HASHED_RIGHT
        rows.append(vocab_size + pairs[together] % buckets)
        owners.append(owner[:-1][together])
    size = vocab_size + buckets
    keys, count = np.unique(np.concatenate(owners) * size + np.concatenate(rows), return_counts=True)
    return Features(len(ids), keys // size, keys % size, count)


def weights(found: Features, idf: Array, repeats: float) -> Array:
    """Return the TF-IDF weight of each feature; those of one text have length 1 together.

    Args:
        found: features of texts.
        idf: of each table row, in units of `IDF_UNIT`.
        repeats: how much a feature's count adds: its frequency is 1 + repeats * log(count).
    """
    raw = idf[found.row].astype(np.float32) * IDF_UNIT
    if repeats:
        raw *= 1 + repeats * np.log(found.count).astype(np.float32)
    norms = np.sqrt(np.bincount(found.owner, raw * raw, minlength=found.texts))
    return (raw / np.maximum(norms, 1e-9)[found.owner]).astype(np.float32)


def evidence(logits: Array, lengths: Array, problem_type: str | None) -> Array:
    """Summarise step 0's answers [B, C] for f_o: [B, `EVIDENCE_FEATURES`].

    Log-odds of its confidence, its entropy as a share of the largest possible, its margin over the
    second label (multi-label: 0), and the logarithm of the length in tokens.
    """
    if problem_type == "multi_label_classification":
        odds = np.abs(logits).min(-1)
        p = 1 / (1 + np.exp(-np.abs(logits)))
        entropy = -(p * np.log(p) + (1 - p) * np.log1p(-np.minimum(p, 1 - 1e-7))).mean(-1)
        margin = np.zeros_like(odds)
    else:
        ordered = np.sort(logits, -1)
        top = ordered[:, -1]
        others = np.log(np.exp(ordered[:, :-1] - top[:, None]).sum(-1))
        odds = -others
        shifted = logits - top[:, None]
        total = np.exp(shifted).sum(-1, keepdims=True)
        log_p = shifted - np.log(total)
        entropy = -(np.exp(log_p) * log_p).sum(-1) / np.log(logits.shape[-1])
        margin = top - ordered[:, -2]
    parts = [odds.clip(max=MAX_ODDS), entropy, margin.clip(max=MAX_ODDS), np.log1p(lengths)]
    return np.stack(parts, -1).astype(np.float32)
