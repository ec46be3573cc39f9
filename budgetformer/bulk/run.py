"""Classify rows: few in this process, many in worker processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, islice

from budgetformer.bulk.answerer import Answerer, Asked
from budgetformer.bulk.chunks import Answered, chunks_of
from budgetformer.tables import Row

CHUNK_ROWS = 1024
"""Rows per chunk: enough for full batches at each ladder step."""


def classify_rows(asked: Asked, rows: Iterable[Row], workers: int) -> Iterator[Answered]:
    """Classify any number of rows in bounded memory; yield the answers in the order of the rows.

    If there is only one chunk or one worker, this process computes the answers.

    Raises:
        CheckpointError: the checkpoint is damaged.
        PolicyError: the checkpoint does not offer the quality or the heads.
        DataError: a row cannot be read.
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
    # Imported here because workers run this module with `python -m`, and Python warns if importing
    # the package has imported the module already.
    from budgetformer.bulk.workers import Workers

    with Workers(asked, workers) as pool:
        yield from pool.answer(chain(first, chunks))
