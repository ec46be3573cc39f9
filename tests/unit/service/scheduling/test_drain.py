"""How much longer the queue takes than its price, learned from passes."""

from __future__ import annotations

import pytest

from service.scheduling.drain import MAX_STRETCH, Drain


def stretch_after(*passes: tuple[float, float]) -> float:
    drain = Drain()
    for seconds, priced in passes:
        drain.observe(seconds, priced)
    return drain.stretch


def test_the_stretch_is_1_at_first() -> None:
    assert Drain().stretch == 1.0


@pytest.mark.parametrize("ratio", [1.0, 1.5, 3.0])
def test_passes_slower_than_their_price_raise_the_stretch(ratio: float) -> None:
    assert stretch_after(*[(0.1, 0.1 / ratio)] * 400) == pytest.approx(ratio, rel=0.1)


def test_one_slow_pass_hardly_changes_the_stretch() -> None:
    assert stretch_after(*[(0.01, 0.01)] * 100, (0.05, 0.01)) < 1.1


def test_the_stretch_falls_after_the_load() -> None:
    busy = [(0.1, 0.02)] * 400
    assert stretch_after(*busy) == MAX_STRETCH
    assert stretch_after(*busy, *[(0.1, 0.1)] * 200) < 1.2


def test_the_stretch_is_between_1_and_its_maximum() -> None:
    assert stretch_after(*[(0.1, 1.0)] * 100) == 1.0
    assert stretch_after(*[(1.0, 0.0)] * 100) == MAX_STRETCH
    assert stretch_after(*[(1.0, -1.0)] * 100) == MAX_STRETCH
