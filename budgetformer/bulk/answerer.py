"""Answer chunks of rows in this process, with a checkpoint."""

from __future__ import annotations

from pathlib import Path

import msgspec

from budgetformer.bulk.chunks import Answered, Chunk
from budgetformer.inference.precision import Precision


class Asked(msgspec.Struct, frozen=True):
    """The checkpoint and the options with which rows are classified; see `Classifier`.

    Attributes:
        path: folder of the checkpoint.
        quality: quality level, or allowed accuracy drop in points.
        heads: fixed budget in heads, which overrides `quality`.
        precision: precision of the pass.
    """

    path: str
    quality: str | float | None
    heads: int | None = None
    precision: Precision = "auto"


class Answerer:
    """A loaded checkpoint that answers chunks."""

    def __init__(self, asked: Asked) -> None:
        """Load the checkpoint.

        Raises:
            CheckpointError: the checkpoint is damaged.
            PolicyError: the checkpoint does not offer the quality or the heads.
        """
        from budgetformer.classifier import Classifier

        self._asked = asked
        self._classifier = Classifier(Path(asked.path), precision=asked.precision)
        self._classifier.checkpoint.rule(asked.quality, asked.heads)

    @property
    def precision(self) -> Precision:
        """Precision in which the checkpoint was loaded."""
        chosen: Precision = msgspec.convert(self._classifier.network.precision, Precision)
        return chosen

    def answer(self, chunk: Chunk) -> Answered:
        """Classify the rows of a chunk."""
        asked = self._asked
        predictions = self._classifier(chunk.texts, chunk.pairs, asked.quality, asked.heads)
        answers = [
            row | vars(prediction)
            for row, prediction in zip(chunk.rows(), predictions, strict=True)
        ]
        return Answered.of(answers, self.precision)
