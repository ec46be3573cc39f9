"""How much a server can take, how many of them a traffic needs, and what that costs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from service.simulation.fleet import Fleet, Run, Summary, run
from service.simulation.traffic import Traffic

EXACT = 0.02
"""The rate that a server can take is looked for to this share of it."""
MAX_SERVERS = 1_000_000


@dataclass(frozen=True)
class Goals:
    """What has to hold.

    Attributes:
        p99: seconds, at most.
        lost: share of the requests that are refused or late, at most.
        lowered: share of the answers below the normal quality, at most.
    """

    p99: float
    lost: float = 0.001
    lowered: float = 0.01

    def met_by(self, summary: Summary) -> bool:
        """Tell whether a run met all of them."""
        return (
            summary.answered > 0
            and summary.p99 <= self.p99
            and summary.lost_share <= self.lost
            and summary.lowered <= self.lowered
        )


@dataclass(frozen=True)
class Plan:
    """So many servers, and what they make of the traffic; None: no number of them meets the goals.

    `rate`: requests a second that one server can take.
    """

    rate: float
    servers: int | None
    run: Run | None


def most_rate(fleet: Fleet, traffic: Traffic, goals: Goals, seed: int = 0) -> float:
    """Return the mean requests a second that one server takes within the goals; 0: none at all.

    The shape of the traffic stays as it is, and the sampled servers are the whole fleet.
    """
    whole = replace(fleet, servers=fleet.sample)

    def fits(rate: float) -> bool:
        given = traffic.at_mean(rate * whole.servers)
        return goals.met_by(run(whole, given, seed).summary)

    low = high = 1.0
    while not fits(low):
        low, high = low / 2, low
        if low * traffic.seconds < 1:
            return 0.0
    while low == high or fits(high):
        low, high = high, 2 * high
    while high > low * (1 + EXACT):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def servers_needed(fleet: Fleet, traffic: Traffic, goals: Goals, seed: int = 0) -> Plan:
    """Return how many servers a traffic needs, and a run of so many."""
    rate = most_rate(fleet, traffic, goals, seed)
    if not rate or traffic.mean_rate / rate > MAX_SERVERS:
        return Plan(rate, None, None)
    servers = max(1, math.ceil(traffic.mean_rate / rate))
    chosen = replace(fleet, servers=servers, sample=min(fleet.sample, servers))
    return Plan(rate, servers, run(chosen, traffic, seed))


def price_per_million(fleet: Fleet, summary: Summary, core_hour: float) -> float:
    """Return what a million answered texts cost, in whatever a core costs for an hour."""
    cores = fleet.cores * fleet.servers
    if not summary.texts_per_second:
        return math.inf
    return 1e6 * cores * core_hour / (3600 * summary.texts_per_second)
