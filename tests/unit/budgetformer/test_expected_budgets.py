from __future__ import annotations

import pytest

from budgetformer.policy import BudgetRule, OperatingPoint

POINT = OperatingPoint(
    accuracy=0.9, points_lost=0, macs_share=0.1, mean_heads=3, budgets={0: 0.7, 2: 0.2, 6: 0.1}
)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (BudgetRule(point=POINT, num_steps=6), {0: 0.7, 2: 0.2, 6: 0.1}),
        (BudgetRule(point=POINT, num_steps=6, ceiling=3), {0: 0.7, 2: 0.2, 3: 0.1}),
        (BudgetRule(point=POINT, num_steps=6, ceiling=1), {0: 0.7, 1: 0.3}),
        (BudgetRule(point=POINT, num_steps=6, fixed=4), {4: 1.0}),
        (BudgetRule(point=None, num_steps=6), None),
    ],
)
def test_what_calibration_says_of_a_rule(
    rule: BudgetRule, expected: dict[int, float] | None
) -> None:
    found = rule.expected_budgets()
    assert found == (None if expected is None else pytest.approx(expected))


def test_a_checkpoint_that_recorded_no_budgets_expects_nothing() -> None:
    point = POINT.model_copy(update={"budgets": {}})
    assert BudgetRule(point=point, num_steps=6).expected_budgets() is None
