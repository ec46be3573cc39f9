"""Prices of texts in seconds: expected steps, escalations, and corrections by measurements."""

from __future__ import annotations

from collections import Counter
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from budgetformer.cost.table import CostTable, StepCost
from budgetformer.inference.policy import BudgetRule, EntryBand, Escalation, Level, OperatingPoint
from service.scheduling.price import Outlook, Prices

PROPERTY = settings(max_examples=80, deadline=None, derandomize=True, database=None)

KEY = ("news", 1)
STEPS = (
    StepCost(1e-4, 1e-6, 1e-6),
    StepCost(1e-3, 1e-5, 1e-4),
    StepCost(2e-3, 2e-5, 1e-4),
    StepCost(4e-3, 4e-5, 1e-4),
)
TABLE = CostTable("news:1", "cpu", "float32", STEPS)


def new_prices() -> Prices:
    prices = Prices()
    prices.set_table(KEY, TABLE)
    return prices


def rule_with(
    budgets: dict[int, float], escalation: Escalation | None = None, first: int = 1
) -> BudgetRule:
    point = OperatingPoint(
        entry=(EntryBand(upto=0.5, step=0), EntryBand(upto=1, step=first)),
        escalation=escalation,
        accuracy=0.9,
        points_lost=0.0,
        macs_share=0.2,
        mean_heads=1.0,
        budgets=budgets,
    )
    return point.rule(3)


Text = tuple[float, dict[int, float]]
"""f_o's s for a text, and the confidence of its answer at each step."""
Drawn = tuple[BudgetRule, list[Text]]


def run(rule: BudgetRule, text: Text) -> list[int]:
    """Return the steps >= 1 that a text runs."""
    s, confidences = text
    steps = [rule.first_step(s)]
    while (next_step := rule.next_step(steps[-1], confidences[steps[-1]], s)) is not None:
        steps.append(next_step)
    return [step for step in steps if step]


def first_pass(steps: list[int]) -> int:
    return steps[0] if steps else 0


@st.composite
def rules_and_texts(draw: st.DrawFn) -> Drawn:
    """Draw a rule calibrated on some texts, and these texts."""
    links = sorted(draw(st.sets(st.integers(1, 3), min_size=1)))
    bands = sorted(draw(st.lists(st.floats(0, 1), max_size=2)))
    entry = tuple(EntryBand(upto=b, step=draw(st.sampled_from(links))) for b in (*bands, 1.0))
    chain = (0, *links) if draw(st.booleans()) else tuple(links)
    figures = {"points_lost": 0.0, "macs_share": 0.2, "mean_heads": 1.0}
    level = Level(threshold=draw(st.floats(0, 1)), **figures)
    whole = BudgetRule(num_steps=3, entry=entry, chain=chain, level=level)
    confidences = st.fixed_dictionaries(dict.fromkeys(range(4), st.floats(0, 1)))
    texts = draw(st.lists(st.tuples(st.floats(0, 1), confidences), min_size=1, max_size=30))
    paths = [run(whole, text) for text in texts]
    ends = Counter(path[-1] if path else 0 for path in paths)
    runs = Counter(step for path in paths for step in path)
    shares = {
        "budgets": {step: count / len(texts) for step, count in ends.items()},
        "runs": {step: count / len(texts) for step, count in runs.items()},
    }
    calibrated = whole.model_copy(update={"level": level.model_copy(update=shares)})
    ceiling = draw(st.none() | st.integers(1, 3))
    return calibrated.model_copy(update={"ceiling": ceiling}), texts


def test_every_text_runs_a_fixed_step() -> None:
    assert Outlook.of(BudgetRule(num_steps=3, fixed=2)).steps == {2: 1.0}
    assert Outlook.of(BudgetRule(num_steps=3, fixed=0)).steps == {}


def test_without_calibration_the_full_step_is_expected() -> None:
    assert Outlook.of(BudgetRule(num_steps=3)).steps == {3: 1.0}


def test_without_calibrated_steps_the_mean_cost_is_expected() -> None:
    assert Outlook.of(rule_with({})).steps == {3: 0.2}


def test_step_zero_costs_no_pass() -> None:
    assert Outlook.of(rule_with({0: 0.6, 1: 0.4})).steps == {1: 0.4}


def test_an_escalated_text_also_runs_its_first_step() -> None:
    outlook = Outlook.of(rule_with({0: 0.5, 1: 0.3, 3: 0.2}, Escalation(below=0.7, step=3)))
    assert outlook.steps == {1: 0.5, 3: 0.2}
    assert outlook.onward == {1: (3, pytest.approx(0.4))}


def test_an_escalation_that_never_happened_costs_nothing() -> None:
    outlook = Outlook.of(rule_with({0: 0.5, 1: 0.5}, Escalation(below=0.7, step=3)))
    assert (outlook.steps, outlook.onward) == ({1: 0.5}, {})


CHAINED = Outlook({1: 0.5, 2: 0.3, 3: 0.1}, {1: (2, 0.4), 2: (3, 0.25)})


def test_a_text_may_run_all_later_steps() -> None:
    assert list(CHAINED.after(1)) == [(1, 1.0), (2, 0.4), (3, pytest.approx(0.1))]
    assert list(CHAINED.after(2)) == [(2, 1.0), (3, 0.25)]
    assert list(CHAINED.after(3)) == [(3, 1.0)]


def test_an_engine_with_a_maximum_step_expects_no_larger_ones() -> None:
    assert CHAINED.up_to(2) == Outlook({1: 0.5, 2: 0.3}, {1: (2, 0.4)})
    assert CHAINED.up_to(0) == Outlook({})
    assert CHAINED.up_to(None) == CHAINED


@PROPERTY
@given(rules_and_texts())
def test_waiting_texts_have_the_price_that_was_expected_of_them(drawn: Drawn) -> None:
    """Over all texts, the expected price equals the price of the waiting items."""
    rule, texts = drawn
    outlook, prices = Outlook.of(rule), new_prices()
    begun = [first_pass(path) for path in map(partial(run, rule), texts) if first_pass(path)]
    waiting = sum(prices.item(KEY, step, outlook, 40) for step in begun) / len(texts)
    passes = prices.expected(KEY, outlook, 40, 40) - TABLE.share(0, 40)
    assert waiting == pytest.approx(passes)


@PROPERTY
@given(rules_and_texts())
def test_the_expected_price_is_the_mean_cost_of_texts(drawn: Drawn) -> None:
    rule, texts = drawn
    spent = [sum(TABLE.share(step, 40) for step in run(rule, text)) for text in texts]
    expected = new_prices().expected(KEY, Outlook.of(rule), 40, 40)
    assert expected == pytest.approx(TABLE.share(0, 40) + sum(spent) / len(texts))


@PROPERTY
@given(rules_and_texts(), st.integers(0, 3))
def test_later_steps_rise_and_become_less_likely(drawn: Drawn, max_step: int) -> None:
    outlook = Outlook.of(drawn[0]).up_to(max_step)
    for step in outlook.steps:
        steps, likely = zip(*outlook.after(step), strict=True)
        assert list(steps) == sorted(set(steps))
        assert max(steps) <= max_step
        assert list(likely) == sorted(likely, reverse=True)


def test_the_expected_price_weights_steps_by_their_share() -> None:
    outlook = Outlook({1: 0.5, 3: 0.2})
    shares = 0.5 * TABLE.share(1, 40) + 0.2 * TABLE.share(3, 40)
    assert new_prices().expected(KEY, outlook, 40, 40) == pytest.approx(TABLE.share(0, 40) + shares)


def test_the_decision_is_priced_by_the_tokens_that_step_0_reads() -> None:
    outlook = Outlook({1: 0.5})
    run = 0.5 * TABLE.share(1, 40)
    assert new_prices().expected(KEY, outlook, 40, 4000) == pytest.approx(
        TABLE.share(0, 4000) + run
    )


def test_the_price_of_an_item_includes_likely_escalations() -> None:
    outlook = Outlook({1: 0.5, 3: 0.2}, {1: (3, 0.4)})
    first, second = TABLE.share(1, 40), TABLE.share(3, 40)
    assert new_prices().item(KEY, 1, outlook, 40) == pytest.approx(first + 0.4 * second)
    assert new_prices().item(KEY, 3, outlook, 40) == pytest.approx(second)


@PROPERTY
@given(st.integers(1, 3), st.integers(1, 500), st.integers(1, 500))
def test_longer_texts_never_cost_less(step: int, a: int, b: int) -> None:
    prices, outlook = new_prices(), Outlook({})
    shorter, longer = (prices.item(KEY, step, outlook, n) for n in sorted((a, b)))
    assert shorter <= longer


@pytest.mark.parametrize("factor", [0.2, 1.0, 7.0])
def test_prices_follow_measured_batches(factor: float) -> None:
    prices = new_prices()
    for _ in range(200):
        prices.observe(KEY, 2, 400, 8, factor * TABLE.batch(2, 400, 8))
    assert prices.constant(KEY, 3) == pytest.approx(factor * TABLE.constant(3), rel=0.01)
    assert prices.item(KEY, 1, Outlook({}), 40) == pytest.approx(
        factor * TABLE.share(1, 40), rel=0.01
    )


@PROPERTY
@given(st.lists(st.floats(0, 1e6), max_size=50))
def test_prices_stay_positive_and_finite(seconds: list[float]) -> None:
    prices = new_prices()
    for taken in seconds:
        prices.observe(KEY, 1, 10, 1, taken)
        assert 0 < prices.constant(KEY, 1) < float("inf")


def test_one_slow_batch_hardly_changes_prices() -> None:
    prices = new_prices()
    prices.observe(KEY, 1, 10, 1, 60.0)
    assert prices.constant(KEY, 1) < 3 * TABLE.constant(1)


def test_networks_whose_layers_decide_are_priced_at_the_full_step() -> None:
    assert new_prices().item(KEY, -1, Outlook({}), 40) == pytest.approx(TABLE.share(3, 40))


def test_each_model_has_its_own_prices() -> None:
    prices = new_prices()
    prices.set_table("other", TABLE)
    prices.observe("other", 1, 10, 1, 1.0)
    assert prices.constant(KEY, 1) == TABLE.constant(1)
    assert prices.constant("other", 1) > TABLE.constant(1)


def test_the_expected_price_of_several_texts_is_their_sum() -> None:
    outlook, tokens, wholes = Outlook({1: 0.3, 2: 0.5}), [3, 40, 17], [3, 900, 18]
    each = new_prices().expected_each(KEY, outlook, tokens, wholes)
    assert each == pytest.approx(
        [
            new_prices().expected(KEY, outlook, *counts)
            for counts in zip(tokens, wholes, strict=True)
        ]
    )
    together = new_prices().expected(KEY, outlook, sum(tokens), sum(wholes), len(tokens))
    assert together == pytest.approx(sum(each))


def test_a_ceiling_limits_the_expected_steps() -> None:
    capped = rule_with({0: 0.5, 1: 0.2, 3: 0.3}).model_copy(update={"ceiling": 2})
    assert Outlook.of(capped).steps == {1: 0.2, 2: 0.3}
