"""Budgets and runs that a rule is expected to cause, from the figures of calibration."""

from __future__ import annotations

import pytest

from budgetformer.inference.policy import BudgetRule, Level

LEVEL = Level(
    threshold=0.8,
    points_lost=0,
    macs_share=0.1,
    mean_heads=3,
    budgets={0: 0.7, 2: 0.2, 6: 0.1},
    runs={1: 0.05, 2: 0.25, 6: 0.1},
)


@pytest.mark.parametrize(
    ("rule", "budgets", "runs"),
    [
        (BudgetRule(level=LEVEL, num_steps=6), LEVEL.budgets, LEVEL.runs),
        (
            BudgetRule(level=LEVEL, num_steps=6, ceiling=3),
            {0: 0.7, 2: 0.2, 3: 0.1},
            {1: 0.05, 2: 0.25, 3: 0.1},
        ),
        (BudgetRule(level=LEVEL, num_steps=6, ceiling=1), {0: 0.7, 1: 0.3}, {1: 0.3}),
        (BudgetRule(level=LEVEL, num_steps=6, ceiling=0), {0: 1.0}, {}),
        (BudgetRule(level=LEVEL, num_steps=6, fixed=4), {4: 1.0}, {4: 1.0}),
        (BudgetRule(level=LEVEL, num_steps=6, fixed=0), {0: 1.0}, {}),
    ],
)
def test_expected_budgets_respect_ceilings_and_fixed_steps(
    rule: BudgetRule, budgets: dict[int, float], runs: dict[int, float]
) -> None:
    assert rule.expected_budgets() == pytest.approx(budgets)
    assert rule.expected_runs() == pytest.approx(runs)


@pytest.mark.parametrize("level", [None, LEVEL.model_copy(update={"budgets": {}, "runs": {}})])
def test_without_calibrated_budgets_nothing_is_expected(level: Level | None) -> None:
    rule = BudgetRule(level=level, num_steps=6)
    assert rule.expected_budgets() is None
    assert rule.expected_runs() is None
