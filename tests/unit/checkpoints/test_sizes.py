"""Two encoders at equal multiply-adds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from budgetformer.errors import DataError
from budgetformer.experiments.sizes import Frontier, compare, main
from tests.support.stores import CHAINED, TOPICS, single_label_rows, write_jsonl


def frontier(name: str, macs: list[float], right: list[list[int]]) -> Frontier:
    answers = np.array(right, dtype=bool)
    return Frontier(name, np.array(macs), answers, answers[-1], 1000.0)


def test_a_network_is_taken_at_the_highest_threshold_that_it_can_pay() -> None:
    one = frontier("one", [0, 10, 20], [[0, 0], [1, 0], [1, 1]])
    for cost, expected in ((0.0, [0, 0]), (15.0, [1, 0]), (20.0, [1, 1]), (99.0, [1, 1])):
        answers = one.within(cost)
        assert answers is not None
        assert answers.tolist() == expected
    assert frontier("two", [5], [[1]]).within(4.9) is None


def test_they_are_compared_at_costs_that_both_can_have() -> None:
    small = frontier("small", [0, 10, 40], [[0] * 4, [1, 0, 0, 0], [1, 1, 0, 0]])
    large = frontier("large", [0, 20, 80], [[0] * 4, [1, 1, 1, 0], [1, 1, 1, 1]])
    compared = compare(small, large)
    assert compared[0].cost == pytest.approx(20)
    assert compared[-1].cost == pytest.approx(40)
    assert [c.small for c in compared] == [0.25] * 7 + [0.5]
    assert {c.large for c in compared} == {0.75}
    assert compared[-1].gain == pytest.approx(25)
    assert compared[-1].low < 25 < compared[-1].high


def test_the_report_holds_both(model_store: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "test.jsonl", single_label_rows())
    model, out = str(model_store / CHAINED / "1"), tmp_path / "report"
    main([model, model, "--data", str(data), "--out", str(out)])
    text = (out / "README.md").read_text()
    assert "+0.00 (+0.00 to +0.00)" in text
    assert (out / "sizes.svg").exists()


def test_a_checkpoint_without_a_policy_is_refused(model_store: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "test.jsonl", single_label_rows())
    model = str(model_store / TOPICS / "2")
    with pytest.raises(DataError, match="no policy"):
        main([model, model, "--data", str(data), "--out", str(tmp_path)])
