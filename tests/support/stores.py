"""A small model store, trained once per test session on sentences from templates."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable
from functools import cache
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from budgetformer.checkpoint.manifest import Manifest, file_entries, write_manifest
from budgetformer.checkpoint.store import read_checkpoint
from budgetformer.classifier import Classifier
from budgetformer.inference import cascade
from budgetformer.inference.cascade import Batch, Items, Part
from budgetformer.inference.policy import (
    BudgetRule,
    EntryBand,
    Level,
    OperatingPoint,
    Policy,
    QualityName,
)
from budgetformer.inference.texts import Texts
from budgetformer.model.answers import confidence
from budgetformer.training.data import Examples
from budgetformer.training.pipeline import train_checkpoint
from budgetformer.training.recipe import Recipe
from tests.support.texts import tokenizer_for

LABELS = ("animals", "music", "weather")
LAYERS, HEADS = 2, 4
MAX_TOKENS, EXIT_TOKENS = 32, 256
TOPICS, TAGS, PAIRS, PICKY = "topics", "tags", "pairs", "picky"
"""Single-label (2 versions), multi-label, text pairs; PICKY: no step 0, heads selected by input."""
CHAINED = "chained"
"""The network of version 2 of TOPICS, with a policy for a chain of several steps."""
CHAIN = (0, 1, 2)

_WORDS = {
    "animals": (
        ["The otter", "A young fox", "Our old donkey"],
        ["slept under", "ran past"],
        "the hedge",
    ),
    "music": (
        ["The cellist", "A choir", "This drummer"],
        ["rehearsed beside", "tuned near"],
        "the organ",
    ),
    "weather": (
        ["A cold front", "The drizzle", "Thick fog"],
        ["settled over", "drifted off"],
        "the coast",
    ),
}
_ENDINGS = ("", " at dawn", " again", " for three long days", " while nobody looked", " once more")

_TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_layers": LAYERS,
    "num_heads": HEADS,
    "intermediate_size": 64,
    "vocab_size": 200,
    "max_length": MAX_TOKENS,
    "exit_tokens": EXIT_TOKENS,
    "learning_rate": 5e-3,
    "batch_size": 16,
    "dense_epochs": 6,
    "budget_epochs": 4,
    "exit_folds": 2,
    "exit_weights": 300,
    "hold_out": 0.25,
}


def sentences(label: str) -> list[str]:
    """Return 36 sentences of one class."""
    who, did, where = _WORDS[label]
    return [f"{a} {b} {where}{c}." for a, b, c in product(who, did, _ENDINGS)]


def labelled_sentences() -> list[tuple[str, str]]:
    """Return all sentences with their class, with alternating classes."""
    return [
        (text, label)
        for group in zip(*map(sentences, LABELS), strict=True)
        for text, label in zip(group, LABELS, strict=True)
    ]


def labelled_examples(names: list[str]) -> Examples:
    """Return the labelled sentences with the class ids of `names`."""
    rows = labelled_sentences()
    labels = np.array([names.index(label) for _, label in rows])
    return Examples([text for text, _ in rows], None, labels, names)


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Write one JSON object per line."""
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def single_label_rows() -> list[dict[str, Any]]:
    return [{"text": text, "label": label} for text, label in labelled_sentences()]


def _multi_label_rows() -> list[dict[str, Any]]:
    one = [{"text": text, "label": [label]} for text, label in labelled_sentences()]
    two = [
        {"text": f"{a} {b}", "label": ["animals", "weather"]}
        for a, b in zip(sentences("animals"), sentences("weather"), strict=True)
    ]
    return [row for group in zip(one[::3], one[1::3], two, strict=True) for row in group]


def _pair_rows() -> list[dict[str, Any]]:
    animals, music = sentences("animals"), sentences("music")
    same = [
        {"text": a, "text_pair": b, "label": "same"}
        for a, b in zip(animals, animals[1:], strict=False)
    ]
    other = [
        {"text": a, "text_pair": b, "label": "other"} for a, b in zip(animals, music, strict=True)
    ]
    return [row for group in zip(same, other, strict=False) for row in group]


def train(output: Path, rows: list[dict[str, Any]], **recipe: Any) -> None:
    """Train the checkpoint folder `output` (`<store>/<name>/<version>`) on some rows."""
    scratch = output.parents[2]
    work = scratch / f"{output.parent.name}-{output.name}.work"
    work.mkdir(parents=True)
    texts = (row[field] for row in rows for field in ("text", "text_pair") if field in row)
    tokenizer_for(texts).save(str(work / "tokenizer.json"))
    train_checkpoint(
        data=write_jsonl(scratch / f"{output.parent.name}-{output.name}.jsonl", rows),
        output=output,
        start=None,
        recipe=Recipe(**_TINY | recipe),
        work_dir=work,
        threads=1,  # networks this small are fastest on one
        log=lambda _: None,
    )


def calibrate_by_hand(path: Path) -> None:
    """Give a checkpoint known levels: an exit, an exit with escalation, bands with escalation.

    Thresholds are medians, so that each separates about half of the sentences. The figures of
    accuracy and cost are invented, in the right order.
    """
    classifier = Classifier(path)
    texts = [text for text, _ in labelled_sentences()]
    rule = BudgetRule(num_steps=HEADS, fixed=0)
    items = Items(classifier.network, Texts.of(classifier.encoder.encode(texts)), rule)
    cascade.decide(classifier.network, Batch([Part(items, list(range(len(items))))]))
    exits = torch.from_numpy(items.logits)
    verdict = median(items.s.tolist())
    sure_of_exit = median(confidence(exits, "single_label_classification").tolist())
    sure_of_step_1 = median(prediction.score for prediction in classifier(texts, heads=1))
    levels = [
        ("fast", [(1.0, 0)], None, 8.0, 0.02),
        ("balanced", [(1.0, 0)], (sure_of_exit, 2), 2.0, 0.3),
        (None, [(1.0, 1)], None, 1.0, 0.4),
        ("best", [(verdict, 1), (1.0, 3)], (sure_of_step_1, 4), 0.0, 0.9),
    ]
    points = [
        OperatingPoint.model_validate(
            {
                "name": name,
                "entry": [{"upto": upto, "step": step} for upto, step in bands],
                "escalation": escalation and {"below": escalation[0], "step": escalation[1]},
                "accuracy": 0.9 - lost / 100,
                "points_lost": lost,
                "macs_share": share,
                "mean_heads": share * LAYERS * HEADS,
            }
        )
        for name, bands, escalation, lost, share in levels
    ]
    manifest = read_checkpoint(path).manifest
    write_manifest(
        path, manifest.model_copy(update={"policy": None, "operating_points": tuple(points)})
    )


def chain_by_hand(path: Path) -> None:
    """Give a checkpoint a policy: a chain of three steps, bands of f_o for it, and four levels.

    Thresholds are quantiles of the confidence of step 0, so that some sentences end there at the
    lower levels; that of `best` is the median for step 1, so that some run the whole chain. The
    outputs of step 0 are scaled down, because it would otherwise be certain of every sentence.
    The final steps of the sentences are counted; the other figures are invented, in the right
    order.
    """
    weights = load_file(path / "model.safetensors")
    for name in ("exit_head.scale", "exit_head.bias"):
        weights[name] *= 0.35
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    sign(path)
    classifier = Classifier(path)
    texts = [text for text, _ in labelled_sentences()]
    everyone = BudgetRule(num_steps=HEADS, chain=CHAIN, level=_level(1.0))
    tokens = Texts.of(classifier.encoder.encode(texts))
    items_at_step_0 = Items(classifier.network, tokens, everyone)
    cascade.decide(
        classifier.network, Batch([Part(items_at_step_0, list(range(len(items_at_step_0))))])
    )
    verdict = median(items_at_step_0.s.tolist())
    confident = confidence(
        torch.from_numpy(items_at_step_0.exit_logits), "single_label_classification"
    )
    entry = (EntryBand(upto=verdict, step=1), EntryBand(upto=1, step=2))
    levels = []
    of_step_1 = median(prediction.score for prediction in classifier(texts, heads=1))
    wanted: list[tuple[QualityName | None, float, float]] = [
        ("fast", float(confident.quantile(0.3)), 4.0),
        ("balanced", float(confident.quantile(0.5)), 2.0),
        (None, float(confident.quantile(0.7)), 1.0),
        ("best", max(float(confident.max()) + 1e-6, of_step_1), 0.0),
    ]
    for name, threshold, lost in wanted:
        level = _level(threshold, name, lost)
        rule = BudgetRule(num_steps=HEADS, entry=entry, chain=CHAIN, level=level)
        items = cascade.answer(classifier.network, tokens, rule)
        ends = Counter(items.step.tolist())
        runs = Counter({k: n for k, n in enumerate(items.ran.sum(0).tolist()) if k and n})
        shares = [{step: n / len(items) for step, n in sorted(c.items())} for c in (ends, runs)]
        levels.append(level.model_copy(update={"budgets": shares[0], "runs": shares[1]}))
    policy = Policy(measure="agreement", chain=CHAIN, entry=entry, levels=tuple(levels))
    changed = {"name": CHAINED, "version": 1, "policy": policy, "operating_points": ()}
    write_manifest(path, read_checkpoint(path).manifest.model_copy(update=changed))


def _level(threshold: float, name: QualityName | None = None, lost: float = 0.0) -> Level:
    return Level(
        name=name,
        threshold=threshold,
        agreement=1 - lost / 100,
        agreement_interval=(0.95 - lost / 100, 1.0),
        points_lost=lost,
        macs_share=0.5 - lost / 10,
        macs_interval=(0.05, 0.6),
        mean_heads=3.0 - lost / 2,
    )


PANICS = {
    "type": "BPE", "vocab": {"a": 0, "aa": 1}, "merges": [["a", "a"]],
    "continuing_subword_prefix": "####",
}  # fmt: skip
"""The model of a tokenizer that makes the Rust library panic when it is read."""


def sign(folder: Path) -> None:
    """Write the hashes of the present files to the manifest."""
    manifest = Manifest.model_validate_json((folder / "manifest.json").read_bytes())
    write_manifest(folder, manifest.model_copy(update={"files": file_entries(folder)}))


@cache
def _trained(root: Path) -> Path:
    store = root / "store"
    train(store / TOPICS / "1", single_label_rows(), seed=1)
    train(store / TOPICS / "2", single_label_rows(), seed=2)
    for version in ("1", "2"):
        calibrate_by_hand(store / TOPICS / version)
    shutil.copytree(store / TOPICS / "2", store / CHAINED / "1")
    chain_by_hand(store / CHAINED / "1")
    train(store / TAGS / "1", _multi_label_rows())
    train(store / PAIRS / "1", _pair_rows())
    train(store / PICKY / "1", single_label_rows(), head_selection="input", embedding_exit=False)
    return store


@pytest.fixture(scope="session")
def model_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model store that tests must not change."""
    root = tmp_path_factory.getbasetemp() / "trained"
    root.mkdir(exist_ok=True)
    return _trained(root)
