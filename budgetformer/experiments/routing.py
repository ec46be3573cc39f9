"""Compare routing signals, and chains of different lengths, by look-up in a table of answers.

A routing signal decides at which links (steps) of a chain a text starts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from budgetformer.training.calibration import FOLDS, AnswerTable
from budgetformer.training.chains import Chain, Curve, Goal, Steps, chains, search

COSTS = (0.02, 0.04, 0.06, 0.08, 0.1, 0.14, 0.2, 0.3)
"""Limits on the mean multiply-adds of a route, as shares of the dense network's."""
AT = (0.06, 0.14)
"""The limits of `COSTS` that reports show."""


@dataclass(frozen=True)
class Routing:
    """The result of one routing signal, or of one length of the chain.

    Attributes:
        way: name of the signal, or the length.
        accuracy, cost: accuracy and actual cost for each cost limit of `AT`.
        equal_cost: cost at which the answers are as good as those of the first signal or length at
            the last limit of `AT`.
    """

    way: str
    accuracy: list[float]
    cost: list[float]
    equal_cost: float


def compare_routing(table: AnswerTable, labels: Tensor) -> list[Routing]:
    """Compare routing signals, each with its best chain, cross-fitted on N texts.

    The fusion weights are the table's, fitted on other texts. With "link by link", all texts that
    step 0 does not answer start at the same link.
    """
    constant, options = np.zeros_like(table.s), chains(table.config)
    ways = {"link by link": (constant, options), "f_o": (table.s, options)}
    if table.config.embedding_exit:
        ways["step 0's confidence"] = (1 - table.confidence[0], options)
    return _compare(table, labels, ways)


def compare_lengths(table: AnswerTable, labels: Tensor) -> list[Routing]:
    """Compare the best chains of 2, 3, ... steps (step 0 counts), as `compare_routing` does."""
    by_length: dict[int, list[Chain]] = {}
    for chain in chains(table.config):
        by_length.setdefault(len(chain), []).append(chain)
    ways = {str(n): (table.s, by_length[n]) for n in sorted(by_length) if n > 1}
    return _compare(table, labels, ways)


def _compare(
    table: AnswerTable, labels: Tensor, ways: dict[str, tuple[np.ndarray, list[Chain]]]
) -> list[Routing]:
    """Compare ways, each given as a signal [N] for the bands, and chains to choose from."""
    right = table.right(labels)
    value = table.probability_right()
    costs = table.macs / table.dense.mean()
    costs[0] += table.decision / table.dense.mean()
    steps = Steps(table.confidence, value.astype(np.float32), costs.astype(np.float32), table.s)
    curves = {
        way: _curves(replace(steps, s=signal), right, options)
        for way, (signal, options) in ways.items()
    }
    shown = [COSTS.index(cost) for cost in AT]
    reference = float(next(iter(curves.values()))[0][shown[-1]])
    return [
        Routing(
            way, accuracy[shown].tolist(), cost[shown].tolist(), _cost_of(reference, value, cost)
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
        curve = Curve.of(search(steps.subset(seen), options, goals), steps.subset(seen))
        rest = steps.subset(unseen)
        for index, goal in enumerate(goals):
            threshold = curve.threshold(goal)
            value, cost = curve.route.value_and_cost(rest, threshold)
            ends = curve.route.walk(rest.confidence, rest.s, threshold).ends
            totals[:, index] += value.sum(), cost.sum(), right[ends, unseen].sum()
    value, cost, accuracy = totals / len(steps)
    return value, cost, accuracy


def _cost_of(target: float, value: np.ndarray, cost: np.ndarray) -> float:
    """Return the lowest cost at which the value reaches a target, by interpolation."""
    return float(np.interp(target, np.maximum.accumulate(value), cost))
