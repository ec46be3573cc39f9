"""Many servers behind a router, of which a sample is simulated, request by request.

Servers share nothing but the router, so a fleet is simulated by a part of it that gets its part of
the traffic. For routers that choose at random or in turn that is exact in distribution, however
large the fleet; for those that look at how much is in flight it is the usual mean-field
approximation, which `sample` makes as good as wanted: the more servers are simulated, the less one
of them shows in what the others get.
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
"""To any server; to the next one; to the emptier of any two; to the emptiest of all."""
ROUTERS: tuple[Router, ...] = get_args(Router)
CHOICES = 65536
"""Drawn at a time."""


@dataclass(frozen=True)
class Fleet:
    """Servers of one kind, and what they serve.

    Attributes:
        model: the only one.
        population: texts of the requests.
        settings: of every server.
        cores: of every server.
        costs: outside of the passes.
        servers: how many there are.
        sample: how many of them are simulated.
        router: before them.
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
        """Engines of a server."""
        return self.settings.engines or self.cores


@dataclass(frozen=True, eq=False)
class Run:
    """What became of the requests of the sampled servers.

    Attributes:
        fleet: of which they are a part.
        seconds: until the last answer, as long as the traffic at least.
        arrived, latency: seconds, of each request.
        outcome: place in `OUTCOMES`, of each.
        level: place in `LEVELS`, of each.
        texts: of each.
        busy: seconds of processor time by kind of process, in all.
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
        """It in short."""
        fleet, answered = self.fleet, self.outcome == OUTCOMES.index("answered")
        count = max(1, int(answered.sum()))
        scale = fleet.servers / fleet.sample / self.seconds
        latency = np.sort(self.latency[answered]) if answered.any() else np.zeros(1)
        processes = {"frontend": fleet.settings.fronts, "engine": fleet.engines, "hub": 1}
        here = fleet.sample * self.seconds
        levels = {
            level: float((self.level[answered] == place).sum()) / count
            for place, level in enumerate(LEVELS)
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
            busy={kind: seconds / processes[kind] / here for kind, seconds in self.busy.items()},
            busy_cores=sum(self.busy.values()) / fleet.cores / here,
        )


@dataclass(frozen=True)
class Summary:
    """A run in short.

    Attributes:
        sent, answered, refused, expired: requests of the sampled servers.
        requests_per_second, texts_per_second: answered by the whole fleet.
        p50, p90, p99: seconds until an answer.
        levels: share of the answers at each quality level.
        lowered: share of the answers whose quality gave way to the load.
        busy: part of the time for which a process of each kind has work to do, were it alone.
        busy_cores: part of the cores that all of them take.
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
        """The share of the requests that were refused or came too late."""
        return (self.refused + self.expired) / max(1, self.sent)


def requests(
    population: Population, traffic: Traffic, draw: np.random.Generator
) -> Iterator[tuple[float, list[int]]]:
    """Draw requests: when each comes, and the places of its texts in the population."""
    times, sizes = traffic.draw(draw)
    drawn = iter(population.draw(int(sizes.sum()), draw).tolist())
    for at, size in zip(times.tolist(), sizes.tolist(), strict=True):
        yield at, list(islice(drawn, size))


def run(fleet: Fleet, traffic: Traffic, seed: int = 0) -> Run:
    """Send a fleet its traffic and wait for the last answer; the same seed gives the same run."""
    draw = np.random.default_rng(seed)
    sampled = traffic.times(fleet.sample / fleet.servers)
    texts = fleet.population.texts
    records = Records()
    servers = [
        SimServer(fleet.model, fleet.settings, fleet.cores, fleet.costs, records)
        for _ in range(fleet.sample)
    ]
    choose = _router(fleet.router, servers, draw)
    for place, (at, asked) in enumerate(requests(fleet.population, sampled, draw)):
        server = choose(place, at)
        server.advance(at)
        server.offer([texts[number] for number in asked])
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
    router: Router, servers: Sequence[SimServer], draw: np.random.Generator
) -> Callable[[int, float], SimServer]:
    """Return what chooses a server for the request of this number at this time."""
    count = len(servers)
    if router == "turns" or count == 1:
        return lambda place, _: servers[place % count]
    choices = _forever(lambda: draw.integers(count, size=CHOICES).tolist())
    if router == "random":
        return lambda *_: servers[next(choices)]

    def emptiest(some: Sequence[SimServer], at: float) -> SimServer:
        for server in some:
            server.advance(at)
        return min(some, key=lambda server: server.in_flight)

    if router == "least":
        return lambda place, at: emptiest(
            [*servers[place % count :], *servers[: place % count]], at
        )

    def two(_: int, at: float) -> SimServer:
        first, second = next(choices), next(choices)
        while second == first:
            second = next(choices)
        return emptiest((servers[first], servers[second]), at)

    return two


def _forever(draw: Callable[[], list[int]]) -> Iterator[int]:
    while True:
        yield from draw()
