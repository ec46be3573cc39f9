"""Rows to answers: here if they are few, in one process per core if they are many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

import msgspec

from budgetformer.bulk.rows import Row
from budgetformer.precision import Precision

CHUNK_ROWS = 1024
"""Rows that go to a worker at once: enough for full batches of each ladder step."""


class Asked(msgspec.Struct, frozen=True):
    """What rows are classified with: a checkpoint folder and the arguments of `Classifier`."""

    path: str
    quality: str | float | None
    heads: int | None = None
    precision: Precision = "auto"


class Chunk(msgspec.Struct, frozen=True):
    """Some rows in their order."""

    texts: list[str]
    pairs: list[str] | None


class Answered(msgspec.Struct, frozen=True):
    """The answers to a chunk: a line of JSON for each row, and what they add up to."""

    lines: bytes
    rows: int
    labels: dict[str, int]
    heads: int
    macs: int
    dense_macs: int
    precision: Precision


@dataclass
class Totals:
    """What many answers add up to."""

    rows: int = 0
    labels: Counter[str] = field(default_factory=Counter)
    heads: int = 0
    macs: int = 0
    dense_macs: int = 0

    def add(self, answered: Answered) -> None:
        """Count some answers."""
        self.rows += answered.rows
        self.labels.update(answered.labels)
        self.heads += answered.heads
        self.macs += answered.macs
        self.dense_macs += answered.dense_macs


class Answerer:
    """A loaded checkpoint that answers chunks."""

    def __init__(self, asked: Asked) -> None:
        """Load the checkpoint.

        Raises:
            CheckpointError: it is damaged.
            PolicyError: it does not offer the quality or the heads.
        """
        from budgetformer.classifier import Classifier

        self._asked = asked
        self._classifier = Classifier(Path(asked.path), precision=asked.precision)
        self._classifier.checkpoint.rule(asked.quality, asked.heads)
        self._encode = msgspec.json.Encoder().encode

    @property
    def precision(self) -> Precision:
        """The precision that was chosen."""
        chosen: Precision = msgspec.convert(self._classifier.network.precision, Precision)
        return chosen

    def answer(self, chunk: Chunk) -> Answered:
        """Classify the rows of a chunk."""
        asked = self._asked
        found = self._classifier(chunk.texts, chunk.pairs, asked.quality, asked.heads)
        pairs = (
            [{}] * len(found) if chunk.pairs is None else [{"text_pair": p} for p in chunk.pairs]
        )
        lines = [
            self._encode({"text": text, **pair, **vars(prediction)})
            for text, pair, prediction in zip(chunk.texts, pairs, found, strict=True)
        ]
        return Answered(
            lines=b"".join(line + b"\n" for line in lines),
            rows=len(found),
            labels=dict(Counter(prediction.label for prediction in found)),
            heads=sum(prediction.heads for prediction in found),
            macs=sum(prediction.macs for prediction in found),
            dense_macs=sum(prediction.dense_macs for prediction in found),
            precision=self.precision,
        )


def classify_rows(asked: Asked, rows: Iterable[Row], workers: int) -> Iterator[Answered]:
    """Classify rows of any number in bounded memory; the answers come in the order of the rows.

    A single chunk, or `workers` 1, is computed in this process.

    Raises:
        CheckpointError, PolicyError, DataError: as the checkpoint and the rows do.
        WorkerError: a worker died.
    """
    chunks = _chunks(iter(rows))
    first = list(islice(chunks, 2))
    if len(first) < 2 or workers == 1:
        answerer = Answerer(asked) if first else None
        for chunk in chain(first, chunks):
            assert answerer is not None
            yield answerer.answer(chunk)
        return
    from budgetformer.bulk.workers import Workers

    with Workers(asked, workers) as pool:
        yield from pool.answer(chain(first, chunks))


def _chunks(rows: Iterator[Row]) -> Iterator[Chunk]:
    while some := list(islice(rows, CHUNK_ROWS)):
        texts = [text for text, _ in some]
        pairs = [pair for _, pair in some if pair is not None]
        yield Chunk(texts, pairs or None)
