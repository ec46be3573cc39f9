"""Traffic with repeated texts."""

from __future__ import annotations

import pytest

from loadtests.texts import with_repeats

NEW = [f"text {number}" for number in range(2000)]


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5])
def test_repeated_texts_have_the_requested_share(share: float) -> None:
    sent = with_repeats(NEW, share, seed=1)
    assert len(sent) == len(NEW)
    first = list(dict.fromkeys(sent))
    assert first == NEW[: len(first)], "new texts keep their order"
    assert 1 - len(first) / len(sent) == pytest.approx(share, abs=0.03)


def test_the_same_seed_gives_the_same_traffic() -> None:
    assert with_repeats(NEW, 0.2, seed=1) == with_repeats(NEW, 0.2, seed=1)
    assert with_repeats(NEW, 0.2, seed=1) != with_repeats(NEW, 0.2, seed=2)
