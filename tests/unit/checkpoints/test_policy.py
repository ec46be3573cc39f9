from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from budgetformer.errors import PolicyError
from budgetformer.inference.policy import (
    QUALITY_NAMES,
    BudgetRule,
    EntryBand,
    Escalation,
    Level,
    OperatingPoint,
    Policy,
    choose_point,
)

PROPERTY = settings(max_examples=80, deadline=None, derandomize=True, database=None)

STEPS = 6
shares = st.floats(0, 1)


def point(**changes: Any) -> OperatingPoint:
    figures: dict[str, Any] = {
        "accuracy": 0.9,
        "points_lost": 0.0,
        "macs_share": 0.5,
        "mean_heads": 3.0,
    }
    return OperatingPoint(**figures | changes)


@st.composite
def points(draw: st.DrawFn) -> OperatingPoint:
    uptos = sorted(draw(st.sets(st.floats(0, 0.99), max_size=3)))
    bands = tuple(EntryBand(upto=upto, step=draw(st.integers(0, STEPS))) for upto in [*uptos, 1.0])
    look = st.builds(Escalation, below=shares, step=st.integers(1, STEPS))
    return point(
        entry=draw(st.sampled_from([(), bands])),
        escalation=draw(st.none() | look),
        points_lost=draw(st.floats(-5, 20)),
        macs_share=draw(shares),
    )


@st.composite
def rules(draw: st.DrawFn) -> BudgetRule:
    fixed = draw(st.none() | st.integers(0, STEPS))
    ceiling = draw(st.none() | st.integers(0, STEPS))
    form = draw(st.sampled_from(["none", "policy", "points"]))
    if form == "policy":
        return rule_of(draw(policies()), draw(qualities), fixed, ceiling)
    if form == "points":
        return draw(points()).rule(STEPS, fixed, ceiling)
    return BudgetRule(num_steps=STEPS, fixed=fixed, ceiling=ceiling)


qualities = st.sampled_from(QUALITY_NAMES) | st.floats(-5, 30)


def level(**changes: Any) -> Level:
    figures = {"threshold": 0.5, "points_lost": 0.0, "macs_share": 0.5, "mean_heads": 3.0}
    return Level.model_validate(figures | changes)


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    """Draw a policy whose figures are as noisy as thresholds and losses can be."""
    chain = sorted(draw(st.sets(st.integers(0, STEPS), min_size=1)))
    links = [step for step in chain if step] or [0]
    uptos = sorted(draw(st.sets(st.floats(0, 0.99), max_size=3)))
    thresholds = sorted(draw(st.lists(shares, min_size=3, max_size=8)))
    places = sorted(draw(st.permutations(range(len(thresholds))))[:3])
    names = dict(zip(places, QUALITY_NAMES, strict=True))
    return Policy(
        chain=chain,
        entry=[EntryBand(upto=u, step=draw(st.sampled_from(links))) for u in [*uptos, 1.0]],
        levels=[
            level(
                name=names.get(place),
                threshold=threshold,
                points_lost=draw(st.floats(-5, 20)),
                macs_share=draw(shares),
                budgets=draw(st.dictionaries(st.sampled_from(chain), shares)),
            )
            for place, threshold in enumerate(thresholds)
        ],
    )


def rule_of(
    policy: Policy, quality: str | float, fixed: int | None = None, ceiling: int | None = None
) -> BudgetRule:
    return policy.rule_at(policy.level(quality), STEPS, fixed, ceiling)


def walk(rule: BudgetRule, s: float, confident: Sequence[float]) -> list[int]:
    """Return the steps that a text runs whose answer at step k has confidence `confident[k]`."""
    steps = [rule.first_step(s)]
    while (following := rule.next_step(steps[-1], confident[steps[-1]], s)) is not None:
        steps.append(following)
    return steps


confidences = st.lists(shares, min_size=STEPS + 1, max_size=STEPS + 1)


LEVELS = [
    point(name="fast", points_lost=6.0, macs_share=0.1),
    point(points_lost=2.5, macs_share=0.3),
    point(name="balanced", points_lost=1.0, macs_share=0.4),
    point(name="best", points_lost=-0.2, macs_share=0.9),
]


class TestChoosePoint:
    @pytest.mark.parametrize("name", ["fast", "balanced", "best"])
    def test_a_level_is_found_by_name(self, name: str) -> None:
        assert choose_point(LEVELS, name).name == name

    def test_a_level_that_is_not_there_names_those_that_are(self) -> None:
        with pytest.raises(PolicyError, match=r"'superb'.*fast, balanced, best"):
            choose_point(LEVELS, "superb")

    @pytest.mark.parametrize(
        ("given_up", "share"),
        [(100, 0.1), (6.0, 0.1), (5.9, 0.3), (2.5, 0.3), (1, 0.4), (0.5, 0.9), (0, 0.9)],
    )
    def test_a_number_takes_the_cheapest_that_loses_no_more(
        self, given_up: float, share: float
    ) -> None:
        assert choose_point(LEVELS, given_up).macs_share == share

    def test_when_all_lose_more_the_most_accurate_is_taken(self) -> None:
        lossy = [point(points_lost=6.0, macs_share=0.1), point(points_lost=1.0, macs_share=0.9)]
        assert choose_point(lossy, 0.5).points_lost == 1.0

    @pytest.mark.parametrize("quality", ["balanced", 1.0])
    def test_without_points_nothing_can_be_chosen(self, quality: str | float) -> None:
        with pytest.raises(PolicyError):
            choose_point([], quality)

    @PROPERTY
    @given(st.lists(points(), min_size=1, max_size=5), st.floats(0, 20), st.floats(0, 20))
    def test_giving_up_more_never_costs_more(
        self, offered: list[OperatingPoint], a: float, b: float
    ) -> None:
        if any(p.points_lost <= min(a, b) for p in offered):
            less, more = choose_point(offered, min(a, b)), choose_point(offered, max(a, b))
            assert more.macs_share <= less.macs_share


class TestBands:
    @pytest.mark.parametrize(
        ("s", "step"), [(0.0, 0), (0.2, 0), (0.2001, 1), (0.5, 1), (0.51, 4), (1.0, 4)]
    )
    def test_a_band_holds_up_to_its_bound(self, s: float, step: int) -> None:
        bands = [{"upto": 0.2, "step": 0}, {"upto": 0.5, "step": 1}, {"upto": 1, "step": 4}]
        rule = point(entry=bands).rule(STEPS)
        assert rule.first_step(s) == step

    @pytest.mark.parametrize("uptos", [[0.5], [0.5, 0.2, 1.0], [1.0, 0.5], [0.2, 0.9]])
    def test_bands_must_rise_and_cover_everything(self, uptos: list[float]) -> None:
        with pytest.raises(ValidationError, match="entry bands"):
            point(entry=[{"upto": upto, "step": 1} for upto in uptos])

    @pytest.mark.parametrize(
        "band",
        [{"upto": 1.1, "step": 1}, {"upto": -0.1, "step": 1}, {"upto": 1.0, "step": -1}],
    )
    def test_bounds_and_steps_have_ranges(self, band: dict[str, float]) -> None:
        with pytest.raises(ValidationError):
            point(entry=[band])

    @PROPERTY
    @given(shares, st.integers(1, 24))
    def test_without_bands_the_step_is_f_os_own(self, s: float, steps: int) -> None:
        rule = BudgetRule(num_steps=steps)
        assert rule.first_step(s) == max(1, math.ceil(s * steps))

    def test_one_band_makes_the_step_a_constant(self) -> None:
        assert point(entry=[{"upto": 1.0, "step": 3}]).rule(STEPS).constant == 3
        assert point().rule(STEPS).constant is None


class TestEscalation:
    rule = point(entry=[{"upto": 1.0, "step": 1}], escalation={"below": 0.8, "step": 4}).rule(STEPS)

    @pytest.mark.parametrize("step", [1, 2, 3])
    def test_an_unsure_answer_is_run_again_at_the_larger_step(self, step: int) -> None:
        assert self.rule.next_step(step, 0.79, 0.5) == 4

    @pytest.mark.parametrize("confident", [0.8, 0.9, 1.0])
    def test_a_sure_answer_stands(self, confident: float) -> None:
        assert self.rule.next_step(1, confident, 0.5) is None

    @pytest.mark.parametrize("step", [4, 5, 6])
    def test_the_answer_of_the_larger_step_stands_however_unsure(self, step: int) -> None:
        assert self.rule.next_step(step, 0.0, 0.5) is None

    def test_step_0_is_no_step_to_escalate_to(self) -> None:
        with pytest.raises(ValidationError):
            Escalation(below=0.5, step=0)

    @PROPERTY
    @given(points(), st.none() | st.integers(0, STEPS), shares, confidences)
    def test_an_operating_point_decides_as_it_always_did(
        self, old: OperatingPoint, ceiling: int | None, s: float, confident: list[float]
    ) -> None:
        highest = STEPS if ceiling is None else ceiling
        bands = [band.step for band in old.entry if s <= band.upto]
        first = bands[0] if bands else min(max(math.ceil(s * STEPS), 1), STEPS)
        expected = [min(first, highest)]
        look = old.escalation
        if look and expected[0] < look.step and confident[expected[0]] < look.below:
            again = min(look.step, highest)
            expected += [again] if again > expected[0] else []
        assert walk(old.rule(STEPS, ceiling=ceiling), s, confident) == expected

    def test_its_figures_say_who_runs_which_step(self) -> None:
        old = point(
            entry=[{"upto": 0.5, "step": 0}, {"upto": 1.0, "step": 1}],
            escalation={"below": 0.8, "step": 4},
            budgets={0: 0.5, 1: 0.3, 4: 0.2},
        )
        assert old.level.runs == {1: 0.5, 4: 0.2}
        assert old.level.budgets == old.budgets
        assert old.level.threshold == 0.8


class TestPolicy:
    CHAIN: ClassVar = {
        "chain": [0, 2, 5],
        "entry": [{"upto": 0.5, "step": 2}, {"upto": 1.0, "step": 5}],
        "levels": [level(name="balanced", threshold=0.7)],
    }
    rule = rule_of(Policy.model_validate(CHAIN), "balanced")

    def test_step_0_goes_first_and_then_the_link_that_s_picks(self) -> None:
        assert self.rule.first_step(0.9) == 0
        assert self.rule.next_step(0, 0.69, 0.5) == 2
        assert self.rule.next_step(0, 0.69, 0.51) == 5

    def test_an_answer_at_the_threshold_stands(self) -> None:
        assert self.rule.next_step(0, 0.7, 0.5) is None

    def test_links_follow_one_another_and_the_last_answer_stands(self) -> None:
        assert self.rule.next_step(2, 0.0, 0.5) == 5
        assert self.rule.next_step(5, 0.0, 0.5) is None

    def test_without_step_0_a_text_starts_at_the_link_that_s_picks(self) -> None:
        rule = rule_of(Policy.model_validate(self.CHAIN | {"chain": [2, 5]}), "balanced")
        assert [rule.first_step(s) for s in (0.5, 0.51)] == [2, 5]

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"chain": [0, 5, 2]}, "rise"),
            ({"chain": [0, 2, 2, 5]}, "rise"),
            ({"chain": [-1, 2, 5]}, "rise"),
            ({"chain": []}, "at least 1"),
            ({"entry": []}, "at least 1"),
            ({"entry": [{"upto": 1.0, "step": 0}]}, "steps of the chain"),
            ({"entry": [{"upto": 1.0, "step": 3}]}, "steps of the chain"),
            ({"entry": [{"upto": 0.9, "step": 2}]}, "end at 1"),
            ({"levels": []}, "at least 1"),
            ({"levels": [level(threshold=0.7), level(threshold=0.6)]}, "rising threshold"),
            ({"levels": [level(name="best"), level(name="fast")]}, "in order"),
            ({"levels": [level(name="fast"), level(name="fast")]}, "each once"),
            ({"measure": "beauty"}, "measure"),
            ({"colour": "red"}, "colour"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, changes: dict[str, Any], reason: str) -> None:
        with pytest.raises(ValidationError, match=reason):
            Policy.model_validate(self.CHAIN | changes)

    def test_a_chain_of_step_0_alone_names_it_in_its_band(self) -> None:
        only = {"chain": [0], "entry": [{"upto": 1.0, "step": 0}]}
        rule = rule_of(Policy.model_validate(self.CHAIN | only), "balanced")
        assert walk(rule, 0.5, [0.0]) == [0]

    @PROPERTY
    @given(policies())
    def test_it_survives_being_written(self, policy: Policy) -> None:
        assert Policy.model_validate_json(policy.model_dump_json()) == policy

    @PROPERTY
    @given(
        policies(),
        st.lists(qualities, min_size=2, max_size=4),
        st.none() | st.integers(0, STEPS),
        shares,
        confidences,
    )
    def test_steps_at_a_lower_threshold_are_the_first_of_those_at_a_higher_one(
        self,
        policy: Policy,
        asked: list[str | float],
        ceiling: int | None,
        s: float,
        confident: list[float],
    ) -> None:
        rules = [rule_of(policy, quality, ceiling=ceiling) for quality in asked]
        rules.sort(key=lambda rule: rule.level.threshold if rule.level else 0.0)
        walks = [walk(rule, s, confident) for rule in rules]
        for lower, higher in pairwise(walks):
            assert higher[: len(lower)] == lower

    @PROPERTY
    @given(policies(), shares, confidences)
    def test_named_levels_cost_more_and_more(
        self, policy: Policy, s: float, confident: list[float]
    ) -> None:
        fast, balanced, best = (walk(rule_of(policy, q), s, confident) for q in QUALITY_NAMES)
        assert balanced[: len(fast)] == fast
        assert best[: len(balanced)] == balanced

    @PROPERTY
    @given(policies(), st.lists(st.floats(-10, 40), min_size=2, max_size=2))
    def test_giving_up_more_never_raises_the_threshold(
        self, policy: Policy, points_lost: list[float]
    ) -> None:
        less, more = (policy.level(q) for q in sorted(points_lost))
        assert more.threshold <= less.threshold
        assert more.points_lost >= less.points_lost

    @PROPERTY
    @given(policies(), st.floats(-10, 40))
    def test_no_more_is_lost_than_was_given_up_where_that_can_be(
        self, policy: Policy, points_lost: float
    ) -> None:
        least = min(level.points_lost for level in policy.levels)
        found = policy.level(points_lost)
        assert found.points_lost <= max(points_lost, least) + 1e-9

    def test_between_two_levels_everything_is_interpolated(self) -> None:
        low = level(
            threshold=0.4, points_lost=2.0, macs_share=0.1, mean_heads=4.0, accuracy=0.9,
            interval=(0.88, 0.92), budgets={0: 1.0}, runs={},
        )  # fmt: skip
        high = level(
            threshold=0.8, points_lost=1.0, macs_share=0.3, mean_heads=8.0, accuracy=0.91,
            budgets={0: 0.5, 2: 0.5}, runs={2: 0.5},
        )  # fmt: skip
        policy = Policy.model_validate(self.CHAIN | {"levels": [low, high]})
        assert policy.level(3.0) == low
        assert policy.level(0.5) == high
        half = policy.level(1.5)
        assert half.threshold == pytest.approx(0.6)
        assert half.macs_share == pytest.approx(0.2)
        assert half.mean_heads == pytest.approx(6.0)
        assert half.accuracy == pytest.approx(0.905)
        assert half.interval is None
        assert half.budgets == pytest.approx({0: 0.75, 2: 0.25})
        assert half.runs == pytest.approx({2: 0.25})

    def test_a_threshold_that_loses_more_than_a_lower_one_is_passed_over(self) -> None:
        levels = [
            level(threshold=0.2, points_lost=2.0),
            level(threshold=0.5, points_lost=2.5),
            level(threshold=0.8, points_lost=0.0),
        ]
        policy = Policy.model_validate(self.CHAIN | {"levels": levels})
        assert policy.level(2.0).threshold == 0.2
        assert policy.level(1.0).threshold == pytest.approx(0.5)
        assert policy.level(0.5).threshold == pytest.approx(0.65)

    def test_a_level_that_is_not_there_names_those_that_are(self) -> None:
        with pytest.raises(PolicyError, match=r"'superb'.*balanced"):
            Policy.model_validate(self.CHAIN).level("superb")


@PROPERTY
@given(rules(), shares, confidences)
def test_every_text_ends_with_steps_that_rise(
    rule: BudgetRule, s: float, confident: list[float]
) -> None:
    steps = walk(rule, s, confident)
    assert steps == sorted(set(steps))
    assert tuple(steps) == rule.path(s)[: len(steps)]


class TestCeiling:
    @PROPERTY
    @given(rules(), shares, confidences)
    def test_no_step_is_above_it(self, rule: BudgetRule, s: float, confident: list[float]) -> None:
        if rule.ceiling is not None and rule.fixed is None:
            assert max(walk(rule, s, confident)) <= rule.ceiling

    def test_an_escalation_goes_as_far_as_the_ceiling(self) -> None:
        rule = TestEscalation.rule.model_copy(update={"ceiling": 2})
        assert rule.next_step(1, 0.1, 0.5) == 2
        assert rule.next_step(2, 0.1, 0.5) is None

    @PROPERTY
    @given(rules(), st.integers(0, STEPS), shares, shares)
    def test_a_fixed_budget_overrides_everything(
        self, rule: BudgetRule, fixed: int, s: float, confident: float
    ) -> None:
        rule = rule.model_copy(update={"fixed": fixed})
        assert rule.first_step(s) == rule.constant == fixed
        assert rule.next_step(fixed, confident, s) is None


@pytest.mark.parametrize("field", ["accuracy", "points_lost", "macs_share", "mean_heads"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_figures_are_finite(field: str, value: float) -> None:
    with pytest.raises(ValidationError):
        point(**{field: value})
