"""Cost tables: fitted to measurements, guessed from multiply-adds, written and read."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from budgetformer.cost.table import (
    CostTable,
    Measurement,
    StepCost,
    fit_table,
    guess_table,
    read_tables,
)
from budgetformer.errors import DataError
from budgetformer.inference.precision_choice import load_pass
from budgetformer.inference.tune import measure_costs
from tests.support.networks import PROPERTY, random_network, small_config

SIZES = [(1, 16), (1, 64), (8, 40), (24, 40)]
STEPS = (StepCost(1e-4, 1e-7, 0.0), StepCost(1e-3, 2e-5, 1e-4))
TABLE = CostTable("news:1", "cpu", "float32", STEPS)


def measured(step: int, seconds: Callable[[int, int], float]) -> list[Measurement]:
    return [Measurement(step, n * t, n, seconds(n * t, n)) for n, t in SIZES]


costs = st.floats(1e-7, 1e-2)


@PROPERTY
@given(st.builds(StepCost, costs, costs, costs))
def test_a_fit_recovers_the_costs_behind_the_times(cost: StepCost) -> None:
    table = fit_table("m:1", "cpu", "float32", measured(0, cost.seconds))
    for batch in measured(0, cost.seconds):
        assert table.batch(0, batch.tokens, batch.items) == pytest.approx(batch.seconds, rel=1e-3)


@PROPERTY
@given(st.lists(st.floats(1e-6, 1.0), min_size=4, max_size=4))
def test_no_cost_is_ever_negative(seconds: list[float]) -> None:
    timed = [Measurement(0, n * t, n, s) for (n, t), s in zip(SIZES, seconds, strict=True)]
    table = fit_table("m:1", "cpu", "float32", timed)
    assert all(value >= 0 for value in asdict(table.steps[0]).values())


def test_a_step_with_fewer_than_three_batches_is_refused() -> None:
    with pytest.raises(ValueError, match="three timed batches"):
        fit_table("m:1", "cpu", "float32", measured(1, lambda t, _: t * 1e-6))


def test_batch_seconds_are_the_constant_plus_the_share_of_each_item() -> None:
    together = TABLE.constant(1) + 3 * TABLE.share(1, 40)
    assert TABLE.batch(1, 120, 3) == pytest.approx(together)


def test_guessed_costs_are_proportional_to_multiply_adds() -> None:
    table = guess_table("m:1", [0.0, 100.0, 300.0], 1e-9, 1e-3)
    assert table.share(2, 10) == pytest.approx(3 * table.share(1, 10))
    assert table.constant(1) == 1e-3
    assert table.dtype == ""


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / "news-1.json").write_text(TABLE.dump())
    assert read_tables(tmp_path) == {"news:1": TABLE}
    assert read_tables(tmp_path / "news-1.json") == {"news:1": TABLE}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "format 2 is not supported, only 1"),
        ({"steps": []}, "steps must be a list"),
        ({"steps": [{"constant": -1, "token": 0, "item": 0}]}, "not negative"),
        ({"steps": [{"constant": 1e999, "token": 0, "item": 0}]}, "finite"),
        ({"steps": [{"constant": 1}]}, "missing"),
        ({"steps": [7]}, "not a valid cost table"),
        ({"steps": None}, "steps must be a list"),
    ],
)
def test_a_damaged_table_is_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    path = tmp_path / "news-1.json"
    path.write_text(json.dumps(json.loads(TABLE.dump()) | changes))
    with pytest.raises(DataError, match=message):
        read_tables(path)


def test_a_missing_or_unreadable_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no cost table"):
        read_tables(tmp_path)
    with pytest.raises(DataError, match="No such file"):
        read_tables(tmp_path / "none.json")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(DataError, match="not a valid cost table"):
        read_tables(tmp_path)


@pytest.mark.parametrize("selection", ["ranked", "input"])
def test_every_step_of_a_network_is_measured(selection: str) -> None:
    network = load_pass(random_network(small_config(head_selection=selection)))
    table = measure_costs(network, "tiny:1")
    assert (table.model, table.device, table.dtype) == ("tiny:1", "cpu", "float32")
    assert len(table.steps) == network.config.num_steps + 1
    assert all(table.batch(step, 64, 2) > 0 for step in range(len(table.steps)))
