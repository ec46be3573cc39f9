"""Quality levels and budget rules: operating points, policies, chains and ceilings."""

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
    escalations = st.builds(Escalation, below=shares, step=st.integers(1, STEPS))
    return point(
        entry=draw(st.sampled_from([(), bands])),
        escalation=draw(st.none() | escalations),
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
    """Draw a policy; its accuracy drops need not fall with the threshold."""
    chain = sorted(draw(st.sets(st.integers(0, STEPS), min_size=1)))
    links = [step for step in chain if step] or [0]
    uptos = sorted(draw(st.sets(st.floats(0, 0.99), max_size=3)))
    thresholds = sorted(draw(st.lists(shares, min_size=3, max_size=8)))
    named = sorted(draw(st.permutations(range(len(thresholds))))[:3])
    names = dict(zip(named, QUALITY_NAMES, strict=True))
    return Policy(
        chain=chain,
        entry=[EntryBand(upto=u, step=draw(st.sampled_from(links))) for u in [*uptos, 1.0]],
        levels=[
            level(
                name=names.get(i),
                threshold=threshold,
                points_lost=draw(st.floats(-5, 20)),
                macs_share=draw(shares),
                budgets=draw(st.dictionaries(st.sampled_from(chain), shares)),
            )
            for i, threshold in enumerate(thresholds)
        ],
    )


def rule_of(
    policy: Policy, quality: str | float, fixed: int | None = None, ceiling: int | None = None
) -> BudgetRule:
    return policy.rule_at(policy.level(quality), STEPS, fixed, ceiling)


def walk(rule: BudgetRule, s: float, confident: Sequence[float]) -> list[int]:
    """Return the steps that a text runs if its answer at step k has confidence `confident[k]`."""
    steps = [rule.first_step(s)]
    while (next_step := rule.next_step(steps[-1], confident[steps[-1]], s)) is not None:
        steps.append(next_step)
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

    def test_an_unknown_level_is_refused_with_the_known_ones(self) -> None:
        with pytest.raises(PolicyError, match=r"'superb'.*fast, balanced, best"):
            choose_point(LEVELS, "superb")

    @pytest.mark.parametrize(
        ("max_drop", "share"),
        [(100, 0.1), (6.0, 0.1), (5.9, 0.3), (2.5, 0.3), (1, 0.4), (0.5, 0.9), (0, 0.9)],
    )
    def test_a_number_selects_the_cheapest_level_within_this_accuracy_drop(
        self, max_drop: float, share: float
    ) -> None:
        assert choose_point(LEVELS, max_drop).macs_share == share

    def test_the_most_accurate_level_is_selected_if_all_lose_more(self) -> None:
        lossy = [point(points_lost=6.0, macs_share=0.1), point(points_lost=1.0, macs_share=0.9)]
        assert choose_point(lossy, 0.5).points_lost == 1.0

    @pytest.mark.parametrize("quality", ["balanced", 1.0])
    def test_without_points_every_quality_is_refused(self, quality: str | float) -> None:
        with pytest.raises(PolicyError):
            choose_point([], quality)

    @PROPERTY
    @given(st.lists(points(), min_size=1, max_size=5), st.floats(0, 20), st.floats(0, 20))
    def test_a_larger_accuracy_drop_never_costs_more(
        self, offered: list[OperatingPoint], a: float, b: float
    ) -> None:
        if any(p.points_lost <= min(a, b) for p in offered):
            less, more = choose_point(offered, min(a, b)), choose_point(offered, max(a, b))
            assert more.macs_share <= less.macs_share


class TestBands:
    @pytest.mark.parametrize(
        ("s", "step"), [(0.0, 0), (0.2, 0), (0.2001, 1), (0.5, 1), (0.51, 4), (1.0, 4)]
    )
    def test_a_band_includes_its_upper_bound(self, s: float, step: int) -> None:
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
    def test_without_bands_s_selects_the_step(self, s: float, steps: int) -> None:
        rule = BudgetRule(num_steps=steps)
        assert rule.first_step(s) == max(1, math.ceil(s * steps))

    def test_a_single_band_makes_the_step_constant(self) -> None:
        assert point(entry=[{"upto": 1.0, "step": 3}]).rule(STEPS).constant == 3
        assert point().rule(STEPS).constant is None


class TestEscalation:
    rule = point(entry=[{"upto": 1.0, "step": 1}], escalation={"below": 0.8, "step": 4}).rule(STEPS)

    @pytest.mark.parametrize("step", [1, 2, 3])
    def test_an_uncertain_text_runs_again_at_the_larger_step(self, step: int) -> None:
        assert self.rule.next_step(step, 0.79, 0.5) == 4

    @pytest.mark.parametrize("confident", [0.8, 0.9, 1.0])
    def test_a_confident_answer_is_final(self, confident: float) -> None:
        assert self.rule.next_step(1, confident, 0.5) is None

    @pytest.mark.parametrize("step", [4, 5, 6])
    def test_the_answer_of_the_larger_step_is_final(self, step: int) -> None:
        assert self.rule.next_step(step, 0.0, 0.5) is None

    def test_escalation_to_step_0_is_refused(self) -> None:
        with pytest.raises(ValidationError):
            Escalation(below=0.5, step=0)

    @PROPERTY
    @given(points(), st.none() | st.integers(0, STEPS), shares, confidences)
    def test_an_operating_point_runs_its_band_and_at_most_one_escalation(
        self, old: OperatingPoint, ceiling: int | None, s: float, confident: list[float]
    ) -> None:
        highest = STEPS if ceiling is None else ceiling
        bands = [band.step for band in old.entry if s <= band.upto]
        first = bands[0] if bands else min(max(math.ceil(s * STEPS), 1), STEPS)
        expected = [min(first, highest)]
        escalation = old.escalation
        if (
            escalation
            and expected[0] < escalation.step
            and confident[expected[0]] < escalation.below
        ):
            second = min(escalation.step, highest)
            expected += [second] if second > expected[0] else []
        assert walk(old.rule(STEPS, ceiling=ceiling), s, confident) == expected

    def test_the_share_of_runs_follows_from_budgets_and_escalation(self) -> None:
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

    def test_after_step_0_s_selects_the_next_step(self) -> None:
        assert self.rule.first_step(0.9) == 0
        assert self.rule.next_step(0, 0.69, 0.5) == 2
        assert self.rule.next_step(0, 0.69, 0.51) == 5

    def test_an_answer_at_the_threshold_is_final(self) -> None:
        assert self.rule.next_step(0, 0.7, 0.5) is None

    def test_the_last_step_of_the_chain_is_final(self) -> None:
        assert self.rule.next_step(2, 0.0, 0.5) == 5
        assert self.rule.next_step(5, 0.0, 0.5) is None

    def test_without_step_0_s_selects_the_first_step(self) -> None:
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
    def test_an_invalid_policy_is_refused(self, changes: dict[str, Any], reason: str) -> None:
        with pytest.raises(ValidationError, match=reason):
            Policy.model_validate(self.CHAIN | changes)

    def test_a_chain_may_be_step_0_alone(self) -> None:
        only = {"chain": [0], "entry": [{"upto": 1.0, "step": 0}]}
        rule = rule_of(Policy.model_validate(self.CHAIN | only), "balanced")
        assert walk(rule, 0.5, [0.0]) == [0]

    @PROPERTY
    @given(policies())
    def test_a_policy_is_read_as_it_was_written(self, policy: Policy) -> None:
        assert Policy.model_validate_json(policy.model_dump_json()) == policy

    @PROPERTY
    @given(
        policies(),
        st.lists(qualities, min_size=2, max_size=4),
        st.none() | st.integers(0, STEPS),
        shares,
        confidences,
    )
    def test_a_higher_quality_runs_the_same_steps_and_possibly_more(
        self,
        policy: Policy,
        requested: list[str | float],
        ceiling: int | None,
        s: float,
        confident: list[float],
    ) -> None:
        rules = [rule_of(policy, quality, ceiling=ceiling) for quality in requested]
        rules.sort(key=lambda rule: rule.level.threshold if rule.level else 0.0)
        walks = [walk(rule, s, confident) for rule in rules]
        for lower, higher in pairwise(walks):
            assert higher[: len(lower)] == lower

    @PROPERTY
    @given(policies(), shares, confidences)
    def test_each_named_level_runs_the_steps_of_the_one_below(
        self, policy: Policy, s: float, confident: list[float]
    ) -> None:
        fast, balanced, best = (walk(rule_of(policy, q), s, confident) for q in QUALITY_NAMES)
        assert balanced[: len(fast)] == fast
        assert best[: len(balanced)] == balanced

    @PROPERTY
    @given(policies(), st.lists(st.floats(-10, 40), min_size=2, max_size=2))
    def test_a_larger_accuracy_drop_never_raises_the_threshold(
        self, policy: Policy, points_lost: list[float]
    ) -> None:
        less, more = (policy.level(q) for q in sorted(points_lost))
        assert more.threshold <= less.threshold
        assert more.points_lost >= less.points_lost

    @PROPERTY
    @given(policies(), st.floats(-10, 40))
    def test_the_accuracy_drop_is_within_the_request_if_possible(
        self, policy: Policy, points_lost: float
    ) -> None:
        least = min(level.points_lost for level in policy.levels)
        assert policy.level(points_lost).points_lost <= max(points_lost, least) + 1e-9

    def test_figures_are_interpolated_between_levels(self) -> None:
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

    def test_a_level_less_accurate_than_a_lower_one_is_skipped(self) -> None:
        levels = [
            level(threshold=0.2, points_lost=2.0),
            level(threshold=0.5, points_lost=2.5),
            level(threshold=0.8, points_lost=0.0),
        ]
        policy = Policy.model_validate(self.CHAIN | {"levels": levels})
        assert policy.level(2.0).threshold == 0.2
        assert policy.level(1.0).threshold == pytest.approx(0.5)
        assert policy.level(0.5).threshold == pytest.approx(0.65)

    def test_an_unknown_level_of_a_policy_is_refused_with_the_known_ones(self) -> None:
        with pytest.raises(PolicyError, match=r"'superb'.*balanced"):
            Policy.model_validate(self.CHAIN).level("superb")


@PROPERTY
@given(rules(), shares, confidences)
def test_steps_of_a_text_rise_along_its_path(
    rule: BudgetRule, s: float, confident: list[float]
) -> None:
    steps = walk(rule, s, confident)
    assert steps == sorted(set(steps))
    assert tuple(steps) == rule.path(s)[: len(steps)]


class TestCeiling:
    @PROPERTY
    @given(rules(), shares, confidences)
    def test_no_step_is_above_the_ceiling(
        self, rule: BudgetRule, s: float, confident: list[float]
    ) -> None:
        if rule.ceiling is not None and rule.fixed is None:
            assert max(walk(rule, s, confident)) <= rule.ceiling

    def test_an_escalation_stops_at_the_ceiling(self) -> None:
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
