"""The report on a checkpoint: accuracy at each cost beside baselines, and its files."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from budgetformer.checkpoint.store import read_checkpoint
from budgetformer.cost.macs import dense_macs, encoder_macs
from budgetformer.cost.processor import processor_name
from budgetformer.errors import DataError
from budgetformer.experiments.baselines import Baseline, keep_layers
from budgetformer.experiments.report import (
    Report,
    calibration_error,
    macro_f1,
    report_checkpoint,
)
from budgetformer.experiments.report_files import report_text, write_report
from budgetformer.model.architecture import MULTI_LABEL
from budgetformer.model.modeling import load_model
from budgetformer.training.data import Examples, TokenizedTexts
from budgetformer.training.evaluation import evaluate_checkpoint
from tests.support.stores import (
    CHAINED,
    TAGS,
    TOPICS,
    labelled_examples,
    labelled_sentences,
    model_store,
)

__all__ = ["model_store"]


@pytest.fixture(scope="module")
def examples(model_store: Path) -> Examples:
    return labelled_examples(list(read_checkpoint(model_store / TOPICS / "1").manifest.labels))


@pytest.fixture(scope="module")
def report(model_store: Path, examples: Examples) -> Report:
    return report_checkpoint(read_checkpoint(model_store / TOPICS / "1"), examples, None)


class TestReport:
    def test_levels_equal_those_of_evaluate(
        self, report: Report, model_store: Path, examples: Examples
    ) -> None:
        ways = {way.name: way for way in report.ways}
        for row in evaluate_checkpoint(read_checkpoint(model_store / TOPICS / "1"), examples):
            way = ways.get(row.quality, ways["step 4"])
            assert way.accuracy == pytest.approx(row.accuracy)
            assert way.mean_heads == pytest.approx(row.mean_heads)
            if row.quality in ways:  # a report includes f_o in the full budget, evaluate does not
                assert way.macs_share == pytest.approx(row.macs_share, rel=1e-6)

    def test_names_processor_threads_and_precision(self, report: Report) -> None:
        assert (report.processor, report.threads) == (processor_name(), torch.get_num_threads())
        place = f"{report.processor} (torch threads: {report.threads})"
        assert f"in {report.precision} on {place}." in " ".join(report_text(report).split())

    def test_shows_where_texts_end_and_the_gain_of_f_o(self, report: Report) -> None:
        ways = {way.name: way for way in report.ways}
        for name in ("fast", "balanced", "best", "step 2", "oracle"):
            assert sum(ways[name].budgets.values()) == pytest.approx(1)
        assert ways["step 2"].budgets == {2: 1.0}
        assert {row.way for row in report.routing} == {
            "link by link", "f_o", "step 0's confidence",
        }  # fmt: skip
        # Longer chains do not fit in a full pass.
        assert [row.way for row in report.lengths] == ["2", "3"]
        text = report_text(report)
        assert "Share of the texts that end at each step" in text
        assert "Gain from f_o's choice of steps" in text

    def test_it_compares_what_calibration_stated_with_what_it_measures(
        self, model_store: Path
    ) -> None:
        checkpoint = read_checkpoint(model_store / CHAINED / "1")
        examples = labelled_examples(list(checkpoint.manifest.labels))
        report = report_checkpoint(checkpoint, examples, None, timed=False)
        rows = {row.quality: row for row in evaluate_checkpoint(checkpoint, examples)}
        assert [level.name for level in report.stated] == ["fast", "balanced", "best"]
        for level in report.stated:
            stated = checkpoint.manifest.named_levels[level.name]
            assert (level.share, level.interval) == (stated.agreement, stated.agreement_interval)
            assert level.measured == pytest.approx(rows[level.name].agreement)
            assert level.measured_macs == pytest.approx(rows[level.name].macs_share, rel=1e-6)
            line = f"| {level.name} | {level.share:.4f} ("
            assert line in report_text(report)

    def test_nothing_beats_the_oracle(self, report: Report) -> None:
        ways = {way.name: way for way in report.ways}
        assert ways["oracle"].accuracy == max(way.accuracy for way in report.ways)

    def test_every_step_and_level_is_listed_and_timed(self, report: Report) -> None:
        names = [way.name for way in report.ways]
        steps = [f"step {i}" for i in range(5)]
        assert names == ["fast", "balanced", "best", *steps, "oracle"]
        timed = [way for way in report.ways if way.milliseconds]
        assert [way.name for way in timed] == [n for n in names if n not in ("step 0", "oracle")]
        assert all(ms > 0 for way in timed for ms in way.milliseconds.values())

    def test_curves_rise_in_cost_and_accuracy(self, report: Report) -> None:
        for curve in report.curves:
            if curve.name != "budget per text":
                assert all(a < b for a, b in pairwise(curve.cost))
                assert all(a < b for a, b in pairwise(curve.accuracy))

    def test_comparisons_are_at_equal_cost(self, report: Report) -> None:
        curves = {curve.name: curve for curve in report.curves}
        assert report.comparisons
        for c in report.comparisons:
            curve = curves[c.baseline]
            expected = np.interp(c.macs_share, curve.cost, curve.accuracy)
            assert c.baseline_accuracy == pytest.approx(expected)
            assert c.gain == pytest.approx(100 * (c.accuracy - c.baseline_accuracy))
            assert c.low <= c.gain <= c.high

    def test_heads_by_class_and_confidence_average_to_the_mean(self, report: Report) -> None:
        for way in report.ways:
            if way.name in report.heads_by_confidence:
                tenths = report.heads_by_confidence[way.name]
                assert np.mean(tenths) == pytest.approx(way.mean_heads, rel=0.05)
                assert set(report.heads_by_class[way.name]) == {"animals", "music", "weather"}

    def test_writes_plots_readme_and_json(self, report: Report, tmp_path: Path) -> None:
        write_report(report, tmp_path / "deep" / "report")
        folder = tmp_path / "deep" / "report"
        names = {path.name for path in folder.iterdir()}
        plots = {f"{n}.{s}" for n in ("frontier", "difficulty", "classes") for s in ("png", "svg")}
        assert names == plots | {"README.md", "report.json"}
        stored = json.loads((folder / "report.json").read_text())
        assert [way["name"] for way in stored["ways"]] == [way.name for way in report.ways]
        text = (folder / "README.md").read_text()
        for way in report.ways:
            assert f"| {way.name} | {way.accuracy:.4f} |" in text

    def test_compares_with_dense_networks_of_both_sizes(
        self, model_store: Path, examples: Examples
    ) -> None:
        checkpoint = read_checkpoint(model_store / TOPICS / "1")
        model = load_model(checkpoint.path)
        config = model.config
        shape = (config.num_hidden_layers - 1, config.num_classes, config.hidden_size)
        small = keep_layers(model, 1)
        small.config.ladder = [[2]]
        baseline = Baseline(model, torch.zeros(shape), torch.zeros(shape[:2]), (small,))
        report = report_checkpoint(checkpoint, examples, baseline, timed=False)
        assert [curve.name for curve in report.curves] == [
            "budget per text", "fixed step", "confidence cascade", "early exit",
            "step 0, then dense", "smaller dense", "step 0, then smaller dense",
        ]  # fmt: skip
        ways = {way.name: way for way in report.ways}
        way = ways[f"dense, 1 of {config.num_hidden_layers} layers, 2 heads"]
        tokens = TokenizedTexts.of(checkpoint, examples)
        spent = sum(encoder_macs(small.config, [2], int(n)) for n in tokens.lengths)
        dense = sum(dense_macs(config, int(n)) for n in tokens.lengths)
        assert way.macs_share == pytest.approx(spent / dense)
        assert way.mean_heads == 2

    def test_refuses_an_empty_data_set(self, model_store: Path, examples: Examples) -> None:
        with pytest.raises(DataError, match="at least one text"):
            report_checkpoint(
                read_checkpoint(model_store / TOPICS / "1"), examples.subset([]), None
            )

    def test_of_several_labels_groups_heads_by_the_labels_that_occur(
        self, model_store: Path
    ) -> None:
        checkpoint = read_checkpoint(model_store / TAGS / "1")
        names = list(checkpoint.manifest.labels)
        texts = [text for text, _ in labelled_sentences()[:8]]
        labels = np.zeros((8, len(names)), dtype=np.int64)
        labels[:, 0] = 1
        report = report_checkpoint(
            checkpoint, Examples(texts, None, labels, names), None, timed=False
        )
        assert set(report.heads_by_class["balanced"]) == {names[0]}


class TestMacroF1:
    def test_matches_a_hand_calculation(self) -> None:
        # class 0: one hit, one miss, no false alarm; class 1: one hit, one false alarm
        logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 2.0, 0.0]])
        labels = torch.tensor([0, 0, 1])
        assert macro_f1(logits, labels, None) == pytest.approx((2 / 3 + 2 / 3) / 2)

    def test_of_several_labels_matches_a_hand_calculation(self) -> None:
        logits = torch.tensor([[1.0, -1.0], [1.0, 1.0]])
        labels = torch.tensor([[1, 0], [1, 0]])
        assert macro_f1(logits, labels, MULTI_LABEL) == pytest.approx((1 + 0) / 2)


class TestCalibrationError:
    def test_of_confident_right_answers_is_0(self) -> None:
        logits = torch.tensor([[50.0, 0.0]] * 4)
        assert calibration_error(logits, np.ones(4), None) == pytest.approx(0)

    def test_of_confident_wrong_answers_is_1(self) -> None:
        logits = torch.tensor([[50.0, 0.0]] * 4)
        assert calibration_error(logits, np.zeros(4), None) == pytest.approx(1)

    def test_is_the_gap_between_confidence_and_accuracy(self) -> None:
        logits = torch.zeros(4, 2)
        right = np.array([1, 1, 1, 0])
        assert calibration_error(logits, right, None) == pytest.approx(0.25)
