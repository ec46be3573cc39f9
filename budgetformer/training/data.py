"""Labelled texts from Parquet, CSV or JSONL files, and their tokens."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet
import torch
from tokenizers import Tokenizer
from torch import Tensor

from budgetformer.checkpoint import Checkpoint, load_tokenizer
from budgetformer.errors import DataError
from budgetformer.tokenization import Side, TextEncoder


@dataclass(frozen=True)
class Examples:
    """Labelled texts: `labels` holds class ids [N], or 0/1 rows [N, C] when multi-label."""

    texts: list[str]
    pairs: list[str] | None
    labels: np.ndarray
    names: list[str]

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def multi_label(self) -> bool:
        """Whether an item may carry several labels."""
        return self.labels.ndim == 2

    def subset(self, rows: Sequence[int] | np.ndarray) -> Examples:
        """Return the given rows."""
        return Examples(
            [self.texts[i] for i in rows],
            None if self.pairs is None else [self.pairs[i] for i in rows],
            self.labels[np.asarray(rows, dtype=np.intp)],
            self.names,
        )

    def sample(self, count: int, seed: int) -> Examples:
        """Return `count` rows drawn by `seed`, in their order; all of them if there are no more."""
        return self if count >= len(self) else self.subset(drawn_rows(len(self), count, seed))

    def evenly(self, count: int | None) -> Examples:
        """Return an even choice of at most `count` rows; None: all."""
        if count is None or count >= len(self):
            return self
        return self.subset(even_rows(len(self), count))


def drawn_rows(total: int, count: int, seed: int) -> np.ndarray:
    """Draw at most `count` of the rows 0..total-1 by `seed`, in their order."""
    return np.sort(np.random.default_rng(seed).permutation(total)[:count])


def even_rows(total: int, count: int) -> np.ndarray:
    """Choose at most `count` of the rows 0..total-1, evenly."""
    return np.linspace(0, total - 1, min(count, total)).astype(int)


def read_table(path: Path) -> pa.Table:
    """Read a Parquet, CSV or JSONL file.

    Raises:
        DataError: the file is missing, broken or of another kind.
    """
    try:
        match path.suffix.lower():
            case ".parquet":
                return pyarrow.parquet.read_table(path)
            case ".csv":
                return pyarrow.csv.read_csv(
                    path,
                    parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
                    convert_options=pyarrow.csv.ConvertOptions(
                        column_types={"text": pa.string(), "text_pair": pa.string()}
                    ),
                )
            case ".jsonl" | ".ndjson":
                return pyarrow.json.read_json(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: {error}") from error
    raise DataError(f"{path}: not a .parquet, .csv or .jsonl file")


def read_examples(path: Path, names: list[str] | None = None) -> Examples:
    """Read labelled texts: columns `text`, `label` and, for pairs, `text_pair`.

    A label is a class id, a class name, or a list of either (multi-label). Class names come from
    `names`, else from `labels.json` beside the file, else from the labels themselves.

    Raises:
        DataError: a column is missing, a text is null, or a label is unknown.
    """
    table = read_table(path)
    texts, pairs = _texts_of(table, path)
    if "label" not in table.column_names:
        raise DataError(f"{path}: no column 'label' (it has {', '.join(table.column_names)})")
    beside = path.parent / "labels.json"
    if names is None and beside.is_file():
        names = _read_names(beside)
    raw = table["label"].to_pylist()
    many = bool(raw) and isinstance(raw[0], list)
    rows = raw if many else [[label] for label in raw]
    for row, labels_of_row in enumerate(rows):
        if not isinstance(labels_of_row, list):
            raise DataError(f"{path}: row {row} has the unknown label {labels_of_row!r}")
    flat = [(label, row) for row, labels_of_row in enumerate(rows) for label in labels_of_row]
    if names is None:
        kind = str if flat and isinstance(flat[0][0], str) else int
        for label, row in flat:
            if not isinstance(label, kind):
                raise DataError(f"{path}: row {row} has the unknown label {label!r}")
        known = [label for label, _ in flat]
        numbered = [str(i) for i in range(max(known, default=-1) + 1)] if kind is int else []
        names = numbered if kind is int else sorted(set(known))
    index = {name: i for i, name in enumerate(names)}

    def class_id(label: object, row: int) -> int:
        number = index.get(label) if isinstance(label, str) else label
        if not isinstance(number, int) or not 0 <= number < len(index):
            raise DataError(f"{path}: row {row} has the unknown label {label!r}")
        return number

    if many:
        labels = np.zeros((len(raw), len(names)), dtype=np.int64)
        for row, row_labels in enumerate(raw):
            labels[row, [class_id(label, row) for label in row_labels]] = 1
    else:
        labels = np.array([class_id(label, row) for row, label in enumerate(raw)], dtype=np.int64)
    return Examples(texts, pairs, labels, names)


def read_texts(path: Path) -> tuple[list[str], list[str] | None]:
    """Read the columns `text` and, if there is one, `text_pair`.

    Raises:
        DataError: the file cannot be read, has no such column, or a text is null.
    """
    return _texts_of(read_table(path), path)


def _texts_of(table: pa.Table, path: Path) -> tuple[list[str], list[str] | None]:
    if "text" not in table.column_names:
        raise DataError(f"{path}: no column 'text' (it has {', '.join(table.column_names)})")
    texts = table["text"].to_pylist()
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(f"{path}: row {row} has no text")
    pairs = table["text_pair"].to_pylist() if "text_pair" in table.column_names else None
    for row, pair in enumerate(pairs or ()):
        if not isinstance(pair, str):
            raise DataError(f"{path}: row {row} has no text_pair")
    return texts, pairs


def _read_names(path: Path) -> list[str]:
    try:
        names = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {error}") from error
    if not isinstance(names, list):
        raise DataError(f"{path}: not a list of label names")
    return [str(name) for name in names]


@dataclass(frozen=True)
class TokenBatch:
    """Padded tokens [B, T] of the items `rows` [B] of a data set."""

    rows: np.ndarray
    input_ids: Tensor
    token_type_ids: Tensor
    attention_mask: Tensor

    def split(self, parts: int) -> list[TokenBatch]:
        """Cut the batch into at most `parts` batches of like size."""
        size = -(-len(self.rows) // parts)
        return [
            TokenBatch(
                self.rows[i : i + size],
                self.input_ids[i : i + size],
                self.token_type_ids[i : i + size],
                self.attention_mask[i : i + size],
            )
            for i in range(0, len(self.rows), size)
        ]


class TokenizedTexts:
    """The tokens of a data set, kept once and served in batches of similar length."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        texts: list[str],
        pairs: list[str] | None,
        max_length: int,
        truncation_side: Side = "right",
    ) -> None:
        inputs = texts if pairs is None else list(zip(texts, pairs, strict=True))
        encoded = TextEncoder(tokenizer, max_length, truncation_side).encode(inputs)
        self.ids = [np.array(tokens.ids, dtype=np.int64) for tokens in encoded]
        self.types = [np.array(tokens.type_ids, dtype=np.int64) for tokens in encoded]
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
        )

    def subset(self, rows: np.ndarray) -> TokenizedTexts:
        """Return the given texts."""
        chosen = copy.copy(self)
        chosen.ids, chosen.types = [self.ids[i] for i in rows], [self.types[i] for i in rows]
        chosen.lengths = self.lengths[rows]
        return chosen

    def batch(self, rows: np.ndarray) -> TokenBatch:
        """Pad the given rows to their longest."""
        longest = max(int(self.lengths[rows].max()), 1)
        ids = np.zeros((len(rows), longest), dtype=np.int64)
        types, mask = np.zeros_like(ids), np.zeros_like(ids)
        for place, row in enumerate(rows):
            length = self.lengths[row]
            ids[place, :length] = self.ids[row]
            types[place, :length] = self.types[row]
            mask[place, :length] = 1
        return TokenBatch(rows, *(torch.from_numpy(a) for a in (ids, types, mask)))

    def batches(self, batch_size: int, seed: int | None = None) -> Iterator[TokenBatch]:
        """Yield every row once.

        `seed` shuffles, still grouping like lengths; None goes by length.
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
