"""Rows in chunks, their answers, and what these add up to; whoever answers a chunk is a parameter.

Importing this is light: no torch.
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
    """Some rows in their order."""

    texts: list[str]
    pairs: list[str] | None

    @classmethod
    def of(cls, rows: list[Row]) -> Chunk:
        """Return rows as a chunk."""
        pairs = [pair for _, pair in rows if pair is not None]
        return cls([text for text, _ in rows], pairs or None)

    def rows(self) -> list[dict[str, str]]:
        """Return the columns of each row as a result repeats them."""
        if self.pairs is None:
            return [{"text": text} for text in self.texts]
        both = zip(self.texts, self.pairs, strict=True)
        return [{"text": text, "text_pair": pair} for text, pair in both]


class Answered(msgspec.Struct, frozen=True):
    """The answers to a chunk: a line of JSON for each row, and what they add up to."""

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
        """Return the answers to rows; one with an `error` failed and has no label."""
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
    """What many answers add up to."""

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
        """Heads of an answered row, summed over layers."""
        return self.heads / max(self.rows - self.failed, 1)

    @property
    def macs_share(self) -> float:
        """Multiply-adds spent, as a share of the dense network's."""
        return self.macs / max(self.dense_macs, 1)


def chunks_of(rows: Iterator[Row], size: Callable[[], int]) -> Iterator[Chunk]:
    """Cut rows into chunks; `size` is asked before each how many rows it is to have."""
    while some := list(islice(rows, size())):
        yield Chunk.of(some)


def answer_in_order(
    chunks: Iterable[Chunk], answer: Callable[[Chunk], Future[Answered]], at_once: int
) -> Iterator[Answered]:
    """Have chunks answered, at most `at_once` of them at a time, and yield the answers in order.

    What is still being answered when the caller stops is cancelled.
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
