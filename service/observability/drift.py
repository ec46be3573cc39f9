"""What calibration says of a request's budgets, so that what happens can be held against it."""

from __future__ import annotations

from collections.abc import Mapping

from budgetformer.policy import BudgetRule


def expected_budgets(rule: BudgetRule) -> Mapping[int, float] | None:
    """Return the share of texts that calibration answered at each ladder step under a rule.

    None: nothing was calibrated for it.
    """
    if rule.fixed is not None:
        return {rule.fixed: 1.0}
    if rule.point is None or not rule.point.budgets:
        return None
    if rule.ceiling is None:
        return rule.point.budgets
    shares: dict[int, float] = {}
    for budget, share in rule.point.budgets.items():
        step = min(budget, rule.ceiling)
        shares[step] = shares.get(step, 0.0) + share
    return shares
