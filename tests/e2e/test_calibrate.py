"""Measuring the costs of a real server for the simulator."""

from __future__ import annotations

import math
from dataclasses import astuple
from pathlib import Path

import pytest

from budgetformer.checkpoint.store import read_checkpoint
from budgetformer.cost.table import CostTable, StepCost
from service.simulation.calibrate import calibrate
from service.simulation.engine import SimModel
from tests.support.processes import server
from tests.support.stores import LABELS, TOPICS, sentences

pytestmark = pytest.mark.timeout(200)


def test_measured_costs_are_plausible(model_store: Path, tmp_path: Path) -> None:
    checkpoint = read_checkpoint(model_store / TOPICS / "2")
    steps = (StepCost(1e-4, 0.0, 0.0),) * (len(checkpoint.ladder) + 1)
    model = SimModel.of(checkpoint, CostTable(checkpoint.label, "cpu", "float32", steps))
    texts = [sentence for label in LABELS for sentence in sentences(label)]
    with server(model_store, tmp_path, engines=1) as running:
        found = calibrate(running.url, checkpoint, model, texts, seconds=0.5)
    costs = [*astuple(found.frontend), *astuple(found.engine), *astuple(found.hub), found.way]
    assert all(math.isfinite(cost) and cost >= 0 for cost in costs)
    assert 0 < found.among <= 1
    # A text takes a frontend at least a tenth of a millisecond, and much less than a second.
    assert 1e-4 < found.frontend.seconds(1, 10) < 0.5
    # A request of many texts costs more than a small one, and less than one request per text.
    assert found.frontend.seconds(1, 10) < found.frontend.seconds(64, 640)
    assert found.frontend.seconds(64, 640) < 64 * found.frontend.seconds(1, 10)
