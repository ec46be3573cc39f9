"""Rows to answers: here if they are few, in one process per core if they are many."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, islice

from budgetformer.bulk.answerer import Answerer, Asked
from budgetformer.bulk.chunks import Answered, chunks_of
from budgetformer.tables import Row

CHUNK_ROWS = 1024
"""Rows that go to a worker at once: enough for full batches of each ladder step."""


def classify_rows(asked: Asked, rows: Iterable[Row], workers: int) -> Iterator[Answered]:
    """Classify rows of any number in bounded memory; the answers come in the order of the rows.

    A single chunk, or `workers` 1, is computed in this process.

    Raises:
        CheckpointError, PolicyError, DataError: as the checkpoint and the rows do.
        WorkerError: a worker died.
    """
    chunks = chunks_of(iter(rows), lambda: CHUNK_ROWS)
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
