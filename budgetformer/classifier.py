"""Classify texts in this process, with the engine's own passes and without a server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from budgetformer.checkpoint.loading import load_network
from budgetformer.checkpoint.store import load_encoder, read_checkpoint
from budgetformer.inference import cascade
from budgetformer.inference.cascade import Work
from budgetformer.inference.precision import Precision
from budgetformer.model.answers import probabilities

MAX_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Prediction:
    """The answer for one text, and what it cost.

    Attributes:
        label, score: the best label.
        probs: [C] in label order.
        budget: the ladder step that answered.
        predicted: the step that f_o expected to answer; None where every layer decides for itself.
        steps: all steps that ran, in order.
        heads: heads computed, summed over layers and steps.
        macs, dense_macs: multiply-adds executed, and those of the full network.
        tokens: tokens that were read.
        truncated: whether the text was longer than the model reads.
    """

    label: str
    score: float
    probs: list[float]
    budget: int
    predicted: int | None
    steps: list[int]
    heads: int
    macs: int
    dense_macs: int
    tokens: int
    truncated: bool


class Classifier:
    """A checkpoint, ready to classify."""

    def __init__(
        self, path: Path | str, device: str = "cpu", precision: Precision = "auto"
    ) -> None:
        """Load the checkpoint folder `path`: `<name>/<version>`, or `<name>` for the highest one.

        `precision` "auto" takes what is fastest here, as the server does.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        self.checkpoint = read_checkpoint(_version_folder(Path(path)))
        self.network = load_network(self.checkpoint, device, precision)
        self.encoder = load_encoder(self.checkpoint)

    def __call__(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None = None,
        quality: str | float | None = "balanced",
        heads: int | None = None,
        max_heads: int | None = None,
    ) -> list[Prediction]:
        """Classify texts, or text pairs; the budget arguments are those of `Checkpoint.rule`.

        Raises:
            PolicyError: as `Checkpoint.rule` does.
            TokenizerError: the tokenizer fails at a text.
        """
        rule = self.checkpoint.rule(quality, heads, max_heads)
        inputs = list(texts) if pairs is None else list(zip(texts, pairs, strict=True))
        encoded = self.encoder.encode(inputs)
        items = [Work.of(tokens, rule) for tokens in encoded]
        cascade.answer(self.network, items, _batches)
        return [
            self._prediction(item, tokens.truncated)
            for item, tokens in zip(items, encoded, strict=True)
        ]

    def _prediction(self, item: Work, truncated: bool) -> Prediction:
        assert item.logits is not None
        probs = probabilities(item.logits, self.checkpoint.manifest.problem_type).tolist()
        best = max(range(len(probs)), key=probs.__getitem__)
        return Prediction(
            label=self.checkpoint.manifest.labels[best],
            score=probs[best],
            probs=probs,
            budget=item.step,
            predicted=None if item.predicted == cascade.LAYERWISE else item.predicted,
            steps=item.steps,
            heads=sum(item.heads),
            macs=item.macs,
            dense_macs=item.dense_macs,
            tokens=len(item.ids),
            truncated=truncated,
        )


def _version_folder(path: Path) -> Path:
    if (path / "manifest.json").exists() or not path.is_dir():
        return path
    versions = [p for p in path.iterdir() if p.name.isdecimal()]
    return max(versions, key=lambda p: int(p.name), default=path)


def _batches(items: Sequence[Work]) -> Iterator[list[Work]]:
    """Group items of like length into batches of at most `MAX_BATCH_TOKENS` tokens."""
    batch: list[Work] = []
    tokens = 0
    for item in sorted(items, key=lambda item: len(item.ids)):
        if batch and tokens + len(item.ids) > MAX_BATCH_TOKENS:
            yield batch
            batch, tokens = [], 0
        batch.append(item)
        tokens += len(item.ids)
    if batch:
        yield batch
