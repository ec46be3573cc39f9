"""Capacity planning: the highest rate of a server, the number of servers, and their price."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from service.simulation.fleet import Fleet, Run, Summary, run
from service.simulation.traffic import Traffic

EXACT = 0.02
"""Relative precision of the highest rate."""
MAX_SERVERS = 1_000_000


@dataclass(frozen=True)
class Goals:
    """Service-level goals.

    Attributes:
        p99: highest 99th percentile of the latency, in seconds.
        lost: highest share of requests that are refused or expire.
        lowered: highest share of answers below the normal quality.
    """

    p99: float
    lost: float = 0.001
    lowered: float = 0.01

    def met_by(self, summary: Summary) -> bool:
        """Return whether a run met all goals."""
        return (
            summary.answered > 0
            and summary.p99 <= self.p99
            and summary.lost_share <= self.lost
            and summary.lowered <= self.lowered
        )


@dataclass(frozen=True)
class Plan:
    """Number of servers for some traffic.

    Attributes:
        rate: highest requests per second of one server within the goals.
        servers: number of servers; None: no number meets the goals.
        run: simulation of these servers; None as `servers`.
    """

    rate: float
    servers: int | None
    run: Run | None


def most_rate(fleet: Fleet, traffic: Traffic, goals: Goals, seed: int = 0) -> float:
    """Return the highest mean requests per second of one server within the goals; 0: none.

    The shape of the traffic is kept, and the sampled servers are the whole fleet.
    """
    sampled = replace(fleet, servers=fleet.sample)

    def fits(rate: float) -> bool:
        scaled = traffic.at_mean(rate * sampled.servers)
        return goals.met_by(run(sampled, scaled, seed).summary)

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
    """Return the number of servers that some traffic needs, and a run with that number."""
    rate = most_rate(fleet, traffic, goals, seed)
    if not rate or traffic.mean_rate / rate > MAX_SERVERS:
        return Plan(rate, None, None)
    servers = max(1, math.ceil(traffic.mean_rate / rate))
    planned = replace(fleet, servers=servers, sample=min(fleet.sample, servers))
    return Plan(rate, servers, run(planned, traffic, seed))


def price_per_million(fleet: Fleet, summary: Summary, core_hour: float) -> float:
    """Return the price of a million answered texts; `core_hour` is the price of a core-hour."""
    cores = fleet.cores * fleet.servers
    if not summary.texts_per_second:
        return math.inf
    return 1e6 * cores * core_hour / (3600 * summary.texts_per_second)
