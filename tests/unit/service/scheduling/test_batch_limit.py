"""The limit of batch sizes after memory ran out."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from service.scheduling.batch_limit import FULL_BATCHES, STEPS, BatchLimit

PROPERTY = settings(max_examples=100, deadline=None, derandomize=True, database=None)


def test_the_limit_grows_back_after_full_batches_succeed() -> None:
    limit = BatchLimit(256)
    limit.shrink(3)
    assert limit.items == 3
    batches = 0
    while limit.items < 256:
        limit.succeeded(limit.items)
        batches += 1
    assert batches == FULL_BATCHES * STEPS
    limit.succeeded(256)
    assert limit.items == 256


def test_smaller_batches_do_not_raise_the_limit() -> None:
    limit = BatchLimit(256)
    limit.shrink(100)
    for _ in range(1000):
        limit.succeeded(99)
    assert limit.items == 100


def test_few_batches_fail_while_memory_stays_short() -> None:
    limit, room, failed, done = BatchLimit(256), 40, 0, 0
    for _ in range(1000):
        if limit.items > room:
            failed += 1
            limit.shrink(room // 2)
        else:
            done += limit.items
            limit.succeeded(limit.items)
    assert failed < 1000 / FULL_BATCHES / 2 + 2
    assert done > 0.6 * 1000 * room


@PROPERTY
@given(st.integers(1, 300), st.lists(st.integers(-300, 300)))
def test_the_limit_is_between_one_and_the_configured_size(
    configured: int, batches: list[int]
) -> None:
    limit = BatchLimit(configured)
    for size in batches:
        if size <= 0:
            limit.shrink(-size)
        else:
            limit.succeeded(size)
        assert 1 <= limit.items <= configured
