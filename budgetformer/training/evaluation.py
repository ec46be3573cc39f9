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
class Verdict:
    """The answer for one text: label indices, ladder step, heads, multiply-adds."""

    labels: tuple[int, ...]
    budget: int
    heads: int
    macs: int
    dense_macs: int


Ask = Callable[[Examples, str | None], list[Verdict]]
"""Answers all texts at a quality level; None: at the full budget."""


@dataclass(frozen=True)
class Row:
    """One line of the report; shares are 0..1.

    `accuracy` and its interval are None if the texts have no labels. `budgets` is the share of
    texts that ended at each step, and `agreement` the share of answers equal to the full budget's.
    `cheaper` counts texts with fewer multiply-adds than at the previous level; policies ensure 0.
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
        """Return plain values."""
        return asdict(self)

    def cells(self) -> tuple[str, ...]:
        """Return the cells of the line in a table."""
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
    """Read texts with a checkpoint's labels, or without if the file has no column `label`.

    Args:
        checkpoint: defines the labels.
        data: a file, or a folder with `test.*`.
        limit: maximum rows, evenly chosen.

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
    checkpoint: Checkpoint, examples: Examples, ask: Ask | None = None
) -> list[Row]:
    """Score every quality level, then the full budget, on texts with or without labels.

    Args:
        checkpoint: defines the levels and labels.
        examples: the texts.
        ask: answers texts; None: the checkpoint, in this process.
    """
    answer = ask or in_process(Classifier(checkpoint.path))
    names = [name for name in QUALITY_NAMES if name in checkpoint.manifest.named_levels]
    found = [(name or FULL, answer(examples, name)) for name in [*names, None]]
    full = found[-1][1]
    before = [found[0][1], *(verdicts for _, verdicts in found)]
    return [
        _row(name, verdicts, lower, full, examples)
        for (name, verdicts), lower in zip(found, before, strict=False)
    ]


def in_process(classifier: Classifier) -> Ask:
    """Return a function that answers with a classifier in this process."""
    many = classifier.checkpoint.multi_label

    def ask(examples: Examples, level: str | None) -> list[Verdict]:
        heads = classifier.checkpoint.num_heads if level is None else None
        predictions = classifier(examples.texts, examples.pairs, level, heads)
        return [
            Verdict(_chosen(p.probs, many), p.budget, p.heads, p.macs, p.dense_macs)
            for p in predictions
        ]

    return ask


def through_http(url: str, checkpoint: Checkpoint) -> Ask:
    """Return a function that answers with `POST /classify` of the server at `url`.

    The function raises `BudgetFormerError` if the server cannot be reached or answers an error.
    """
    many = checkpoint.multi_label

    def ask(examples: Examples, level: str | None) -> list[Verdict]:
        extra: dict[str, Any] = {"quality": level} if level else {"heads": checkpoint.num_heads}
        verdicts: list[Verdict] = []
        for start in range(0, len(examples), HTTP_BATCH):
            rows = slice(start, start + HTTP_BATCH)
            items: list[Any] = examples.texts[rows]
            if examples.pairs is not None:
                items = [
                    {"text": a, "text_pair": b}
                    for a, b in zip(examples.texts[rows], examples.pairs[rows], strict=True)
                ]
            body = {"input": items, "model": checkpoint.label, "timeout_ms": 120_000, **extra}
            for item in _post(f"{url.rstrip('/')}/classify", body)["data"]:
                if "error" in item:
                    raise BudgetFormerError(f"{url}: item {start + item['index']}: {item['error']}")
                used = item["heads"]
                verdicts.append(
                    Verdict(
                        _chosen(item["probs"], many),
                        used["budget"],
                        used["used"],
                        item["macs"],
                        item["dense_macs"],
                    )
                )
        return verdicts

    return ask


def _post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    # Proxy variables apply, unless the server is on this host.
    proxies = urllib.request.ProxyHandler({} if is_loopback(url) else None)
    try:
        with urllib.request.build_opener(proxies).open(request, timeout=180) as response:
            return json.load(response)
    except (OSError, ValueError) as error:
        raise BudgetFormerError(f"{url}: {error}") from error


def _chosen(probs: Sequence[float], many: bool) -> tuple[int, ...]:
    if many:
        return tuple(i for i, p in enumerate(probs) if p > 0.5)
    return (max(range(len(probs)), key=probs.__getitem__),)


def _row(
    quality: str,
    verdicts: list[Verdict],
    lower: list[Verdict],
    full: list[Verdict],
    examples: Examples,
) -> Row:
    count = len(verdicts)
    accuracy = low = high = None
    if len(examples.labels):
        if examples.multi_label:
            truth = [tuple(np.flatnonzero(row).tolist()) for row in examples.labels]
        else:
            truth = [(int(label),) for label in examples.labels]
        accuracy = sum(v.labels == right for v, right in zip(verdicts, truth, strict=True)) / count
        low, high = interval(accuracy, count)
    macs = sum(v.macs for v in verdicts)
    budgets = Counter(v.budget for v in verdicts)
    return Row(
        quality=quality,
        rows=count,
        accuracy=accuracy,
        low=low,
        high=high,
        mean_heads=sum(v.heads for v in verdicts) / count,
        macs_share=macs / sum(v.dense_macs for v in verdicts),
        mean_macs=macs / count,
        budgets={step: budgets[step] / count for step in sorted(budgets)},
        agreement=sum(v.labels == f.labels for v, f in zip(verdicts, full, strict=True)) / count,
        cheaper=sum(v.macs < less.macs for v, less in zip(verdicts, lower, strict=True)),
    )
