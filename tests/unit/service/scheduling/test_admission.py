"""Admission of requests: room in the queue, deadlines, and when to retry."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.scheduling.admission import MARGIN, Refusal, admit

PROPERTY = settings(max_examples=200, deadline=None, derandomize=True, database=None)

seconds = st.floats(0, 1000)


def ask(**changes: Any) -> Refusal | None:
    """Ask for one item with much time at a half full queue, with arguments changed."""
    arguments: dict[str, Any] = {
        "items": 1,
        "queued_items": 5,
        "max_items": 10,
        "queued_seconds": 1.0,
        "price": 0.1,
        "remaining": 60.0,
    }
    return admit(**arguments | changes)


def test_a_request_is_admitted_if_there_is_room() -> None:
    assert ask() is None


@pytest.mark.parametrize("items", [1, 4, 5])
def test_the_queue_can_be_filled_completely(items: int) -> None:
    assert ask(items=items) is None


@pytest.mark.parametrize("items", [6, 7, 100])
def test_a_request_that_does_not_fit_is_refused_as_a_whole(items: int) -> None:
    refusal = ask(items=items)
    assert refusal is not None
    assert refusal.reason == "queue_full"


def test_a_request_larger_than_the_queue_is_admitted_if_the_queue_is_empty() -> None:
    assert ask(items=11, queued_items=0, queued_seconds=0.0) is None


@pytest.mark.parametrize("remaining", [1.0, 0.5, 0.0, -3.0])
def test_a_deadline_that_cannot_be_met_is_refused(remaining: float) -> None:
    refusal = ask(remaining=remaining)
    assert refusal is not None
    assert refusal.reason == "deadline"


def test_a_deadline_that_can_just_be_met_is_admitted() -> None:
    assert ask(queued_seconds=1.0, price=0.5, remaining=MARGIN + 0.5) is None


def test_a_deadline_within_the_margin_of_the_estimate_is_refused() -> None:
    assert ask(queued_seconds=1.0, price=0.5, remaining=1.55) == Refusal("deadline", 1)
    assert ask(queued_seconds=0.0, price=0.5, remaining=0.5) is None


def test_a_price_above_the_deadline_is_refused() -> None:
    assert ask(queued_items=0, queued_seconds=0.0, price=2.0, remaining=1.0) is not None


@PROPERTY
@given(
    items=st.integers(1, 5000),
    queued_items=st.integers(0, 5000),
    max_items=st.integers(1, 5000),
    queued_seconds=seconds,
    price=seconds,
    remaining=st.floats(-10, 100),
)
def test_retry_after_is_at_least_one_whole_second(**arguments: Any) -> None:
    refusal = admit(**arguments)
    if refusal is not None:
        assert isinstance(refusal.retry_after, int)
        assert refusal.retry_after >= 1
        assert refusal.retry_after <= arguments["queued_seconds"] + arguments["price"] + 11


@PROPERTY
@given(st.integers(1, 100), st.integers(0, 100), st.integers(1, 100), seconds, seconds, seconds)
def test_an_admitted_request_has_room_and_time(
    items: int, queued: int, limit: int, queued_seconds: float, price: float, remaining: float
) -> None:
    if admit(items, queued, limit, queued_seconds, price, remaining) is None:
        assert queued == 0 or queued + items <= limit
        assert queued_seconds + price <= remaining


@PROPERTY
@given(st.integers(1, 20), st.floats(1, 1000))
def test_larger_requests_are_told_to_retry_later(items: int, queued_seconds: float) -> None:
    waits = []
    for extra in (0, 5):
        refusal = ask(items=items + extra, queued_items=10, queued_seconds=queued_seconds)
        assert refusal is not None
        waits.append(refusal.retry_after)
    assert waits == sorted(waits)


def test_retry_after_is_the_time_until_there_is_room() -> None:
    # Five of ten items that take 40 s must be done before five others fit.
    refusal = ask(items=5, queued_items=10, queued_seconds=40.0)
    assert refusal == Refusal("queue_full", 20)


def test_retry_after_is_the_time_until_the_deadline_can_be_met() -> None:
    # 5 s are enough once the queue has shrunk to 4.7 / 1.2 seconds.
    assert ask(queued_seconds=7.2, price=0.3, remaining=5.0) == Refusal("deadline", 4)


def test_retry_after_is_at_most_the_time_of_the_whole_queue() -> None:
    refusal = ask(items=1000, queued_items=10, queued_seconds=12.0)
    assert refusal is not None
    assert refusal.retry_after == 12
