"""Compare ways to choose a text's links, and chains of different lengths, by look-up."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from budgetformer.training.calibration import FOLDS, Table
from budgetformer.training.chains import Chain, Curve, Goal, Steps, chains, search

COSTS = (0.02, 0.04, 0.06, 0.08, 0.1, 0.14, 0.2, 0.3)
"""Mean multiply-adds, as shares of the dense network's, at which routes are compared."""
AT = (0.06, 0.14)
"""The costs for which reports show the accuracy."""


@dataclass(frozen=True)
class Routing:
    """The result of one way to choose a text's links, or the chain of all texts.

    Attributes:
        way: its name.
        accuracy, cost: accuracy and actual cost for each cost limit of `AT`.
        equal_cost: cost at which its value equals that of the first way at the last of `AT`.
    """

    way: str
    accuracy: list[float]
    cost: list[float]
    equal_cost: float


def compare_routing(table: Table, labels: Tensor) -> list[Routing]:
    """Compare ways to choose links, each with its best chain, cross-fitted on N texts.

    The fusion weights are the table's, fitted on other texts. With "link by link", every text that
    step 0 does not answer starts at the same link.
    """
    none, options = np.zeros_like(table.s), chains(table.config)
    ways = {"link by link": (none, options), "f_o": (table.s, options)}
    if table.config.embedding_exit:
        ways["step 0's confidence"] = (1 - table.confidence[0], options)
    return _compare(table, labels, ways)


def compare_lengths(table: Table, labels: Tensor) -> list[Routing]:
    """Compare the best chains of 2, 3, ... steps (step 0 counts), as `compare_routing` does."""
    by_length: dict[int, list[Chain]] = {}
    for chain in chains(table.config):
        by_length.setdefault(len(chain), []).append(chain)
    ways = {str(n): (table.s, by_length[n]) for n in sorted(by_length) if n > 1}
    return _compare(table, labels, ways)


def _compare(
    table: Table, labels: Tensor, ways: dict[str, tuple[np.ndarray, list[Chain]]]
) -> list[Routing]:
    """Compare ways, each given as a signal [N] for the bands and the chains to choose from."""
    right = table.right(labels)
    value = table.probability_right()
    costs = table.macs / table.dense.mean()
    costs[0] += table.decision / table.dense.mean()
    steps = Steps(table.confidence, value.astype(np.float32), costs.astype(np.float32), table.s)
    curves = {
        way: _curves(replace(steps, s=signal), right, options)
        for way, (signal, options) in ways.items()
    }
    places = [COSTS.index(cost) for cost in AT]
    wanted = float(next(iter(curves.values()))[0][places[-1]])
    return [
        Routing(
            way, accuracy[places].tolist(), cost[places].tolist(), _cost_of(wanted, value, cost)
        )
        for way, (value, cost, accuracy) in curves.items()
    ]


def _curves(
    steps: Steps, right: np.ndarray, options: list[Chain]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return cross-fitted mean value, cost and accuracy at each of `COSTS`."""
    goals = [Goal(cost=cost) for cost in COSTS]
    folds = np.random.default_rng(0).permutation(len(steps)) % min(FOLDS, len(steps))
    totals = np.zeros((3, len(COSTS)))
    for fold in range(folds.max() + 1):
        seen, unseen = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        chosen = Curve.of(search(steps.subset(seen), options, goals), steps.subset(seen))
        rest = steps.subset(unseen)
        for place, goal in enumerate(goals):
            threshold = chosen.threshold(goal)
            value, cost = chosen.route.value_and_cost(rest, threshold)
            ends = chosen.route.walk(rest.confidence, rest.s, threshold).ends
            totals[:, place] += value.sum(), cost.sum(), right[ends, unseen].sum()
    value, cost, accuracy = totals / len(steps)
    return value, cost, accuracy


def _cost_of(wanted: float, value: np.ndarray, cost: np.ndarray) -> float:
    """Return the lowest cost at which a rising curve reaches a value, by interpolation."""
    return float(np.interp(wanted, np.maximum.accumulate(value), cost))
