"""The vectorized search over chains agrees with rules applied to one text at a time."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from budgetformer.inference.policy import BudgetRule, EntryBand, Level
from budgetformer.training.chains import Curve, Goal, Route, Steps, chains, search
from tests.support.networks import PROPERTY, small_config

FIGURES = {"points_lost": 0.0, "macs_share": 0.0, "mean_heads": 0.0}
STEPS = 5


def random_steps(texts: int, seed: int, count: int = STEPS) -> Steps:
    """Return steps whose value and cost rise with their number."""
    random = np.random.default_rng(seed)
    skill = np.linspace(0.5, 0.9, count + 1)[:, None]
    confidence = random.uniform(0.2, 1.0, (count + 1, texts))
    value = (random.uniform(size=(count + 1, texts)) < skill * (0.5 + confidence / 2)).astype(float)
    cost = np.repeat(np.arange(count + 1)[:, None] / count, texts, axis=1) + 0.001
    arrays = (confidence, value, cost, random.uniform(size=texts))
    return Steps(*(array.astype(np.float32) for array in arrays))


@st.composite
def routes(draw: st.DrawFn) -> Route:
    links = sorted(draw(st.sets(st.integers(1, STEPS), min_size=1, max_size=3)))
    chain = (0, *links) if draw(st.booleans()) else tuple(links)
    ends = sorted({draw(st.floats(0, 0.99)) for _ in links[1:]})
    steps = [draw(st.sampled_from(links)) for _ in range(len(ends) + 1)]
    bands = zip([*ends, 1.0], steps, strict=True)
    entry = tuple(EntryBand(upto=upto, step=step) for upto, step in bands)
    return Route(chain, entry, draw(st.sampled_from([0.0, 0.15, 1.0])))


@PROPERTY
@given(routes(), st.floats(0, 1), st.integers(0, 1000))
def test_a_route_ends_where_its_rule_ends_for_each_text(
    route: Route, threshold: float, seed: int
) -> None:
    steps = random_steps(12, seed)
    walk = route.walk(steps.confidence, steps.s, threshold)
    value, cost = route.value_and_cost(steps, threshold)
    level = Level(threshold=threshold, **FIGURES)
    rule = BudgetRule(
        num_steps=STEPS,
        entry=route.entry,
        chain=route.chain,
        exit_margin=route.exit_margin,
        level=level,
    )
    for text, s in enumerate(steps.s.tolist()):
        ran = [rule.first_step(s)]
        while (
            step := rule.next_step(ran[-1], float(steps.confidence[ran[-1], text]), s)
        ) is not None:
            ran.append(step)
        assert walk.ends[text] == ran[-1]
        assert np.flatnonzero(walk.ran[:, text]).tolist() == ran
        assert value[text] == steps.value[ran[-1], text]
        spent = steps.cost[0, text] + sum(steps.cost[step, text] for step in ran if step)
        assert cost[text] == pytest.approx(spent, rel=1e-5)


def test_the_search_finds_the_best_route(monkeypatch: pytest.MonkeyPatch) -> None:
    """Among its thresholds and its divisions of s, no route scores higher."""
    monkeypatch.setattr("budgetformer.training.chains.NOISE", 0.0)
    monkeypatch.setattr("budgetformer.training.chains.CHUNK", 64)
    monkeypatch.setattr("budgetformer.training.chains.BINS", 4)
    steps = random_steps(300, 1, count=3)
    options = [(0,), (0, 1), (0, 2), (0, 1, 2), (1,), (1, 2), (3,)]
    goal = Goal(cost=0.4)
    found = search(steps, options, [goal], margins=[0.0])
    parts = sorted({band.upto for band in found.entry} | {0.25, 0.5, 0.75, 1.0})

    def best(route: Route) -> float:
        value_and_cost = [route.value_and_cost(steps, float(t)) for t in steps.thresholds]
        return max(float(goal.score(v.mean(), c.mean())) for v, c in value_and_cost)

    best_found = best(found)
    for option in options:
        links = [step for step in option if step] or [0]
        for cut in parts:
            for low, high in pairwise([links[0], *links]):
                bands = (EntryBand(upto=cut, step=low), EntryBand(upto=1, step=high))
                if cut == 1.0 or cut in {band.upto for band in found.entry}:
                    assert best(Route(option, bands)) <= best_found + 1e-6


def test_an_exit_margin_is_used_if_a_cheap_step_is_better_than_step_0() -> None:
    """With one threshold for all steps, step 0 answers texts that a cheap step answers better."""
    easy = np.linspace(0, 1, 2000)
    confidence = np.stack([low + (1 - low) * easy for low in (0.3, 0.6, 0.99)])
    cost = np.repeat(np.array([[0.0], [0.05], [1.0]]), len(easy), axis=1)
    arrays = (confidence, confidence, cost, np.full(len(easy), 0.5))
    steps = Steps(*(array.astype(np.float32) for array in arrays))
    goals = [Goal(cost=0.2)]
    options = [(0,), (0, 1), (0, 1, 2), (0, 2)]
    found, plain = search(steps, options, goals), search(steps, options, goals, margins=[0.0])
    assert found.exit_margin > 0

    def value_at_goal(route: Route) -> float:
        curve = Curve.of(route, steps)
        return float(route.value_and_cost(steps, curve.threshold(goals[0]))[0].mean())

    assert value_at_goal(found) > value_at_goal(plain) + 0.01


def test_chains_fit_in_a_full_pass_and_begin_with_step_0_if_it_exists() -> None:
    with_step_0 = chains(small_config(embedding_exit=True))
    assert with_step_0 == [(0,), (0, 1), (0, 2), (0, 3), (0, 4), (0, 1, 2)]
    assert chains(small_config()) == [(1,), (2,), (3,), (4,), (1, 2)]


def test_chains_use_one_of_several_equal_steps() -> None:
    ladder = [[1, 0, 0], [1, 0, 0], [4, 4, 4]]
    assert chains(small_config(ladder=ladder)) == [(1,), (3,)]


def test_without_coupled_neurons_chains_have_one_step() -> None:
    assert chains(small_config(budget_ffn=False)) == [(1,), (2,), (3,), (4,)]


@pytest.mark.parametrize(
    ("goal", "best"),
    [
        (Goal(cost=0.3), 1),
        (Goal(cost=0.05), 0),  # all cost more, so the cheapest
        (Goal(), 3),
        (Goal(value=0.85), 2),
        (Goal(value=0.99), 3),  # none reaches the value, so the highest
    ],
)
def test_a_goal_is_an_upper_limit_on_cost_or_a_lower_limit_on_value(goal: Goal, best: int) -> None:
    value, cost = np.array([0.7, 0.8, 0.9, 0.95]), np.array([0.1, 0.2, 0.4, 0.8])
    assert int(goal.score(value, cost).argmax()) == best


def test_a_gain_within_the_noise_does_not_justify_a_higher_cost() -> None:
    route = Route((1,), (EntryBand(upto=1, step=1),))
    values, costs = np.array([0.9, 0.9004, 0.92]), np.array([0.1, 0.2, 0.3])
    thresholds = np.array([0.0, 0.5, 1.0])
    assert Curve(route, thresholds, values, costs, 0.0).threshold(Goal(cost=0.25)) == 0.5
    assert Curve(route, thresholds, values, costs, 0.001).threshold(Goal(cost=0.25)) == 0.0
