"""Rows to answers in this process, a chunk at a time; workers do the same elsewhere."""

from __future__ import annotations

from pathlib import Path

import msgspec

from budgetformer.bulk.chunks import Answered, Chunk
from budgetformer.inference.precision import Precision


class Asked(msgspec.Struct, frozen=True):
    """What rows are classified with: a checkpoint folder and the arguments of `Classifier`."""

    path: str
    quality: str | float | None
    heads: int | None = None
    precision: Precision = "auto"


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

    @property
    def precision(self) -> Precision:
        """The precision that was chosen."""
        chosen: Precision = msgspec.convert(self._classifier.network.precision, Precision)
        return chosen

    def answer(self, chunk: Chunk) -> Answered:
        """Classify the rows of a chunk."""
        asked = self._asked
        found = self._classifier(chunk.texts, chunk.pairs, asked.quality, asked.heads)
        answers = [
            row | vars(prediction) for row, prediction in zip(chunk.rows(), found, strict=True)
        ]
        return Answered.of(answers, self.precision)
