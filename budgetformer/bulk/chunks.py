"""Chunks of rows, their answers and totals; the function that answers a chunk is a parameter.

This module does not import torch.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import msgspec

from budgetformer.inference.precision import Precision
from budgetformer.tables import Row


class Chunk(msgspec.Struct, frozen=True):
    """Consecutive rows.

    Attributes:
        texts: text of each row.
        pairs: second text of each row; None: the rows are no pairs.
    """

    texts: list[str]
    pairs: list[str] | None

    @classmethod
    def of(cls, rows: list[Row]) -> Chunk:
        """Return a chunk of these rows."""
        pairs = [pair for _, pair in rows if pair is not None]
        return cls([text for text, _ in rows], pairs or None)

    def rows(self) -> list[dict[str, str]]:
        """Return the input columns of each row, which the result repeats."""
        if self.pairs is None:
            return [{"text": text} for text in self.texts]
        both = zip(self.texts, self.pairs, strict=True)
        return [{"text": text, "text_pair": pair} for text, pair in both]


class Answered(msgspec.Struct, frozen=True):
    """The answers to a chunk.

    Attributes:
        lines: answers as JSON, one line per row.
        rows: number of rows.
        labels: number of rows by label.
        heads: heads computed, summed over rows and layers.
        macs: multiply-adds computed.
        dense_macs: multiply-adds of the dense network.
        precision: precision of the pass.
        failed: number of rows that got an error instead of a label.
    """

    lines: bytes
    rows: int
    labels: dict[str, int]
    heads: int
    macs: int
    dense_macs: int
    precision: Precision = "auto"
    failed: int = 0

    @classmethod
    def of(cls, answers: list[dict[str, Any]], precision: Precision = "auto") -> Answered:
        """Encode and count answers; an answer with an `error` counts as failed."""
        totals = Totals()
        for answer in answers:
            totals.add_row(answer)
        lines = b"".join(_encode(answer) + b"\n" for answer in answers)
        return cls(
            lines, totals.rows, dict(totals.labels), totals.heads, totals.macs, totals.dense_macs,
            precision, totals.failed,
        )  # fmt: skip


@dataclass
class Totals:
    """The sums over many answers; see `Answered`."""

    rows: int = 0
    failed: int = 0
    labels: Counter[str] = field(default_factory=Counter)
    heads: int = 0
    macs: int = 0
    dense_macs: int = 0

    def add(self, answered: Answered) -> None:
        """Count the answers to a chunk."""
        self.rows += answered.rows
        self.failed += answered.failed
        self.labels.update(answered.labels)
        self.heads += answered.heads
        self.macs += answered.macs
        self.dense_macs += answered.dense_macs

    def add_row(self, answer: Mapping[str, Any]) -> None:
        """Count the answer to one row."""
        self.rows += 1
        if answer.get("error") is not None:
            self.failed += 1
            return
        self.labels[answer["label"]] += 1
        self.heads += answer["heads"]
        self.macs += answer["macs"]
        self.dense_macs += answer["dense_macs"]

    @property
    def mean_heads(self) -> float:
        """Mean heads per answered row, summed over layers."""
        return self.heads / max(self.rows - self.failed, 1)

    @property
    def macs_share(self) -> float:
        """Multiply-adds spent, as a share of the dense network's."""
        return self.macs / max(self.dense_macs, 1)


def chunks_of(rows: Iterator[Row], size: Callable[[], int]) -> Iterator[Chunk]:
    """Split rows into chunks; `size` returns the number of rows of the next chunk."""
    while chunk := list(islice(rows, size())):
        yield Chunk.of(chunk)


def answer_in_order(
    chunks: Iterable[Chunk], answer: Callable[[Chunk], Future[Answered]], at_once: int
) -> Iterator[Answered]:
    """Answer chunks concurrently, at most `at_once` at a time; yield the answers in order.

    If the caller stops the iteration, pending chunks are cancelled.
    """
    waiting: deque[Future[Answered]] = deque()
    try:
        for chunk in chunks:
            waiting.append(answer(chunk))
            if len(waiting) >= at_once:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


_encode = msgspec.json.Encoder().encode
