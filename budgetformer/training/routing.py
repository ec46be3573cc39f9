"""What f_o's choice of a link gains over going link by link, and over step 0's confidence."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from budgetformer.architecture import Architecture
from budgetformer.training.calibration import FOLDS, Table
from budgetformer.training.chains import Curve, Goal, Steps, chains, search

COSTS = (0.02, 0.04, 0.06, 0.08, 0.1, 0.14, 0.2, 0.3)
"""Mean multiply-adds, as shares of the dense network's, at which routes are compared."""
AT = (0.06, 0.14)
"""Those of them at which accuracy is shown."""


@dataclass(frozen=True)
class Routing:
    """One way to choose the link at which a text starts.

    Attributes:
        way: how.
        accuracy, cost: what it reaches within each of `AT`, and costs.
        equal_cost: cost at which it is worth as much as the first way at the last of `AT`.
    """

    way: str
    accuracy: list[float]
    cost: list[float]
    equal_cost: float


def compare_routing(table: Table, labels: Tensor) -> list[Routing]:
    """Compare ways to choose links, each with its own best chain, cross-fitted on N texts.

    The fusion is that of the table, which saw other texts. Of "link by link", every text that step
    0 does not answer starts at the same link.
    """
    right = table.right(labels)
    value = (right + table.probability_right()) / 2
    costs = table.macs / table.dense.mean()
    costs[0] += table.decision / table.dense.mean()
    steps = Steps(table.confidence, value.astype(np.float32), costs.astype(np.float32), table.s)
    none = np.zeros_like(table.s)
    ways = {"link by link": none, "f_o": table.s}
    if table.config.embedding_exit:
        ways["step 0's confidence"] = 1 - table.confidence[0]
    curves = {
        way: _curves(table.config, replace(steps, s=signal), right) for way, signal in ways.items()
    }
    places = [COSTS.index(cost) for cost in AT]
    wanted = float(curves["link by link"][0][places[-1]])
    return [
        Routing(
            way, accuracy[places].tolist(), cost[places].tolist(), _cost_of(wanted, value, cost)
        )
        for way, (value, cost, accuracy) in curves.items()
    ]


def _curves(
    config: Architecture, steps: Steps, right: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return mean value, cost and accuracy at each of `COSTS`, of texts that chose nothing."""
    goals, options = [Goal(cost=cost) for cost in COSTS], chains(config)
    folds = np.random.default_rng(0).permutation(len(steps)) % min(FOLDS, len(steps))
    totals = np.zeros((3, len(COSTS)))
    for fold in range(folds.max() + 1):
        seen, unseen = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        chosen = Curve.of(search(steps.subset(seen), options, goals), steps.subset(seen))
        rest = steps.subset(unseen)
        for place, goal in enumerate(goals):
            threshold = chosen.threshold(goal)
            value, cost = chosen.route.worth(rest, threshold)
            ends = chosen.route.walk(rest.confidence, rest.s, threshold).ends
            totals[:, place] += value.sum(), cost.sum(), right[ends, unseen].sum()
    value, cost, accuracy = totals / len(steps)
    return value, cost, accuracy


def _cost_of(wanted: float, value: np.ndarray, cost: np.ndarray) -> float:
    """Return the least cost at which a rising curve reaches a value, between its points."""
    return float(np.interp(wanted, np.maximum.accumulate(value), cost))
