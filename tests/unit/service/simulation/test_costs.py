"""Costs of a server in a simulation: fitted, written and read."""

from __future__ import annotations

import json
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest

from budgetformer.cost.table import CostTable, StepCost, read_tables
from budgetformer.errors import DataError
from service.simulation.calibrate import among
from service.simulation.costs import (
    EngineCost,
    MeasuredRequests,
    ProcessCost,
    ServerCosts,
    fit_server,
    read_costs,
)
from tests.support.simulated import COSTS


def asked(costs: ServerCosts, texts: int, tokens: int, runs: float) -> MeasuredRequests:
    engine = costs.engine.request + costs.engine.text * texts + costs.engine.run * runs
    frontend, hub = (cost.seconds(texts, tokens) for cost in (costs.frontend, costs.hub))
    return MeasuredRequests(texts, tokens, runs, frontend, engine, hub)


def test_a_fit_recovers_the_costs_behind_the_times() -> None:
    costs = ServerCosts(
        ProcessCost(8e-4, 2e-5, 1e-6), EngineCost(1e-4, 5e-5, 2e-4), ProcessCost(3e-5, 1e-5, 1e-7)
    )
    forms = [(1, 30, 1.1), (1, 90, 1.3), (1, 60, 2.0), (16, 500, 2.0), (64, 4000, 2.0)]
    fitted = fit_server([asked(costs, *form) for form in forms])
    for part in ("frontend", "engine", "hub"):
        assert astuple(getattr(fitted, part)) == pytest.approx(astuple(getattr(costs, part)))


def test_no_fitted_cost_is_negative() -> None:
    found = fit_server(
        [MeasuredRequests(1, 10, 1, 1e-3, 1e-3, 0), MeasuredRequests(2, 30, 1, 1e-4, 1e-5, -1e-5)]
        * 2
    )
    assert min(*astuple(found.frontend), *astuple(found.engine), *astuple(found.hub)) >= 0


def test_a_request_among_others_costs_a_share_of_a_lone_one() -> None:
    frontend, hub = (cost.seconds(1, 50) / 4 for cost in (COSTS.frontend, COSTS.hub))
    assert among(COSTS, MeasuredRequests(1, 50, 0, frontend, 1.0, hub)) == pytest.approx(0.25)
    assert among(COSTS, MeasuredRequests(1, 50, 0, 8 * frontend, 1.0, hub)) == 1.0


def test_costs_are_read_as_they_were_written(tmp_path: Path) -> None:
    (tmp_path / "server.json").write_text(COSTS.dump())
    assert read_costs(tmp_path) == COSTS
    assert read_costs(tmp_path / "server.json") == COSTS


def test_costs_of_a_server_may_be_stored_beside_cost_tables(tmp_path: Path) -> None:
    table = CostTable("news:1", "cpu", "float32", (StepCost(0, 0, 0),))
    (tmp_path / "news-1.json").write_text(table.dump())
    (tmp_path / "server.json").write_text(COSTS.dump())
    assert read_tables(tmp_path) == {"news:1": table}


@pytest.mark.parametrize(
    "change",
    [{"format": 2}, {"way": -1}, {"way": "x"}, {"hub": {"x": 1}}, {"frontend": 3}, {"more": 1}],
)
def test_invalid_costs_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "server.json"
    path.write_text(json.dumps(json.loads(COSTS.dump()) | change))
    with pytest.raises(DataError, match=str(path)):
        read_costs(path)


def test_missing_costs_are_an_error_that_names_the_command_for_them(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"server.json: No such file.*tune --url"):
        read_costs(tmp_path)
