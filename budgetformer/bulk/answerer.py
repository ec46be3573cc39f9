"""Rows to answers in this process, a chunk at a time; workers do the same elsewhere."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import msgspec

from budgetformer.inference.precision import Precision


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
