"""Comparison of two encoders at equal multiply-adds."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from budgetformer.checkpoint.manifest import write_manifest
from budgetformer.checkpoint.store import read_checkpoint
from budgetformer.errors import DataError
from budgetformer.experiments.sizes import Frontier, compare, main
from tests.support.stores import CHAINED, TOPICS, single_label_rows, write_jsonl


def frontier(name: str, macs: list[float], right: list[list[int]]) -> Frontier:
    answers = np.array(right, dtype=bool)
    return Frontier(name, np.array(macs), answers, answers[-1], 1000.0)


def test_the_highest_threshold_within_the_cost_is_used() -> None:
    one = frontier("one", [0, 10, 20], [[0, 0], [1, 0], [1, 1]])
    for cost, expected in ((0.0, [0, 0]), (15.0, [1, 0]), (20.0, [1, 1]), (99.0, [1, 1])):
        answers = one.correct_within(cost)
        assert answers is not None
        assert answers.tolist() == expected
    assert frontier("two", [5], [[1]]).correct_within(4.9) is None


def test_networks_are_compared_at_costs_that_both_reach() -> None:
    small = frontier("small", [0, 10, 40], [[0] * 4, [1, 0, 0, 0], [1, 1, 0, 0]])
    large = frontier("large", [0, 20, 80], [[0] * 4, [1, 1, 1, 0], [1, 1, 1, 1]])
    compared = compare(small, large)
    assert compared[0].cost == pytest.approx(20)
    assert compared[-1].cost == pytest.approx(40)
    assert [c.small for c in compared] == [0.25] * 7 + [0.5]
    assert {c.large for c in compared} == {0.75}
    assert compared[-1].gain == pytest.approx(25)
    assert compared[-1].low < 25 < compared[-1].high


def test_the_report_of_equal_networks_shows_no_gain(model_store: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "test.jsonl", single_label_rows())
    model, out = str(model_store / CHAINED / "1"), tmp_path / "report"
    main([model, model, "--data", str(data), "--out", str(out)])
    text = (out / "README.md").read_text()
    assert "+0.00 (+0.00 to +0.00)" in text
    assert (out / "sizes.svg").exists()


def test_a_relative_data_file_names_its_folder_in_the_title(
    model_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(Path("test.jsonl"), single_label_rows())
    model = str((model_store / CHAINED / "1").resolve())
    main([model, model, "--data", "test.jsonl", "--out", "report"])
    title = Path("report/README.md").read_text().splitlines()[0]
    assert title.endswith(f": {tmp_path.name}")


def test_checkpoints_with_labels_in_another_order_are_refused(
    model_store: Path, tmp_path: Path
) -> None:
    data = write_jsonl(tmp_path / "test.jsonl", single_label_rows())
    small = model_store / CHAINED / "1"
    large = shutil.copytree(small, tmp_path / CHAINED / "2")
    manifest = read_checkpoint(small).manifest
    write_manifest(
        large, manifest.model_copy(update={"version": 2, "labels": manifest.labels[::-1]})
    )
    with pytest.raises(DataError, match=f"{CHAINED}:1 and {CHAINED}:2 must have the same labels"):
        main([str(small), str(large), "--data", str(data), "--out", str(tmp_path / "report")])


def test_a_checkpoint_without_a_policy_is_refused(model_store: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "test.jsonl", single_label_rows())
    model = str(model_store / TOPICS / "2")
    with pytest.raises(DataError, match="no policy"):
        main([model, model, "--data", str(data), "--out", str(tmp_path)])
