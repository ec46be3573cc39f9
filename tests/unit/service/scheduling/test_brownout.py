"""Brown-out: the quality level falls under load and returns after a calm."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from budgetformer.inference.policy import QUALITY_NAMES, QualityName
from service.scheduling.brownout import (
    BrownOut,
    BrownOutLimits,
    kept_above,
    levels_down_to,
)

PROPERTY = settings(max_examples=80, deadline=None, derandomize=True, database=None)

LIMITS = BrownOutLimits(lower_at=1.0, raise_at=0.2, settle=0.5, calm=5.0)


def three_levels() -> BrownOut:
    return BrownOut(["best", "balanced", "fast"], LIMITS)


def test_the_normal_level_is_in_force_at_first() -> None:
    assert three_levels().level == "best"


def test_a_long_queue_lowers_the_level_by_one() -> None:
    brown = three_levels()
    assert brown.observe(1.1, now=0.0) == "balanced"


def test_the_level_settles_before_the_next_step_down() -> None:
    brown = three_levels()
    levels = [brown.observe(2.0, now) for now in (0.0, 0.1, 0.4, 0.6, 0.7)]
    assert levels == ["balanced", "balanced", "balanced", "fast", "fast"]


def test_the_level_rises_only_after_a_calm() -> None:
    brown = three_levels()
    brown.observe(2.0, 0.0)
    assert brown.observe(0.1, 1.0) == "balanced"
    assert brown.observe(0.1, 5.9) == "balanced"
    assert brown.observe(0.1, 6.0) == "best"


def test_an_interrupted_calm_starts_again() -> None:
    brown = three_levels()
    brown.observe(2.0, 0.0)
    brown.observe(0.1, 1.0)
    brown.observe(0.5, 4.0)
    assert brown.observe(0.1, 6.5) == "balanced"
    assert brown.observe(0.1, 11.5) == "best"


def test_every_step_up_needs_its_own_calm() -> None:
    brown = three_levels()
    brown.observe(2.0, 0.0)
    brown.observe(2.0, 1.0)
    levels = [brown.observe(0.0, now) for now in (2.0, 7.0, 8.0, 12.0)]
    assert levels == ["fast", "balanced", "balanced", "best"]


def test_between_the_limits_nothing_changes() -> None:
    brown = three_levels()
    brown.observe(2.0, 0.0)
    assert {brown.observe(0.6, float(now)) for now in range(1, 100)} == {"balanced"}


@PROPERTY
@given(
    st.sampled_from(QUALITY_NAMES),
    st.lists(st.tuples(st.floats(0, 10), st.floats(0.01, 10)), max_size=60),
)
def test_the_level_moves_one_at_a_time_and_never_below_the_floor(
    floor: QualityName, steps: list[tuple[float, float]]
) -> None:
    levels: list[QualityName] = ["best", "balanced", "fast"]
    brown = BrownOut(levels[: levels.index(floor) + 1], LIMITS)
    now, before = 0.0, brown.level
    for queued, passed in steps:
        now += passed
        level = brown.observe(queued, now)
        assert abs(QUALITY_NAMES.index(level) - QUALITY_NAMES.index(before)) <= 1
        assert QUALITY_NAMES.index(level) >= QUALITY_NAMES.index(floor)
        before = level


@pytest.mark.parametrize(
    ("floor", "levels"),
    [("fast", ["balanced", "fast"]), ("balanced", ["balanced"]), ("best", ["balanced"])],
)
def test_levels_down_to_ends_at_the_floor(floor: QualityName, levels: list[str]) -> None:
    assert levels_down_to(floor) == levels


def test_changed_levels_apply_at_once() -> None:
    brown = three_levels()
    for now in (0.0, 1.0):
        brown.observe(2.0, now)
    assert brown.level == "fast"
    brown.change_levels(["best", "balanced"])
    assert [brown.level, brown.observe(2.0, 2.0)] == ["balanced", "balanced"]
    brown.change_levels(["best", "balanced", "fast"])
    assert [brown.level, brown.observe(2.0, 3.0)] == ["balanced", "fast"]


@pytest.mark.parametrize(
    ("floor", "level", "expected"),
    [
        ("fast", "fast", "fast"), ("balanced", "fast", "balanced"), ("best", "fast", "balanced"),
        ("fast", "balanced", "balanced"), ("best", "best", "best"),
    ],
)  # fmt: skip
def test_the_floor_of_a_model_raises_its_level_up_to_the_normal_one(
    floor: QualityName, level: QualityName, expected: QualityName
) -> None:
    assert kept_above(floor, level) == expected


def test_levels_end_at_the_lowest_floor() -> None:
    assert levels_down_to("best", "fast", "balanced") == ["balanced", "fast"]
