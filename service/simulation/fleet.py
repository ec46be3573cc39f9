"""Simulation of many servers behind a router, request by request, on a sample of the servers.

Servers share only the router, so a sample of them gets its share of the traffic. For routers that
choose at random or in turn, the result is exact in distribution for fleets of any size. For routers
that compare requests in flight it is the usual mean-field approximation, which becomes more precise
with a larger `sample`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal, get_args

import numpy as np

from budgetformer.inference.policy import QualityName
from service.settings import DEFAULT_QUALITY, Settings
from service.simulation.costs import ServerCosts
from service.simulation.engine import SimModel
from service.simulation.server import LEVELS, OUTCOMES, Records, SimServer
from service.simulation.texts import Population
from service.simulation.traffic import Traffic

Router = Literal["random", "turns", "two", "least"]
"""A random server; round robin; the less loaded of two random servers; the least loaded of all."""
ROUTERS: tuple[Router, ...] = get_args(Router)
CHOICES = 65536
"""Number of random choices that are drawn at once."""


@dataclass(frozen=True)
class Fleet:
    """Equal servers behind a router, and their model.

    Attributes:
        model: their only model.
        population: texts of the requests.
        settings: settings of each server.
        cores: number of cores of each server.
        costs: costs outside of passes.
        servers: number of servers.
        sample: number of servers that are simulated.
        router: router before the servers.
    """

    model: SimModel
    population: Population
    settings: Settings
    cores: int
    costs: ServerCosts
    servers: int = 1
    sample: int = 1
    router: Router = "two"

    @property
    def engines(self) -> int:
        """Number of engines of each server."""
        return self.settings.engines or self.cores


@dataclass(frozen=True, eq=False)
class Run:
    """Results of the requests to the sampled servers.

    Attributes:
        fleet: the fleet.
        seconds: time until the last answer, at least the length of the traffic.
        arrived, latency: arrival and latency of each request, in seconds.
        outcome: index of each request's outcome in `OUTCOMES`.
        level: index of each request's level in `LEVELS`.
        texts: number of texts of each request.
        busy: total processor time by kind of process, in seconds.
    """

    fleet: Fleet
    seconds: float
    arrived: np.ndarray
    latency: np.ndarray
    outcome: np.ndarray
    level: np.ndarray
    texts: np.ndarray
    busy: Mapping[str, float]

    @property
    def summary(self) -> Summary:
        """Summary of the run."""
        fleet, answered = self.fleet, self.outcome == OUTCOMES.index("answered")
        count = max(1, int(answered.sum()))
        scale = fleet.servers / fleet.sample / self.seconds
        latency = np.sort(self.latency[answered]) if answered.any() else np.zeros(1)
        processes = {"frontend": fleet.settings.fronts, "engine": fleet.engines, "hub": 1}
        server_seconds = fleet.sample * self.seconds
        levels = {
            level: float((self.level[answered] == index).sum()) / count
            for index, level in enumerate(LEVELS)
        }
        busy = {
            kind: seconds / processes[kind] / server_seconds for kind, seconds in self.busy.items()
        }
        lowered = 1 - levels[DEFAULT_QUALITY] if fleet.settings.quality == "auto" else 0.0
        return Summary(
            sent=len(self.outcome),
            answered=int(answered.sum()),
            refused=int((self.outcome == OUTCOMES.index("refused")).sum()),
            expired=int((self.outcome == OUTCOMES.index("expired")).sum()),
            requests_per_second=float(answered.sum()) * scale,
            texts_per_second=float(self.texts[answered].sum()) * scale,
            p50=float(np.quantile(latency, 0.5)),
            p90=float(np.quantile(latency, 0.9)),
            p99=float(np.quantile(latency, 0.99)),
            levels=levels,
            lowered=lowered,
            busy=busy,
            busy_cores=sum(self.busy.values()) / fleet.cores / server_seconds,
        )


@dataclass(frozen=True)
class Summary:
    """Summary of a run.

    Attributes:
        sent, answered, refused, expired: numbers of requests to the sampled servers.
        requests_per_second, texts_per_second: answered requests and texts of the whole fleet.
        p50, p90, p99: quantiles of the latency of answers, in seconds.
        levels: share of the answers at each quality level.
        lowered: share of the answers whose level was lowered because of load.
        busy: utilization of a process of each kind, on an otherwise idle core.
        busy_cores: utilization of the cores by all processes.
    """

    sent: int
    answered: int
    refused: int
    expired: int
    requests_per_second: float
    texts_per_second: float
    p50: float
    p90: float
    p99: float
    levels: Mapping[QualityName, float]
    lowered: float
    busy: Mapping[str, float]
    busy_cores: float

    @property
    def lost_share(self) -> float:
        """Share of the requests that were refused or expired."""
        return (self.refused + self.expired) / max(1, self.sent)


def requests(
    population: Population, traffic: Traffic, generator: np.random.Generator
) -> Iterator[tuple[float, list[int]]]:
    """Draw requests: the arrival of each, and the indices of its texts in the population."""
    times, sizes = traffic.draw(generator)
    drawn = iter(population.draw(int(sizes.sum()), generator).tolist())
    for at, size in zip(times.tolist(), sizes.tolist(), strict=True):
        yield at, list(islice(drawn, size))


def run(fleet: Fleet, traffic: Traffic, seed: int = 0) -> Run:
    """Simulate a fleet until the last answer; the same seed gives the same run."""
    generator = np.random.default_rng(seed)
    sampled = traffic.times(fleet.sample / fleet.servers)
    texts = fleet.population.texts
    records = Records()
    servers = [
        SimServer(fleet.model, fleet.settings, fleet.cores, fleet.costs, records)
        for _ in range(fleet.sample)
    ]
    choose = _router(fleet.router, servers, generator)
    for number, (at, indices) in enumerate(requests(fleet.population, sampled, generator)):
        server = choose(number, at)
        server.advance(at)
        server.offer([texts[index] for index in indices])
    for server in servers:
        server.advance(float("inf"))
    return Run(
        fleet=fleet,
        seconds=max([traffic.seconds, *(server.now for server in servers)]),
        arrived=np.array(records.arrived),
        latency=np.array(records.latency),
        outcome=np.array(records.outcome),
        level=np.array(records.level),
        texts=np.array(records.texts),
        busy=records.busy,
    )


def _router(
    router: Router, servers: Sequence[SimServer], generator: np.random.Generator
) -> Callable[[int, float], SimServer]:
    """Return a function that chooses a server, given the number and arrival of a request."""
    count = len(servers)
    if router == "turns" or count == 1:
        return lambda number, _: servers[number % count]
    choices = _forever(lambda: generator.integers(count, size=CHOICES).tolist())
    if router == "random":
        return lambda *_: servers[next(choices)]

    def least_loaded(candidates: Sequence[SimServer], at: float) -> SimServer:
        for server in candidates:
            server.advance(at)
        return min(candidates, key=lambda server: server.in_flight)

    if router == "least":
        return lambda number, at: least_loaded(
            [*servers[number % count :], *servers[: number % count]], at
        )

    def two(_: int, at: float) -> SimServer:
        first, second = next(choices), next(choices)
        while second == first:
            second = next(choices)
        return least_loaded((servers[first], servers[second]), at)

    return two


def _forever(draw: Callable[[], list[int]]) -> Iterator[int]:
    while True:
        yield from draw()
