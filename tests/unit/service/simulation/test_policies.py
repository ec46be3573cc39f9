"""Scheduling policies on a simulated device."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from budgetformer.cost.table import CostTable, StepCost
from service.scheduling.buckets import Buckets, lane_of
from service.simulation.device import SimDevice, SimItem, SimRequest
from service.simulation.policies import Mix, capacity, policies, simulate, trace

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True, database=None)

TABLE = CostTable(
    "news:1",
    "cpu",
    "float32",
    (StepCost(1e-4, 0.0, 0.0), StepCost(1e-3, 1e-5, 0.0), StepCost(2e-3, 4e-5, 0.0)),
)
MIX = Mix([(0.5, ()), (0.3, (1,)), (0.2, (1, 2))])


def request(arrived: float, *paths: tuple[int, ...]) -> SimRequest:
    return SimRequest(arrived, [SimItem(100, path) for path in paths], lane_of(len(paths)))


def test_a_lone_text_takes_its_decision_and_its_pass() -> None:
    lone = request(1.0, (1,))
    SimDevice(TABLE, Buckets(0.05, 256)).run([lone])
    assert lone.latency is not None
    assert abs(lone.latency - (1e-4 + 1e-3 + 100e-5)) < 1e-9


def test_step_zero_answers_at_the_decision() -> None:
    easy = request(0.0, ())
    SimDevice(TABLE, Buckets(0.05, 256)).run([easy])
    assert easy.latency == 1e-4


def test_an_escalated_text_runs_twice() -> None:
    hard = request(0.0, (1, 2))
    device = SimDevice(TABLE, Buckets(0.05, 256))
    device.run([hard])
    assert abs(device.busy - (1e-4 + TABLE.batch(1, 100, 1) + TABLE.batch(2, 100, 1))) < 1e-9


@PROPERTY
@given(
    st.lists(
        st.tuples(st.floats(0, 2), st.lists(st.sampled_from([(), (1,), (2,), (1, 2)]), min_size=1)),
        max_size=20,
    )
)
def test_every_text_is_answered_under_every_policy(
    arrivals: list[tuple[float, list[tuple[int, ...]]]],
) -> None:
    for make in policies(TABLE).values():
        requests = [request(time, *paths) for time, paths in arrivals]
        SimDevice(TABLE, make()).run(requests)
        assert all(one.latency is not None and one.latency > 0 for one in requests)


def test_a_trace_is_repeatable_and_has_its_rate() -> None:
    first, again = trace(MIX, 100.0, 0.5), trace(MIX, 100.0, 0.5)
    assert [r.arrived for r in first] == [r.arrived for r in again]
    singles = [r for r in first if len(r.items) == 1]
    assert 2400 < len(singles) < 3600


def test_lanes_protect_single_texts_from_large_requests() -> None:
    rate = 0.8 * capacity(TABLE, MIX)
    seen = {
        name: simulate(TABLE, make(), trace(MIX, rate, 0.5))
        for name, make in policies(TABLE).items()
    }
    assert seen["buckets and lanes"].p99 < 0.5 * seen["one queue"].p99
    assert seen["buckets and lanes"].throughput > 0.98 * seen["one queue"].throughput
