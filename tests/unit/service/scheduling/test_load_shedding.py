"""Load shedding: which requests a frontend refuses before it reads their bodies."""

from __future__ import annotations

import pytest

from service.scheduling.load_shedding import GROWTH, LATE_SHARE, RATE_SECONDS, LoadShedding

NOW = 100.0


def full(texts: int = 100, seconds: float = 10.0) -> LoadShedding:
    """Return load shedding at a number of texts with a deadline of `seconds`."""
    shedding = LoadShedding()
    shedding.enter(texts, seconds, NOW)
    return shedding


def test_nothing_is_shed_before_the_first_refusal() -> None:
    assert not full().sheds(10**9, NOW)


def test_a_refusal_sheds_bodies_of_at_least_its_size() -> None:
    shedding = full()
    shedding.learn_refusal(1000, others=100)
    assert shedding.sheds(1000, NOW)
    assert shedding.sheds(5000, NOW)
    assert not shedding.sheds(500, NOW)
    shedding.learn_refusal(200, others=100)
    assert shedding.sheds(200, NOW)


def test_a_request_that_leaves_makes_room() -> None:
    shedding = full()
    shedding.learn_refusal(1000, others=100)
    shedding.leave(1, answered=False, now=NOW)
    assert not shedding.sheds(1000, NOW)
    shedding.enter(1, 10.0, NOW)
    assert shedding.sheds(1000, NOW)


def test_answers_widen_the_window_until_the_next_refusal() -> None:
    shedding = full()
    shedding.learn_refusal(1000, others=100)
    admitted = 0
    for _ in range(50):
        shedding.leave(1, answered=True, now=NOW)
        while not shedding.sheds(1000, NOW):
            shedding.enter(1, 10.0, NOW)
            admitted += 1
    assert admitted == pytest.approx(50 * (1 + GROWTH), abs=1)
    shedding.learn_refusal(1000, others=100)
    assert shedding.sheds(1000, NOW)
    shedding.leave(shedding.texts - 99, answered=False, now=NOW)
    assert not shedding.sheds(1000, NOW)


def test_large_bodies_have_their_own_window() -> None:
    shedding = full()
    shedding.learn_refusal(1000, others=100)
    shedding.learn_refusal(100_000, others=60)
    shedding.leave(10, answered=False, now=NOW)
    assert not shedding.sheds(1000, NOW)
    assert shedding.sheds(100_000, NOW)


def test_windows_are_forgotten_when_no_request_is_left() -> None:
    shedding = full()
    shedding.learn_refusal(1000, others=10)
    shedding.leave(100, answered=False, now=NOW)
    shedding.enter(1000, 10.0, NOW)
    assert not shedding.sheds(1000, NOW)


def test_refusals_alone_or_of_unknown_size_are_ignored() -> None:
    shedding = full()
    shedding.learn_refusal(1000, others=0)
    shedding.learn_refusal(None, others=100)
    assert not shedding.sheds(10**9, NOW)


def test_only_deadlines_near_the_longest_count_as_late() -> None:
    shedding = full(seconds=10.0)
    assert not shedding.is_late_deadline(1.0)
    assert shedding.is_late_deadline(10.0)
    assert shedding.is_late_deadline(9.5)


def test_a_long_deadline_is_forgotten_after_a_while() -> None:
    shedding = full(seconds=10.0)
    for second in range(300):
        shedding.enter(1, 1.0, NOW + second)
    assert shedding.is_late_deadline(1.0)


def test_a_delayed_frontend_sheds_all_for_as_long_as_it_was_delayed() -> None:
    shedding = full(seconds=10.0)
    shedding.note_delay(LATE_SHARE * 10.0 - 0.01, NOW)
    assert not shedding.sheds(1, NOW)
    shedding.note_delay(2.0, NOW)
    shedding.note_delay(0.0, NOW)  # the next request of the same turn has no delay
    assert shedding.sheds(1, NOW + 1.9)
    assert not shedding.sheds(1, NOW + 2.1)


def test_the_delay_of_an_idle_frontend_is_ignored() -> None:
    shedding = LoadShedding()
    shedding.note_delay(2.0, NOW)
    assert not shedding.sheds(1, NOW)


@pytest.mark.parametrize("rate", [5, 20, 100])
def test_retry_after_is_the_time_to_answer_the_texts(rate: int) -> None:
    shedding = full(100_000)
    for second in range(60):
        shedding.leave(rate, answered=True, now=NOW + second)
    end = NOW + 59
    assert shedding.retry_after(20 * rate, end) == pytest.approx(20, abs=3)
    assert shedding.retry_after(1e9, end) == 60
    assert shedding.retry_after(0.0, end) == 1


def test_retry_after_is_short_before_the_first_answer() -> None:
    assert full().retry_after(100, NOW) == 1
    assert full().shed_seconds(1000, NOW) == 1


def test_retry_after_grows_when_answers_stop() -> None:
    shedding = full(1000)
    for second in range(20):
        shedding.leave(10, answered=True, now=NOW + second)
    soon = shedding.retry_after(100, NOW + 20)
    assert shedding.retry_after(100, NOW + 20 + RATE_SECONDS) > soon
