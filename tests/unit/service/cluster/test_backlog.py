"""The estimated backlog of an engine: its last report and the work sent since."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from service.cluster.backlog import Backlog

seconds = st.floats(0, 1e3, allow_nan=False)


def test_a_new_backlog_is_empty() -> None:
    assert Backlog().seconds(7.0) == 0


def test_the_backlog_shrinks_by_a_second_per_second() -> None:
    backlog = Backlog()
    backlog.update("a report", 3.0, now=10.0)
    assert backlog.seconds(10.0) == 3
    assert backlog.seconds(11.5) == 1.5
    assert backlog.seconds(20.0) == 0


def test_work_sent_since_a_report_counts_until_the_next() -> None:
    backlog = Backlog()
    backlog.update(1, 1.0, now=0.0)
    backlog.send(2.0, now=0.0)
    backlog.update(1, 1.0, now=0.5)  # a repeated report changes nothing
    assert backlog.seconds(0.5) == 2.5
    backlog.update(2, 0.25, now=0.5)
    assert backlog.seconds(0.5) == 0.25


@given(st.lists(st.tuples(seconds, seconds), max_size=20))
def test_the_backlog_is_between_zero_and_the_work_sent(
    sent: list[tuple[float, float]],
) -> None:
    backlog, now = Backlog(), 0.0
    for gap, work in sent:
        now += gap
        backlog.send(work, now)
        total = sum(work for _, work in sent)
        assert 0 <= backlog.seconds(now) <= total * (1 + 1e-9) + 1e-9
