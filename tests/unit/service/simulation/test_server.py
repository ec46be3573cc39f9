"""A simulated server: its processes, queues, deadlines and quality levels."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import settings as rules
from hypothesis import strategies as st

from budgetformer.cost.table import StepCost
from service.simulation.costs import EngineCost, ProcessCost, ServerCosts
from service.simulation.server import OUTCOMES
from tests.support.simulated import COSTS, FREE, NOTHING, model, server, text

PROPERTY = rules(max_examples=60, deadline=None, derandomize=True, database=None)
END = float("inf")


def test_the_latency_of_a_lone_request_is_the_sum_of_its_parts() -> None:
    costs = ServerCosts(ProcessCost(0.5, 0.25, 0.001), EngineCost(0.125, 0.0625, 0.03125), way=1.0)
    running, records = server(model(StepCost(2.0, 0.01, 0.5)), costs)
    running.offer([text(1)])
    running.advance(END)
    frontend = 0.5 + 0.25 + 0.1
    engine = 0.125 + 0.0625 + 0.03125 + (2.0 + 1.0 + 0.5)
    assert records.latency[0] == pytest.approx(1.0 + frontend + engine)
    assert records.busy == {
        "frontend": pytest.approx(frontend),
        "engine": pytest.approx(engine),
        "hub": 0,
    }


def test_frontend_and_decision_read_long_texts_in_full() -> None:
    served = model(StepCost(2.0, 0.01, 0))
    steps = (StepCost(0, 0.001, 0), served.table.steps[1])
    served = replace(served, table=replace(served.table, steps=steps))
    running, records = server(served, ServerCosts(ProcessCost(token=0.002)))
    running.offer([replace(text(1), step_0_tokens=1000)])
    running.advance(END)
    assert records.latency[0] == pytest.approx(2.0 + 1.0 + (2.0 + 1.0))


def test_an_escalated_text_runs_twice() -> None:
    running, records = server(model(StepCost(1.0, 0, 0), StepCost(3.0, 0, 0)), NOTHING)
    running.offer([text(1, 2)])
    running.advance(END)
    assert records.latency[0] == pytest.approx(4.0)


@pytest.mark.parametrize(("cores", "first", "second"), [(1, 17.0, 22.0), (2, 11.0, 16.0)])
def test_processes_share_the_cores(cores: int, first: float, second: float) -> None:
    # A text needs three seconds to be read, five to be computed and three to be answered. On one
    # core, the second text is read while the first one is computed, so these five seconds take
    # eight; and answering the first takes six.
    costs = ServerCosts(ProcessCost(text=6.0))
    running, records = server(model(StepCost(5.0, 0, 0)), costs, cores)
    running.offer([text(1)])
    running.offer([text(1)])
    running.advance(END)
    assert list(records.latency) == pytest.approx([first, second])


def test_a_busy_frontend_continues_with_the_next_request_at_lower_cost() -> None:
    costs = ServerCosts(ProcessCost(request=2.0), hub=ProcessCost(request=8.0), among=0.5)
    running, records = server(model(FREE), costs, 3)
    for _ in range(2):
        running.offer([text(1)])
    running.advance(END)
    # Reading takes one second for the first and half a second for the second request.
    assert list(records.latency) == pytest.approx([2.0, 2.5])
    assert records.busy["frontend"] == pytest.approx(1.0 + 3 * 0.5)
    assert records.busy["hub"] == pytest.approx(8.0 + 4.0)


def test_a_large_request_does_not_hold_up_a_single_text() -> None:
    running, records = server(model(StepCost(0.01, 0, 0.02)), NOTHING)
    running.offer([text(1)] * 100)
    running.offer([text(1)])
    running.advance(END)
    assert records.texts[0] == 1
    assert records.latency[0] < 0.2 < records.latency[1]


def test_a_full_queue_refuses() -> None:
    running, records = server(model(StepCost(1.0, 0, 0)), NOTHING, max_queue_items=2)
    for _ in range(5):
        running.offer([text(1)])
    running.advance(END)
    assert [OUTCOMES[o] for o in records.outcome].count("refused") == 3


def test_a_frontend_refuses_what_the_queues_could_not_hold() -> None:
    costs = ServerCosts(ProcessCost(request=1.0, text=100.0))
    running, records = server(model(StepCost(1000.0, 0, 0)), costs, 2, max_queue_items=2)
    for _ in range(3):
        running.offer([text(1)])
    running.advance(END)
    assert OUTCOMES[records.outcome[0]] == "refused"
    # Two were admitted before, at 50.5 seconds each; the refused one was not tokenized.
    assert records.latency[0] == pytest.approx(102.0)


def test_requests_waiting_past_their_deadline_expire() -> None:
    # The price does not include the slow runs until the device has run a batch.
    slow = model(StepCost(1.0, 0, 0))
    running, records = server(
        slow, ServerCosts(engine=EngineCost(run=7.0)), batch_items=1, timeout_ms=6000
    )
    for _ in range(3):
        running.offer([text(1)])
    running.advance(END)
    assert sorted(OUTCOMES[o] for o in records.outcome) == ["answered", "expired", "expired"]


def test_a_deadline_counts_from_the_start_of_the_request() -> None:
    # The second request starts after half a second and is computed after 6.2.
    costs = ServerCosts(ProcessCost(request=1.0), EngineCost(run=2.85))
    running, records = server(model(FREE), costs, 2, batch_items=1, timeout_ms=6000)
    for _ in range(2):
        running.offer([text(1)])
    running.advance(END)
    assert [OUTCOMES[o] for o in records.outcome] == ["answered", "answered"]


def test_quality_recovers_while_the_server_is_idle() -> None:
    running, records = server(
        model(StepCost(0.0, 0, 0.01), StepCost(0.0, 0, 0.1)),
        NOTHING, quality="auto", timeout_ms=60_000,
    )  # fmt: skip
    running.offer([text(2, fast=[1])] * 100)
    running.advance(1.0)
    running.offer([text(2, fast=[1])])
    running.advance(200.0)
    running.offer([text(2, fast=[1])])
    running.advance(END)
    assert [level for _, level in sorted(zip(records.arrived, records.level, strict=True))] == [
        1, 0, 1,
    ]  # fmt: skip


def test_overload_lowers_the_quality_before_requests_are_refused() -> None:
    running, records = server(
        model(StepCost(0.0, 0, 0.01), StepCost(0.0, 0, 0.1)),
        NOTHING, quality="auto", timeout_ms=60_000,
    )  # fmt: skip
    for n in range(400):
        running.advance(n * 0.02)
        running.offer([text(2, fast=[1])])
    running.advance(END)
    levels = list(records.level)
    assert not any(records.outcome)
    assert levels[0] == 1
    assert levels[-1] == 0


PATHS = st.lists(st.sampled_from([(), (1,), (1, 2)]), min_size=1, max_size=20)


@PROPERTY
@given(
    st.lists(st.tuples(st.floats(0, 0.05), PATHS), min_size=1, max_size=40),
    st.integers(1, 3), st.integers(1, 2), st.integers(1, 3),
)  # fmt: skip
def test_every_request_ends_once(
    gaps: list[tuple[float, list[tuple[int, ...]]]], cores: int, fronts: int, engines: int
) -> None:
    running, records = server(
        model(StepCost(1e-3, 1e-5, 0), StepCost(2e-3, 4e-5, 0)), COSTS, cores,
        fronts=fronts, engines=engines, max_queue_items=30, timeout_ms=200, quality="auto",
    )  # fmt: skip
    at = 0.0
    for gap, paths in gaps:
        running.advance(at := at + gap)
        running.offer([text(*path) for path in paths])
    running.advance(END)
    assert running.in_flight == 0
    assert len(records.latency) == len(gaps)
    assert sum(records.texts) == sum(len(paths) for _, paths in gaps)
    assert all(latency > COSTS.way for latency in records.latency)
    # The work does not exceed the time of the cores.
    assert sum(records.busy.values()) <= cores * running.now * (1 + 1e-9)


def test_without_costs_answers_take_no_time() -> None:
    running, records = server(model(FREE), NOTHING)
    running.offer([text(1)] * 3)
    running.advance(END)
    assert records.latency[0] == 0.0
