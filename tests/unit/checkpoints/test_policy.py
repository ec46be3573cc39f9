from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from budgetformer.errors import PolicyError
from budgetformer.policy import BudgetRule, EntryBand, Escalation, OperatingPoint, choose_point

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
    return BudgetRule(
        point=draw(st.none() | points()),
        num_steps=STEPS,
        fixed=draw(st.none() | st.integers(0, STEPS)),
        ceiling=draw(st.none() | st.integers(0, STEPS)),
    )


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
        rule = BudgetRule(point=point(entry=bands), num_steps=STEPS)
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
        rule = BudgetRule(point=None, num_steps=steps)
        assert rule.first_step(s) == max(1, math.ceil(s * steps))

    def test_one_band_makes_the_step_a_constant(self) -> None:
        one = BudgetRule(point=point(entry=[{"upto": 1.0, "step": 3}]), num_steps=STEPS)
        assert one.constant == 3
        assert BudgetRule(point=point(), num_steps=STEPS).constant is None


class TestEscalation:
    rule = BudgetRule(
        point=point(entry=[{"upto": 1.0, "step": 1}], escalation={"below": 0.8, "step": 4}),
        num_steps=STEPS,
    )

    @pytest.mark.parametrize("step", [0, 1, 2, 3])
    def test_an_unsure_answer_is_run_again_at_the_larger_step(self, step: int) -> None:
        assert self.rule.next_step(step, 0.79) == 4

    @pytest.mark.parametrize("sure", [0.8, 0.9, 1.0])
    def test_a_sure_answer_stands(self, sure: float) -> None:
        assert self.rule.next_step(1, sure) is None

    @pytest.mark.parametrize("step", [4, 5, 6])
    def test_the_answer_of_the_larger_step_stands_however_unsure(self, step: int) -> None:
        assert self.rule.next_step(step, 0.0) is None

    def test_step_0_is_no_step_to_escalate_to(self) -> None:
        with pytest.raises(ValidationError):
            Escalation(below=0.5, step=0)

    @PROPERTY
    @given(rules(), shares, st.lists(shares, min_size=STEPS + 2, max_size=STEPS + 2))
    def test_every_item_ends_with_steps_that_rise(
        self, rule: BudgetRule, s: float, sure: list[float]
    ) -> None:
        steps = [rule.first_step(s)]
        for confidence in sure:
            following = rule.next_step(steps[-1], confidence)
            if following is None:
                break
            steps.append(following)
        else:
            pytest.fail("it never ends")
        assert steps == sorted(set(steps))


class TestCeiling:
    @PROPERTY
    @given(rules(), shares, shares)
    def test_no_step_of_f_os_is_above_it(self, rule: BudgetRule, s: float, sure: float) -> None:
        if rule.ceiling is None or rule.fixed is not None:
            return
        first = rule.first_step(s)
        assert first <= rule.ceiling
        assert (rule.next_step(first, sure) or 0) <= rule.ceiling

    def test_an_escalation_goes_as_far_as_the_ceiling(self) -> None:
        rule = TestEscalation.rule.model_copy(update={"ceiling": 2})
        assert rule.next_step(1, 0.1) == 2
        assert rule.next_step(2, 0.1) is None

    @PROPERTY
    @given(st.none() | points(), st.integers(0, STEPS), shares, shares)
    def test_a_fixed_budget_overrides_everything(
        self, given_point: OperatingPoint | None, fixed: int, s: float, sure: float
    ) -> None:
        rule = BudgetRule(point=given_point, num_steps=STEPS, fixed=fixed)
        assert rule.first_step(s) == rule.constant == fixed
        assert rule.next_step(fixed, sure) is None


@pytest.mark.parametrize("field", ["accuracy", "points_lost", "macs_share", "mean_heads"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_figures_are_finite(field: str, value: float) -> None:
    with pytest.raises(ValidationError):
        point(**{field: value})
