"""Step 0 and f_o in NumPy: the decision about a text before the encoder runs.

Step 0 is a linear classifier on TF-IDF features: the text's tokens and its pairs of neighbouring
tokens, which are hashed into `exit_buckets` rows. f_o reads a few features of step 0's answer.
Neither needs torch, so frontends can decide.

Shapes: B texts, C labels, K columns of the table (C, or 1 for two exclusive labels).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from budgetformer.model.architecture import MULTI_LABEL, Architecture

Array: TypeAlias = npt.NDArray[Any]

STEP0_TENSORS = "exit_head.", "encoder.decision.controller."
"""Prefixes of the tensors of step 0 and of f_o in a checkpoint."""
HASHED_LEFT, HASHED_RIGHT = 1_000_003, 7_919
"""Factors of the two token ids in the hash of a pair of neighbours."""
HASHED_SECOND, HASHED_SHARED = 15_485_863, 32_452_843
"""Factors, for tokens of a pair's second text, of the token id and of its presence in the first."""
IDF_UNIT = 1 / 16
"""Inverse document frequencies are stored as integer multiples of this."""
MAX_ODDS = 14.0
"""Upper bound of the log-odds of a confidence (about 1 - 1e-6)."""


def table_columns(classes: int, multi_label: bool) -> int:
    """Return the number of columns of step 0's table: 1 for two exclusive labels, else C."""
    return 1 if classes == 2 and not multi_label else classes


def confidence(logits: Array, problem_type: str | None) -> Array:
    """Return the confidence [B] of answers with logits [B, C], as `answers.confidence` does."""
    if problem_type == MULTI_LABEL:
        p: Array = 1 / (1 + np.exp(-np.abs(logits).min(-1)))
    else:
        p = 1 / np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)
    return p


@dataclass(frozen=True)
class Features:
    """The distinct features of B texts, sorted by text.

    Attributes:
        texts: number of texts B.
        owner: index of the text of each feature.
        row: table row of each feature.
        count: number of occurrences of each feature in its text.
    """

    texts: int
    owner: Array
    row: Array
    count: Array


def features(
    ids: Array,
    segments: Array | None,
    lengths: Sequence[int] | Array,
    vocab_size: int,
    buckets: int,
) -> Features:
    """Return the distinct features of B texts and their counts.

    The row of a token is its id. Pairs of neighbours are hashed into the `buckets` rows after the
    vocabulary. Tokens of a text pair's second text are hashed into these rows too, together with
    whether the first text contains them.

    Args:
        ids: token ids of the texts, one text after another, including special tokens.
        segments: segment of each token, 0 or 1; None: all 0.
        lengths: number of tokens of each text.
        vocab_size: number of rows for single tokens.
        buckets: number of rows for hashed features; 0: single tokens only.
    """
    texts = len(lengths)
    ids = ids.astype(np.int64, copy=False)
    owner = np.repeat(np.arange(texts), lengths)
    row = ids
    if buckets:
        if segments is not None and (second := segments > 0).any():
            text_and_id = owner * vocab_size + ids
            shared = np.isin(text_and_id, text_and_id[~second])
            hashed = (ids * HASHED_SECOND + shared * HASHED_SHARED) % buckets
            row = np.where(second, vocab_size + hashed, ids)
        together = owner[:-1] == owner[1:]
        pairs = (ids[:-1] * HASHED_LEFT + ids[1:] * HASHED_RIGHT)[together] % buckets
        row = np.concatenate([row, vocab_size + pairs])
        owner = np.concatenate([owner, owner[:-1][together]])
    size = vocab_size + buckets
    # Inlined np.unique: for a single text, its overhead would exceed the rest of this function.
    keys = owner * size + row
    keys.sort()
    first = np.empty(len(keys), bool)
    first[:1] = True
    np.not_equal(keys[1:], keys[:-1], out=first[1:])
    places = first.nonzero()[0]
    count = np.empty(len(places), np.int64)
    np.subtract(places[1:], places[:-1], out=count[:-1])
    count[-1:] = len(keys) - places[-1:]
    owner, row = np.divmod(keys[places], size)
    return Features(texts, owner, row, count)


def tfidf(found: Features, idf: Array, repeats: float) -> Array:
    """Return the TF-IDF weight of each feature, as float32; each text's vector has norm 1.

    Args:
        found: features of the texts.
        idf: inverse document frequency per table row, in units of `IDF_UNIT`.
        repeats: weight of a feature's count: its term frequency is 1 + repeats * log(count).
    """
    raw = idf[found.row].astype(np.float32) * IDF_UNIT
    if repeats:
        raw *= 1 + repeats * np.log(found.count).astype(np.float32)
    norms = np.sqrt(np.bincount(found.owner, raw * raw, minlength=found.texts))
    return (raw / np.maximum(norms, 1e-9)[found.owner]).astype(np.float32)


def evidence(logits: Array, lengths: Sequence[int] | Array, problem_type: str | None) -> Array:
    """Return f_o's features of step 0's logits [B, C]: [B, `EVIDENCE_FEATURES`], float32.

    They are the log-odds of the confidence, the normalised entropy (multi-label: the mean over
    labels), the margin over the second label (multi-label: 0), and the logarithm of the number of
    tokens.
    """
    if problem_type == MULTI_LABEL:
        size = np.abs(logits)
        odds, margin = size.min(-1), np.zeros(len(logits))
        p = 1 / (1 + np.exp(-size))
        entropy = (size * (1 - p) - np.log(p)).mean(-1)
    elif logits.shape[-1] < 2:
        odds, margin = np.full((2, len(logits)), MAX_ODDS)
        entropy = np.zeros(len(logits))
    else:
        ordered = np.sort(logits, -1)
        others = np.exp(ordered - ordered[:, -1:])
        odds = -np.log(np.maximum(others[:, :-1].sum(-1), 1e-30))
        margin = ordered[:, -1] - ordered[:, -2]
        p = others / others.sum(-1, keepdims=True)
        entropy = -(p * np.log(np.maximum(p, 1e-30))).sum(-1) / np.log(logits.shape[-1])
    parts = [odds.clip(max=MAX_ODDS), entropy, margin.clip(max=MAX_ODDS), np.log1p(lengths)]
    return np.stack(parts, -1).astype(np.float32)


@dataclass(frozen=True)
class StepZero:
    """Step 0 and f_o of one network.

    Attributes:
        table: coefficients in units of `scale`, int8 [rows, K].
        scale: scale of each column, float32 [K].
        bias: bias of each column, float32 [K].
        idf: inverse document frequency of each row, in units of `IDF_UNIT`, uint8 [rows].
        repeats: weight of a feature's count, see `tfidf`.
        vocab_size, buckets: see `features`.
        classes: number of labels C.
        problem_type: problem type of the network.
        hidden, out: weight and bias of f_o's two layers.
    """

    table: Array
    scale: Array
    bias: Array
    idf: Array
    repeats: float
    vocab_size: int
    buckets: int
    classes: int
    problem_type: str | None
    hidden: tuple[Array, Array]
    out: tuple[Array, Array]

    @classmethod
    def of(cls, config: Architecture, tensors: Mapping[str, Array]) -> StepZero:
        """Build step 0 and f_o from tensors by their names in a checkpoint.

        Raises:
            KeyError, ValueError: a tensor is missing or has the wrong shape.
        """
        head, f_o = STEP0_TENSORS
        rows = config.vocab_size + config.exit_buckets
        columns = table_columns(config.num_classes, config.problem_type == MULTI_LABEL)
        inputs, width = config.decision_inputs, config.controller_hidden_size

        def tensor(name: str, *shape: int) -> Array:
            found = tensors[name]
            if found.shape != shape:
                raise ValueError(f"{name} has shape {found.shape}, expected {shape}")
            return found

        return cls(
            table=tensor(f"{head}table", rows, columns),
            scale=tensor(f"{head}scale", columns),
            bias=tensor(f"{head}bias", columns),
            idf=tensor(f"{head}idf", rows),
            repeats=float(tensor(f"{head}repeats")),
            vocab_size=config.vocab_size,
            buckets=config.exit_buckets,
            classes=config.num_classes,
            problem_type=config.problem_type,
            hidden=(
                tensor(f"{f_o}hidden.weight", width, inputs),
                tensor(f"{f_o}hidden.bias", width),
            ),
            out=(tensor(f"{f_o}out.weight", 1, width), tensor(f"{f_o}out.bias", 1)),
        )

    def decide(
        self, ids: Array, segments: Array | None, lengths: Sequence[int] | Array
    ) -> tuple[Array, Array]:
        """Return step 0's logits [B, C] and f_o's s [B] for B texts, both float32.

        Args:
            ids, segments, lengths: see `features`.
        """
        logits = self.logits(ids, segments, lengths)
        return logits, self.budget(evidence(logits, lengths, self.problem_type))

    def logits(self, ids: Array, segments: Array | None, lengths: Sequence[int] | Array) -> Array:
        """Return step 0's logits [B, C]."""
        found = features(ids, segments, lengths, self.vocab_size, self.buckets)
        scores = np.zeros((found.texts, self.table.shape[1]), np.float32)
        if len(found.row):
            weighted = self.table[found.row] * tfidf(found, self.idf, self.repeats)[:, None]
            changes = found.owner[1:] != found.owner[:-1]
            starts = np.concatenate([[0], changes.nonzero()[0] + 1])
            scores[found.owner[starts]] = np.add.reduceat(weighted, starts)
        scores = scores * self.scale + self.bias
        return scores if scores.shape[1] == self.classes else np.concatenate([-scores, scores], -1)

    def budget(self, found: Array) -> Array:
        """Return f_o's s [B] in (0, 1) for evidence [B, `EVIDENCE_FEATURES`]."""
        hidden = np.maximum(found @ self.hidden[0].T + self.hidden[1], 0)
        logit = hidden @ self.out[0].T + self.out[1]
        s: Array = 1 / (1 + np.exp(-logit[:, 0].clip(-80, 80)))
        return s
