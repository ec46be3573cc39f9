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
        label, score: most probable label and its probability.
        probs: probabilities [C] in label order.
        budget: ladder step that answered.
        predicted: step that f_o predicted to answer; None if the layers decide the budgets.
        steps: steps that ran, in order.
        heads: heads computed, summed over layers and steps.
        macs, dense_macs: multiply-adds executed, and those of the dense network.
        tokens: number of tokens that the encoder read.
        truncated: whether the text has more tokens.
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
    """A loaded checkpoint that classifies texts in this process."""

    def __init__(
        self, path: Path | str, device: str = "cpu", precision: Precision = "auto"
    ) -> None:
        """Load a checkpoint.

        Args:
            path: folder `<name>/<version>`, or `<name>` for the highest version.
            device: torch device, such as "cpu" or "cuda".
            precision: precision of the matrix products; "auto" chooses as the server does.

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
            self._prediction(items, index, *of_text)
            for index, of_text in enumerate(zip(probs.tolist(), encoded, strict=True))
        ]

    def _prediction(
        self, items: Items, index: int, probs: list[float], tokens: Tokens
    ) -> Prediction:
        best = max(range(len(probs)), key=probs.__getitem__)
        predicted = int(items.predicted[index])
        return Prediction(
            label=self.checkpoint.manifest.labels[best],
            score=probs[best],
            probs=probs,
            budget=int(items.step[index]),
            predicted=None if predicted == cascade.LAYERWISE else predicted,
            steps=items.steps(index),
            heads=int(items.total_heads[index]),
            macs=int(items.macs[index]),
            dense_macs=int(items.dense_macs[index]),
            tokens=len(tokens),
            truncated=tokens.truncated,
        )


def _version_folder(path: Path) -> Path:
    if (path / "manifest.json").exists() or not path.is_dir():
        return path
    versions = [p for p in path.iterdir() if p.name.isdecimal()]
    return max(versions, key=lambda p: int(p.name), default=path)


def _batches(lengths: Array, texts: list[int]) -> Iterator[list[int]]:
    """Group the indices of texts of similar length, at most `MAX_BATCH_TOKENS` per batch."""
    batch: list[int] = []
    tokens = 0
    for text in sorted(texts, key=lengths.__getitem__):
        if batch and tokens + lengths[text] > MAX_BATCH_TOKENS:
            yield sorted(batch)
            batch, tokens = [], 0
        batch.append(text)
        tokens += int(lengths[text])
    if batch:
        yield sorted(batch)
