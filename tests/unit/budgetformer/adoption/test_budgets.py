"""`add_budgets` trains budgets from unlabelled texts; the classifier's answers are the targets."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from budgetformer.adoption import budgets
from budgetformer.adoption.budgets import add_budgets
from budgetformer.checkpoint.store import Checkpoint, read_checkpoint
from budgetformer.classifier import Classifier
from budgetformer.errors import BudgetFormerError, CheckpointError, DataError
from budgetformer.training.calibration import CalibrationResult
from budgetformer.training.recipe import Recipe
from tests.support.classifiers import save_classifier
from tests.support.networks import new_network
from tests.support.stores import labelled_sentences, write_jsonl
from tests.unit.budgetformer.adoption.test_as_is import add_files, pipeline_probabilities

ROWS = [{"text": text} for text, _ in labelled_sentences()]
SHORT = {"hold_out": 0.4, "max_length": 16, "exit_weights": 2**10}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_classifier(tmp_path_factory.mktemp("source") / "made", num_hidden_layers=2)


def adopt(
    folder: Path, tmp_path: Path, rows: Any = ROWS, effort: str = "minutes", **recipe: Any
) -> tuple[Checkpoint, list[str]]:
    lines: list[str] = []
    output = tmp_path / "store" / "mine" / "1"
    add_budgets(
        classifier=folder,
        texts=write_jsonl(tmp_path / "log.jsonl", rows),
        output=output,
        recipe=dataclasses.replace(Recipe.read(effort), **SHORT | recipe),
        work_dir=tmp_path / "work",
        threads=1,
        log=lines.append,
    )
    return read_checkpoint(output), lines


@pytest.fixture(scope="module")
def made(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return adopt(folder, tmp_path_factory.mktemp("minutes"))[0]


class TestEffortMinutes:
    def test_the_full_budget_answers_like_the_classifier(
        self, folder: Path, made: Checkpoint
    ) -> None:
        texts = [str(row["text"]) for row in ROWS[:9]]
        answers = Classifier(made.path, precision="float32")(texts, heads=made.num_heads)
        for answer, expected in zip(answers, pipeline_probabilities(folder, texts), strict=True):
            probabilities = dict(zip(made.manifest.labels, answer.probs, strict=True))
            assert probabilities == pytest.approx(expected, abs=1e-3)
            assert answer.steps == [len(made.ladder)]

    def test_weights_keep_their_precision(self, made: Checkpoint) -> None:
        weights = load_file(made.path / "model.safetensors")
        assert weights["encoder.layers.0.attention.query.weight"].dtype == torch.float32

    def test_levels_are_calibrated_by_agreement(self, made: Checkpoint) -> None:
        manifest = made.manifest
        assert manifest.measure == "agreement"
        assert list(manifest.named_levels) == ["fast", "balanced", "best"]
        for level in manifest.levels:
            assert level.accuracy is None
            assert level.agreement is not None
            assert level.agreement_interval is not None
        assert manifest.named_levels["best"].agreement >= 0.97

    def test_the_stated_agreement_can_be_measured_by_a_user(self, made: Checkpoint) -> None:
        texts = [str(row["text"]) for row in ROWS]
        ask = Classifier(made.path)
        full = [a.label for a in ask(texts, heads=made.num_heads)]
        shares = []
        for level in ("fast", "balanced", "best"):
            answers = ask(texts, quality=level)
            shares.append(np.mean([a.label == b for a, b in zip(answers, full, strict=True)]))
        assert shares == sorted(shares)
        assert shares[-1] >= 0.97

    def test_the_card_shows_times_and_prices(self, made: Checkpoint) -> None:
        timing = made.manifest.timing
        assert timing is not None
        assert set(timing.milliseconds) == {"fast", "balanced", "best", "full budget"}
        assert all(ms > 0 for ms in timing.milliseconds.values())
        card = (made.path / "README.md").read_text()
        assert "cost of a million texts" in card
        assert "the share of answers that equal those of the full network" in card
        assert timing.price("fast") == pytest.approx(
            timing.milliseconds["fast"] / 3.6 * timing.threads * timing.core_hour_price
        )


def test_labels_only_add_the_accuracy(folder: Path, made: Checkpoint, tmp_path: Path) -> None:
    names = {"animals": "calm", "music": "glad", "weather": "sad"}
    rows = [{"text": text, "label": names[label]} for text, label in labelled_sentences()]
    labelled, _ = adopt(folder, tmp_path, rows)
    for level, unlabelled in zip(labelled.manifest.levels, made.manifest.levels, strict=True):
        assert level.accuracy is not None
        assert level.model_copy(update={"accuracy": None, "interval": None}) == unlabelled


def test_effort_hours_brings_every_step_closer_to_the_classifier(
    folder: Path, made: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budgets._Candidate, "is_better_than", lambda *_: True)
    taught, _ = adopt(
        folder,
        tmp_path,
        effort="hours",
        budget_epochs=60,
        min_budget_updates=0,
        learning_rate=3e-3,
        batch_size=12,
    )
    assert taught.manifest.measure == "agreement"
    texts = [str(row["text"]) for row in ROWS]
    names = made.manifest.labels
    probabilities = pipeline_probabilities(folder, texts)
    wanted = np.array([[by_label[name] for name in names] for by_label in probabilities])

    def distance(checkpoint: Checkpoint) -> float:
        answers = Classifier(checkpoint.path)(texts, heads=1)
        return float(np.abs(np.array([a.probs for a in answers]) - wanted).mean())

    assert taught.manifest.metrics["steps_trained"] == 1
    assert distance(taught) < 0.9 * distance(made)


@pytest.mark.parametrize(
    ("hourly", "text"), [(0.0, "0.00"), (0.0365, "0.00730"), (0.5, "0.100"), (617, "123.40")]
)
def test_a_price_has_enough_digits(made: Checkpoint, hourly: float, text: str) -> None:
    timing = made.manifest.timing
    assert timing is not None
    changes = {"milliseconds": {"fast": 0.72}, "threads": 1, "core_hour_price": hourly}
    assert timing.model_copy(update=changes).price_text("fast") == text


@pytest.mark.parametrize("epochs", [1, 30])
def test_trained_steps_are_kept_only_if_they_make_balanced_cheaper(
    folder: Path, made: Checkpoint, tmp_path: Path, epochs: int
) -> None:
    rates = {"learning_rate": 3e-3, "batch_size": 12, "min_budget_updates": 0}
    kept, lines = adopt(folder, tmp_path, effort="hours", budget_epochs=epochs, **rates)
    pattern = r"(with|without) training .* agrees on (\S+) of the texts, at (\S+)%"
    found = [match.groups() for line in lines if (match := re.match(pattern, line))]
    (first, least, most), (second, agreement, cost) = found
    assert (first, second) == ("without", "with")
    gained = float(cost) < float(most) and float(agreement) >= min(0.99, float(least))
    assert kept.manifest.metrics["steps_trained"] == gained
    balanced = kept.manifest.named_levels["balanced"]
    assert f"{balanced.macs_share:.1%}" == (f"{cost}%" if gained else f"{most}%")
    if not gained:
        texts = [str(row["text"]) for row in ROWS[:9]]
        given, same = (
            Classifier(c.path, precision="float32")(texts, heads=c.num_heads) for c in (made, kept)
        )
        assert [a.probs for a in same] == [pytest.approx(a.probs, abs=1e-5) for a in given]


@pytest.mark.parametrize(
    ("agreement", "cost", "better"),
    [
        (0.99, 0.2, True),
        (0.995, 0.2, True),
        (0.989, 0.2, False),
        (0.999, 0.3, False),
        (0.999, 0.4, False),
    ],
)
def test_a_candidate_is_better_if_it_agrees_as_often_as_it_must_at_a_lower_cost(
    made: Checkpoint, agreement: float, cost: float, better: bool
) -> None:
    def candidate(agreement: float, cost: float) -> budgets._Candidate:
        policy = made.manifest.policy
        assert policy is not None
        changed = {"agreement": agreement, "macs_share": cost}
        levels = tuple(level.model_copy(update=changed) for level in policy.levels)
        calibration = CalibrationResult([], [], policy.model_copy(update={"levels": levels}))
        return budgets._Candidate(new_network(), torch.float32, (), calibration)

    assert candidate(agreement, cost).is_better_than(candidate(0.995, 0.3)) == better


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dense_epochs": 1}, "dense_epochs must be 0 with --texts"),
        (
            {"head_selection": "input", "ladder": "uniform"},
            "head_selection must be 'ranked' with --texts, not 'input'",
        ),
    ],
)
def test_a_recipe_that_changes_the_classifier_is_refused(
    folder: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        adopt(folder, tmp_path, **change)


def test_too_few_texts_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="20 texts, at least 100 are required"):
        adopt(folder, tmp_path, ROWS[:20])


def test_more_texts_than_needed_are_sampled(folder: Path, tmp_path: Path) -> None:
    checkpoint, lines = adopt(folder, tmp_path, max_train_rows=102)
    assert f"102 of {len(ROWS)} texts, drawn at random" in lines
    metrics = checkpoint.manifest.metrics
    assert metrics["train_rows"] + metrics["calibration_rows"] == 102


def test_an_encoder_without_a_head_is_refused(tmp_path: Path) -> None:
    source = save_classifier(tmp_path / "made")
    add_files("modules.json")(source)
    with pytest.raises(CheckpointError, match="sentence-transformers"):
        adopt(source, tmp_path)


def test_labels_unknown_to_the_classifier_are_refused(folder: Path, tmp_path: Path) -> None:
    rows = [{"text": text, "label": "another"} for text, _ in labelled_sentences()]
    with pytest.raises(BudgetFormerError, match="another"):
        adopt(folder, tmp_path, rows)
