"""Measure accuracy and cost on a set of texts, in this process or through a running server."""

from __future__ import annotations

import json
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from budgetformer.checkpoint.manifest import FULL
from budgetformer.checkpoint.store import Checkpoint
from budgetformer.classifier import Classifier
from budgetformer.errors import BudgetFormerError, DataError
from budgetformer.inference.policy import QUALITY_NAMES
from budgetformer.proxies import is_loopback
from budgetformer.tables import find_table
from budgetformer.training.data import Examples, has_labels, read_examples, read_texts
from budgetformer.wilson import interval

HTTP_BATCH = 64


@dataclass(frozen=True)
class Answer:
    """The answer for one text, and its cost.

    Attributes:
        labels: indices of the predicted labels; exactly one unless multi-label.
        budget: ladder step that answered.
        heads: heads computed, summed over layers and steps.
        macs, dense_macs: multiply-adds executed, and those of the dense network.
    """

    labels: tuple[int, ...]
    budget: int
    heads: int
    macs: int
    dense_macs: int


AnswerFunction = Callable[[Examples, str | None], list[Answer]]
"""Function that answers all texts at a quality level; None: at the full budget."""


@dataclass(frozen=True)
class Row:
    """The results of one quality level; shares are 0..1.

    Attributes:
        quality: name of the level, or `FULL`.
        rows: number of texts.
        accuracy: share of correct answers; None if the texts have no labels.
        low, high: 95 % interval of the accuracy; None if the texts have no labels.
        mean_heads: mean heads per text, summed over layers and steps.
        macs_share: multiply-adds as a share of the dense network's.
        mean_macs: mean multiply-adds per text.
        budgets: share of the texts that ended at each step.
        agreement: share of the answers that equal those at the full budget.
        cheaper: number of texts with fewer multiply-adds than at the previous level; policies
            ensure 0.
    """

    quality: str
    rows: int
    accuracy: float | None
    low: float | None
    high: float | None
    mean_heads: float
    macs_share: float
    mean_macs: float
    budgets: dict[int, float]
    agreement: float
    cheaper: int

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)

    def cells(self) -> tuple[str, ...]:
        """Return the cells of a table row."""
        return (
            self.quality,
            "" if self.accuracy is None else f"{self.accuracy:.4f}",
            "" if self.accuracy is None else f"{self.low:.3f}..{self.high:.3f}",
            f"{self.agreement:.4f}",
            f"{self.mean_heads:.1f}",
            f"{self.mean_macs / 1e6:.1f} M",
            f"{self.macs_share:.1%}",
        )


def read_test(checkpoint: Checkpoint, data: Path, limit: int | None = None) -> Examples:
    """Read test texts, with labels if the file has a column `label`.

    Args:
        checkpoint: checkpoint that defines the labels.
        data: a file, or a folder with `test.*`.
        limit: maximum number of rows, evenly spaced; None: all.

    Raises:
        DataError: the file has no rows, or a label that the checkpoint does not have.
    """
    path = find_table(data, "test") if data.is_dir() else data
    if path is None:
        raise DataError(f"{data}: the folder has no test.parquet, test.csv or test.jsonl")
    if not has_labels(path):
        return read_texts(path).evenly(limit)
    labels = list(checkpoint.manifest.labels)
    return read_examples(path, labels, multi_label=checkpoint.multi_label).evenly(limit)


def evaluate_checkpoint(
    checkpoint: Checkpoint, examples: Examples, answer: AnswerFunction | None = None
) -> list[Row]:
    """Score every quality level, then the full budget, on texts with or without labels.

    Args:
        checkpoint: checkpoint that defines the levels and labels.
        examples: texts to answer.
        answer: function that answers the texts; None: run the checkpoint in this process.
    """
    answer = answer or in_process(Classifier(checkpoint.path))
    levels = [name for name in QUALITY_NAMES if name in checkpoint.manifest.named_levels]
    answers = [answer(examples, level) for level in [*levels, None]]
    lower = [answers[0], *answers[:-1]]
    return [
        _row(name, of_level, below, answers[-1], examples)
        for name, of_level, below in zip([*levels, FULL], answers, lower, strict=True)
    ]


def in_process(classifier: Classifier) -> AnswerFunction:
    """Return a function that answers with a classifier in this process."""
    multi_label = classifier.checkpoint.multi_label

    def answer(examples: Examples, level: str | None) -> list[Answer]:
        heads = classifier.checkpoint.num_heads if level is None else None
        predictions = classifier(examples.texts, examples.pairs, level, heads)
        return [
            Answer(_predicted(p.probs, multi_label), p.budget, p.heads, p.macs, p.dense_macs)
            for p in predictions
        ]

    return answer


def through_http(url: str, checkpoint: Checkpoint) -> AnswerFunction:
    """Return a function that answers with `POST /classify` of the server at `url`.

    The function raises `BudgetFormerError` if the server cannot be reached or returns an error.
    """
    multi_label = checkpoint.multi_label

    def answer(examples: Examples, level: str | None) -> list[Answer]:
        budget: dict[str, Any] = {"quality": level} if level else {"heads": checkpoint.num_heads}
        answers: list[Answer] = []
        for start in range(0, len(examples), HTTP_BATCH):
            rows = slice(start, start + HTTP_BATCH)
            items: list[Any] = examples.texts[rows]
            if examples.pairs is not None:
                items = [
                    {"text": a, "text_pair": b}
                    for a, b in zip(examples.texts[rows], examples.pairs[rows], strict=True)
                ]
            body = {"input": items, "model": checkpoint.label, "timeout_ms": 120_000, **budget}
            for item in _post(f"{url.rstrip('/')}/classify", body)["data"]:
                if "error" in item:
                    raise BudgetFormerError(f"{url}: item {start + item['index']}: {item['error']}")
                heads = item["heads"]
                answers.append(
                    Answer(
                        _predicted(item["probs"], multi_label),
                        heads["budget"],
                        heads["used"],
                        item["macs"],
                        item["dense_macs"],
                    )
                )
        return answers

    return answer


def _post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    # A proxy cannot reach a server on this host.
    proxies = urllib.request.ProxyHandler({} if is_loopback(url) else None)
    try:
        with urllib.request.build_opener(proxies).open(request, timeout=180) as response:
            return json.load(response)
    except (OSError, ValueError) as error:
        raise BudgetFormerError(f"{url}: {error}") from error


def _predicted(probs: Sequence[float], multi_label: bool) -> tuple[int, ...]:
    if multi_label:
        return tuple(i for i, p in enumerate(probs) if p > 0.5)
    return (max(range(len(probs)), key=probs.__getitem__),)


def _row(
    quality: str,
    answers: list[Answer],
    lower: list[Answer],
    full: list[Answer],
    examples: Examples,
) -> Row:
    """Return the results of a level, compared with the next lower level and the full budget."""
    count = len(answers)
    accuracy = low = high = None
    if len(examples.labels):
        if examples.multi_label:
            truth = [tuple(np.flatnonzero(row).tolist()) for row in examples.labels]
        else:
            truth = [(int(label),) for label in examples.labels]
        accuracy = sum(a.labels == right for a, right in zip(answers, truth, strict=True)) / count
        low, high = interval(accuracy, count)
    macs = sum(a.macs for a in answers)
    budgets = Counter(a.budget for a in answers)
    return Row(
        quality=quality,
        rows=count,
        accuracy=accuracy,
        low=low,
        high=high,
        mean_heads=sum(a.heads for a in answers) / count,
        macs_share=macs / sum(a.dense_macs for a in answers),
        mean_macs=macs / count,
        budgets={step: budgets[step] / count for step in sorted(budgets)},
        agreement=sum(a.labels == f.labels for a, f in zip(answers, full, strict=True)) / count,
        cheaper=sum(a.macs < b.macs for a, b in zip(answers, lower, strict=True)),
    )
