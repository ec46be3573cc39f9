"""Rows to answers: here if they are few, in one process per core if they are many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice

from budgetformer.bulk.answerer import Answered, Answerer, Asked, Chunk
from budgetformer.tables import Row

CHUNK_ROWS = 1024
"""Rows that go to a worker at once: enough for full batches of each ladder step."""


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
    # Not above: a worker runs that module, which its package must not have imported before.
    from budgetformer.bulk.workers import Workers

    with Workers(asked, workers) as pool:
        yield from pool.answer(chain(first, chunks))


def _chunks(rows: Iterator[Row]) -> Iterator[Chunk]:
    while some := list(islice(rows, CHUNK_ROWS)):
        texts = [text for text, _ in some]
        pairs = [pair for _, pair in some if pair is not None]
        yield Chunk(texts, pairs or None)
