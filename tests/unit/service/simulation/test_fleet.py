"""Simulated fleets: queueing theory, routers, samples, and the number of servers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from budgetformer.cost.table import StepCost
from service.simulation.fleet import ROUTERS, Router, run
from service.simulation.plan import Goals, most_rate, price_per_million, servers_needed
from service.simulation.texts import Population
from service.simulation.traffic import bursts, diurnal, steady
from tests.support.simulated import COSTS, fleet, model, settings, text

SECOND = model(StepCost(1.0, 0, 0))
"""A device that takes a second for a batch."""
SINGLE_TEXTS = {"batch_items": 1, "max_queue_items": 10**6}
NEWS = model(StepCost(1e-3, 1e-5, 0), StepCost(2e-3, 4e-5, 0))
TEXTS = [text(), text(1), text(1, 2, fast=[1]), text(2, tokens=30, fast=[])]


def mean_wait(load: float, seconds: float = 8_000.0) -> float:
    seen = run(fleet(SECOND, text(1), settings=settings(**SINGLE_TEXTS)), steady(load, seconds))
    return float(seen.latency.mean()) - 1.0


@pytest.mark.parametrize("load", [0.3, 0.7])
def test_batches_of_one_text_behave_like_an_m_d_1_queue(load: float) -> None:
    assert mean_wait(load) == pytest.approx(load / (2 * (1 - load)), rel=0.12)


@pytest.mark.parametrize("router", ["random", "two"])
def test_routers_with_exponential_service_match_queueing_theory(router: Router) -> None:
    # A random router makes each server an M/M/1 queue. If the router picks the shorter of two
    # queues, load^(2^n - 1) of the servers have n or more requests (Vvedenskaya et al. 1996).
    load, draw = 0.8, np.random.default_rng(3)
    texts = [text(1, tokens=int(n) + 1) for n in draw.exponential(1e6, 5_000)]
    servers = fleet(
        model(StepCost(0, 1e-6, 0)),
        settings=settings(**SINGLE_TEXTS),
        servers=20,
        sample=20,
        router=router,
    )
    seen = run(replace(servers, population=Population(texts)), steady(20 * load, 700.0))
    expected = {
        "random": 1 / (1 - load),
        "two": sum(load ** (2**n - 2) for n in range(1, 10)),
    }[router]
    mean_service = float(np.mean([t.tokens for t in texts])) * 1e-6
    assert seen.latency.mean() == pytest.approx(expected * mean_service, rel=0.12)


def test_littles_law_holds() -> None:
    servers = fleet(NEWS, *TEXTS, costs=replace(COSTS, way=0.0), servers=4, sample=4)
    traffic = steady(600.0, 8.0)
    seen = run(servers, traffic)
    # The number of requests is sampled at points in time, not derived from latencies.
    moments = np.linspace(1, 7, 1000)
    ends = seen.arrived + seen.latency
    inside = [np.count_nonzero((seen.arrived <= at) & (ends > at)) for at in moments]
    counted = (seen.arrived > 1) & (seen.arrived < 7)
    rate = np.count_nonzero(counted) / 6
    assert np.mean(inside) == pytest.approx(rate * seen.latency[counted].mean(), rel=0.06)


@pytest.mark.parametrize("router", ROUTERS)
def test_runs_are_repeatable_and_account_for_every_request(router: Router) -> None:
    chosen = settings(quality="auto", max_queue_items=50, timeout_ms=400)
    servers = fleet(NEWS, *TEXTS, settings=chosen, costs=COSTS, servers=12, sample=4, router=router)
    traffic = bursts(6000.0, 3.0).of_texts(0.3, 40)
    first, again = (run(servers, traffic, seed=5) for _ in range(2))
    assert np.array_equal(first.latency, again.latency)
    assert np.array_equal(first.outcome, again.outcome)
    assert not np.array_equal(first.latency, run(servers, traffic, seed=6).latency)
    summary = first.summary
    assert summary.sent == summary.answered + summary.refused + summary.expired
    assert summary.refused > 0
    assert summary.sent == pytest.approx(traffic.mean_rate * 3.0 / 3, rel=0.2)
    assert sum(summary.levels.values()) == pytest.approx(1.0)


def test_routers_that_read_queues_wait_less_than_a_random_one() -> None:
    servers = fleet(NEWS, *TEXTS, costs=COSTS, servers=8, sample=8)
    p99 = {
        router: run(replace(servers, router=router), steady(2000.0, 3.0)).summary.p99
        for router in ROUTERS
    }
    assert max(p99["least"], p99["two"]) < 0.9 * p99["random"]


def test_a_sample_of_servers_has_the_figures_of_the_fleet() -> None:
    servers = fleet(NEWS, *TEXTS, costs=COSTS, servers=32, sample=32)
    traffic = steady(32 * 250.0, 1.5)
    whole = run(servers, traffic).summary
    part = run(replace(servers, sample=8), traffic).summary
    assert part.texts_per_second == pytest.approx(whole.texts_per_second, rel=0.06)
    assert part.p50 == pytest.approx(whole.p50, rel=0.15)
    assert part.busy_cores == pytest.approx(whole.busy_cores, rel=0.06)


class TestPlan:
    GOALS = Goals(p99=0.1)

    def test_most_rate_is_the_highest_rate_that_meets_the_goals(self) -> None:
        servers, traffic = fleet(NEWS, *TEXTS, costs=COSTS), steady(1.0, 4.0)
        rate = most_rate(servers, traffic, self.GOALS)
        assert self.GOALS.met_by(run(servers, traffic.at_mean(rate)).summary)
        assert not self.GOALS.met_by(run(servers, traffic.at_mean(1.2 * rate)).summary)

    def test_servers_needed_meet_the_goals_at_the_traffic(self) -> None:
        servers = fleet(NEWS, *TEXTS, costs=COSTS, sample=4)
        plan = servers_needed(servers, diurnal(2000.0, 4.0), self.GOALS)
        assert plan.servers is not None
        assert plan.run is not None
        assert plan.servers == np.ceil(2000.0 / plan.rate)
        assert plan.run.summary.lost_share < 0.01
        assert plan.run.summary.requests_per_second == pytest.approx(2000.0, rel=0.06)

    def test_goals_that_no_number_of_servers_meets_have_no_plan(self) -> None:
        plan = servers_needed(fleet(NEWS, *TEXTS, costs=COSTS), steady(10.0, 4.0), Goals(1e-4))
        assert (plan.servers, plan.run) == (None, None)

    def test_a_goal_for_quality_lowers_the_rate(self) -> None:
        # The texts are easy at `fast`, so quality absorbs the overload unless a goal limits that.
        servers = fleet(NEWS, text(2, fast=[]), settings=settings(quality="auto"), costs=COSTS)
        strict, lax = (
            most_rate(servers, steady(1.0, 4.0), Goals(p99=2.0, lowered=share))
            for share in (0.01, 1.0)
        )
        assert strict < 0.9 * lax

    def test_the_price_of_a_million_texts_follows_from_cores_and_rate(self) -> None:
        seen = run(fleet(SECOND, text(1), cores=4), steady(0.5, 1000.0))
        # Four cores at 10 per hour each.
        price = price_per_million(seen.fleet, seen.summary, 10.0)
        assert price == pytest.approx(1e6 * 40 / (3600 * seen.summary.texts_per_second))
