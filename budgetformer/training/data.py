"""Texts with or without labels, and their tokens."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from budgetformer.checkpoint.store import Checkpoint, load_tokenizer
from budgetformer.errors import DataError
from budgetformer.inference.texts import Texts, TokenColumns
from budgetformer.tables import open_table
from budgetformer.tokenization import Side, TextEncoder
from budgetformer.training.labels import LabelColumn, stored_names


@dataclass(frozen=True)
class Examples:
    """N texts or text pairs, with or without labels.

    Attributes:
        texts: texts, or first texts of the pairs.
        pairs: second texts of the pairs; None: single texts.
        labels: class ids [N], or 0/1 rows [N, C] when multi-label; empty without labels.
        names: class names in the order of class ids; empty without labels.
    """

    texts: list[str]
    pairs: list[str] | None
    labels: np.ndarray
    names: list[str]

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def multi_label(self) -> bool:
        """Whether a text may have several labels."""
        return self.labels.ndim == 2

    def subset(self, rows: Sequence[int] | np.ndarray) -> Examples:
        """Return the examples in `rows`."""
        return Examples(
            [self.texts[i] for i in rows],
            None if self.pairs is None else [self.pairs[i] for i in rows],
            self.labels[np.asarray(rows, dtype=np.intp)] if len(self.labels) else self.labels,
            self.names,
        )

    def sample(self, count: int, seed: int) -> Examples:
        """Return at most `count` random rows, in their original order."""
        return self if count >= len(self) else self.subset(drawn_rows(len(self), count, seed))

    def evenly(self, count: int | None) -> Examples:
        """Return at most `count` evenly spaced rows; None: all."""
        if count is None or count >= len(self):
            return self
        return self.subset(even_rows(len(self), count))


def drawn_rows(total: int, count: int, seed: int) -> np.ndarray:
    """Return at most `count` random row numbers of 0..total-1, rising."""
    return np.sort(np.random.default_rng(seed).permutation(total)[:count])


def even_rows(total: int, count: int) -> np.ndarray:
    """Return at most `count` evenly spaced row numbers of 0..total-1."""
    return np.linspace(0, total - 1, min(count, total)).astype(int)


def read_examples(
    path: Path,
    names: list[str] | None = None,
    *,
    multi_label: bool | None = None,
    encoder_names: list[str] | None = None,
) -> Examples:
    """Read labelled texts: columns `text`, `label` and, for pairs, `text_pair`.

    A label is a class id, a class name, or a list of either (multi-label). Labels in CSV are
    strings as written. Class names come from `names`, else from `labels.json` beside the file or
    the file's own metadata, else from the labels themselves.

    Args:
        path: a CSV, JSONL or Parquet file.
        names: class names of a model, the only valid labels; None: see above.
        multi_label: whether rows may have several labels; None: the first row decides.
        encoder_names: class names of the encoder, used for class ids without names if the counts
            match.

    Raises:
        DataError: the file cannot be read, has no rows, or a row has no text or an unknown label.
    """
    table = open_table(path)
    stored = stored_names(table)
    texts: list[str] = []
    pairs: list[str] = []
    column = LabelColumn(path, multi_label)
    for text, pair, label in table.rows("label"):
        try:
            column.add(label)
        except ValueError as error:
            raise table.error(error) from error
        texts.append(text)
        if pair is not None:
            pairs.append(pair)
    if not texts:
        raise DataError(f"{path}: no rows")
    class_names, labels = column.encode(names, stored, encoder_names)
    return Examples(texts, pairs or None, labels, class_names)


def read_texts(path: Path) -> Examples:
    """Read texts or pairs without labels.

    Raises:
        DataError: the file cannot be read, or has no rows.
    """
    rows = list(open_table(path))
    if not rows:
        raise DataError(f"{path}: no rows")
    pairs = [pair for _, pair in rows if pair is not None]
    return Examples([text for text, _ in rows], pairs or None, np.zeros(0, np.int64), [])


def has_labels(path: Path) -> bool:
    """Return whether the first row of a file has a label; False if the file cannot be read."""
    try:
        _, _, label = next(iter(open_table(path).rows("label")))
    except (DataError, StopIteration):
        return False
    return label is not None


@dataclass(frozen=True)
class TokenBatch:
    """Padded tokens [B, T] of the items `rows` [B] of a data set."""

    rows: np.ndarray
    input_ids: Tensor
    token_type_ids: Tensor
    attention_mask: Tensor

    def split(self, parts: int) -> list[TokenBatch]:
        """Split the batch into at most `parts` batches of similar size."""
        size = -(-len(self.rows) // parts)
        return [self.take(slice(i, i + size)) for i in range(0, len(self.rows), size)]

    def take(self, items: slice) -> TokenBatch:
        """Return a slice of the items."""
        return TokenBatch(
            self.rows[items],
            self.input_ids[items],
            self.token_type_ids[items],
            self.attention_mask[items],
        )

    def to(self, device: torch.device) -> TokenBatch:
        """Return the batch with its tokens on `device`."""
        if self.input_ids.device == device:
            return self
        return TokenBatch(
            self.rows,
            self.input_ids.to(device),
            self.token_type_ids.to(device),
            self.attention_mask.to(device),
        )


class TokenizedTexts:
    """The tokens of N texts or pairs.

    Attributes:
        ids, types: token ids and token type ids of the window, which the encoder reads.
        full_ids, full_types: those of the full text, which step 0 reads.
        lengths: tokens of each window [N].
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        texts: list[str],
        pairs: list[str] | None,
        max_length: int,
        truncation_side: Side = "right",
        full_length: int = 0,
    ) -> None:
        inputs = texts if pairs is None else list(zip(texts, pairs, strict=True))
        encoder = TextEncoder(tokenizer, max_length, truncation_side, full_length)
        self.ids: list[np.ndarray] = []
        self.types: list[np.ndarray] = []
        self.full_ids: list[np.ndarray] = []
        self.full_types: list[np.ndarray] = []
        for tokens in encoder.encode(inputs):
            ids, types = np.array(tokens.ids, np.int64), _types(tokens.ids, tokens.type_ids)
            self.ids.append(ids)
            self.types.append(types)
            full_ids, full_types = tokens.full_ids, tokens.full_type_ids
            self.full_ids.append(ids if full_ids is None else np.array(full_ids, np.int64))
            self.full_types.append(types if full_ids is None else _types(full_ids, full_types))
        self.lengths = np.array([len(ids) for ids in self.ids])

    @classmethod
    def of(cls, checkpoint: Checkpoint, examples: Examples) -> TokenizedTexts:
        """Tokenize texts as a checkpoint does."""
        manifest = checkpoint.manifest
        return cls(
            load_tokenizer(checkpoint),
            examples.texts,
            examples.pairs,
            manifest.max_tokens,
            manifest.truncation_side,
            manifest.whole_tokens,
        )

    def subset(self, rows: np.ndarray) -> TokenizedTexts:
        """Return the tokens of the texts in `rows`."""
        subset = copy.copy(self)
        for name in ("ids", "types", "full_ids", "full_types"):
            setattr(subset, name, [getattr(self, name)[row] for row in rows])
        subset.lengths = self.lengths[rows]
        return subset

    def columns(self, rows: np.ndarray | Sequence[int]) -> Texts:
        """Return the tokens of the texts in `rows`, concatenated without padding."""
        window = _columns(self.ids, self.types, rows)
        if all(self.full_ids[row] is self.ids[row] for row in rows):
            return Texts(window, window)
        return Texts(window, _columns(self.full_ids, self.full_types, rows))

    def batch(self, rows: np.ndarray) -> TokenBatch:
        """Return the texts in `rows`, padded to the longest of them."""
        longest = max(int(self.lengths[rows].max()), 1)
        ids = np.zeros((len(rows), longest), dtype=np.int64)
        types, mask = np.zeros_like(ids), np.zeros_like(ids)
        for item, row in enumerate(rows):
            length = self.lengths[row]
            ids[item, :length] = self.ids[row]
            types[item, :length] = self.types[row]
            mask[item, :length] = 1
        return TokenBatch(rows, *(torch.from_numpy(a) for a in (ids, types, mask)))

    def batches(self, batch_size: int, seed: int | None = None) -> Iterator[TokenBatch]:
        """Yield every text once, in batches of texts of similar length.

        Args:
            batch_size: texts per batch.
            seed: seed of the order of texts and batches; None: order of length.
        """
        order = np.argsort(self.lengths, kind="stable")
        if seed is not None:
            random = np.random.default_rng(seed)
            order = random.permutation(len(order))
            pool = batch_size * 50
            chunks = [order[i : i + pool] for i in range(0, len(order), pool)]
            order = np.concatenate([c[np.argsort(self.lengths[c], kind="stable")] for c in chunks])
        batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        if seed is not None:
            batches = [batches[i] for i in random.permutation(len(batches))]
        for rows in batches:
            yield self.batch(rows)


def _types(ids: list[int], types: list[int] | None) -> np.ndarray:
    return np.zeros(len(ids), np.int64) if types is None else np.array(types, np.int64)


def _columns(
    ids: list[np.ndarray], types: list[np.ndarray], rows: np.ndarray | Sequence[int]
) -> TokenColumns:
    empty = np.empty(0, np.int64)
    all_ids, all_types = (
        np.concatenate([empty, *(by_text[row] for row in rows)]) for by_text in (ids, types)
    )
    return TokenColumns(
        all_ids.astype(np.int32),
        np.fromiter((len(ids[row]) for row in rows), np.int32, len(rows)),
        all_types.astype(np.int32) if all_types.any() else None,
    )
