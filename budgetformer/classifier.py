"""Classify texts in this process without a server, with the same passes as an engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from budgetformer.checkpoint.loading import load_network
from budgetformer.checkpoint.store import load_encoder, read_checkpoint
from budgetformer.inference import cascade
from budgetformer.inference.cascade import Items
from budgetformer.inference.precision import Precision
from budgetformer.inference.texts import Texts
from budgetformer.model.answers import probabilities
from budgetformer.model.tfidf import Array
from budgetformer.tokenization import Tokens

MAX_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Prediction:
    """The answer for one text, and its cost.

    Attributes:
        label, score: the best label and its probability.
        probs: probabilities [C] in label order.
        budget: the ladder step that answered.
        predicted: the step that f_o expected to answer; None if the layers decide the budgets.
        steps: all steps that ran, in order.
        heads: heads computed, summed over layers and steps.
        macs, dense_macs: multiply-adds executed, and those of the dense network.
        tokens: tokens that the encoder reads.
        truncated: whether the text was longer than that.
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
        """Load a checkpoint.

        Args:
            path: folder `<name>/<version>`, or `<name>` for the highest version.
            device: such as "cpu" or "cuda".
            precision: of the matrix products; "auto" chooses as the server does.

        Raises:
            CheckpointError: there is no checkpoint, or it is damaged.
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
            PolicyError: see `Checkpoint.rule`.
            TokenizerError: the tokenizer fails on a text.
        """
        rule = self.checkpoint.rule(quality, heads, max_heads)
        inputs = list(texts) if pairs is None else list(zip(texts, pairs, strict=True))
        encoded = self.encoder.encode(inputs)
        tokens = Texts.of(encoded)
        items = cascade.answer(self.network, tokens, rule, partial(_batches, tokens.window.lengths))
        probs = probabilities(torch.from_numpy(items.logits), self.checkpoint.manifest.problem_type)
        return [
            self._prediction(items, place, own, text)
            for place, (own, text) in enumerate(zip(probs.tolist(), encoded, strict=True))
        ]

    def _prediction(
        self, items: Items, place: int, probs: list[float], tokens: Tokens
    ) -> Prediction:
        best = max(range(len(probs)), key=probs.__getitem__)
        predicted = int(items.predicted[place])
        return Prediction(
            label=self.checkpoint.manifest.labels[best],
            score=probs[best],
            probs=probs,
            budget=int(items.step[place]),
            predicted=None if predicted == cascade.LAYERWISE else predicted,
            steps=items.steps(place),
            heads=int(items.total_heads[place]),
            macs=int(items.macs[place]),
            dense_macs=int(items.dense_macs[place]),
            tokens=len(tokens),
            truncated=tokens.truncated,
        )


def _version_folder(path: Path) -> Path:
    if (path / "manifest.json").exists() or not path.is_dir():
        return path
    versions = [p for p in path.iterdir() if p.name.isdecimal()]
    return max(versions, key=lambda p: int(p.name), default=path)


def _batches(lengths: Array, places: list[int]) -> Iterator[list[int]]:
    """Group texts of like length into batches of at most `MAX_BATCH_TOKENS` tokens."""
    batch: list[int] = []
    tokens = 0
    for place in sorted(places, key=lengths.__getitem__):
        if batch and tokens + lengths[place] > MAX_BATCH_TOKENS:
            yield sorted(batch)
            batch, tokens = [], 0
        batch.append(place)
        tokens += int(lengths[place])
    if batch:
        yield sorted(batch)
