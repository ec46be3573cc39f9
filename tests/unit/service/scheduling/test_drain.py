from __future__ import annotations

import pytest

from service.scheduling.drain import MAX_STRETCH, Drain


def after(*passes: tuple[float, float]) -> float:
    drain = Drain()
    for seconds, priced in passes:
        drain.observe(seconds, priced)
    return drain.stretch


def test_a_queue_is_worth_its_price_until_something_else_is_seen() -> None:
    assert Drain().stretch == 1.0


@pytest.mark.parametrize("ratio", [1.0, 1.5, 3.0])
def test_what_takes_longer_than_its_price_stretches_the_queue(ratio: float) -> None:
    assert after(*[(0.1, 0.1 / ratio)] * 400) == pytest.approx(ratio, rel=0.1)


def test_one_slow_pass_is_no_proof() -> None:
    assert after(*[(0.01, 0.01)] * 100, (0.05, 0.01)) < 1.1


def test_it_follows_when_the_machine_has_time_again() -> None:
    busy = [(0.1, 0.02)] * 400
    assert after(*busy) == MAX_STRETCH
    assert after(*busy, *[(0.1, 0.1)] * 200) < 1.2


def test_nothing_makes_a_queue_shorter_than_its_price_or_endless() -> None:
    assert after(*[(0.1, 1.0)] * 100) == 1.0
    assert after(*[(1.0, 0.0)] * 100) == MAX_STRETCH
    assert after(*[(1.0, -1.0)] * 100) == MAX_STRETCH
