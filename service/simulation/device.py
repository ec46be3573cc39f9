"""One engine in virtual time: a cost table in place of a network, the real scheduler's batches."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Protocol

from budgetformer.cost.table import CostTable
from service.scheduling.buckets import Lane, Span


@dataclass(eq=False)
class SimItem:
    """A text: its tokens, and the steps that it will run one after the other (none: step 0)."""

    tokens: int
    steps: tuple[int, ...]
    done: float | None = None


@dataclass(eq=False)
class SimRequest:
    """A request of some texts, and when it arrives."""

    arrived: float
    items: list[SimItem]
    lane: Lane

    @property
    def latency(self) -> float | None:
        """Seconds until its last answer; None while one is missing."""
        times = [item.done for item in self.items]
        if any(time is None for time in times):
            return None
        return max(time for time in times if time is not None) - self.arrived


class Scheduler(Protocol):
    """What forms batches."""

    def __len__(self) -> int:
        """Return how many items wait."""

    def add(self, span: Span[SimRequest]) -> None:
        """Let a span wait; its bucket is the step that its items run next."""

    def take(self) -> list[Span[SimRequest]]:
        """Return the next batch."""


@dataclass
class SimDevice:
    """Run requests through a scheduler on a device that takes what a cost table says.

    As the engine does, it decides the budgets of all that has arrived before each batch.
    """

    table: CostTable
    scheduler: Scheduler
    patience: float = 10.0
    now: float = 0.0
    busy: float = 0.0
    _arrivals: list[tuple[float, int, SimRequest]] = field(default_factory=list)

    def run(self, requests: Sequence[SimRequest], until: float = float("inf")) -> None:
        """Serve requests until all are answered, or the clock passes `until`."""
        self._arrivals = [(request.arrived, n, request) for n, request in enumerate(requests)]
        heapq.heapify(self._arrivals)
        while (self._arrivals or len(self.scheduler)) and self.now < until:
            if not len(self.scheduler) and self._arrivals[0][0] > self.now:
                self.now = self._arrivals[0][0]
            self._decide()
            batch = self.scheduler.take()
            if batch:
                self._compute(batch)

    def _decide(self) -> None:
        came: list[SimRequest] = []
        while self._arrivals and self._arrivals[0][0] <= self.now:
            came.append(heapq.heappop(self._arrivals)[2])
        items = [item for request in came for item in request.items]
        if not items:
            return
        self._spend(self.table.batch(0, sum(item.tokens for item in items), len(items)))
        for request in came:
            self._go_on(request, range(len(request.items)))

    def _go_on(self, request: SimRequest, indices: Iterable[int]) -> None:
        """Let items wait for their next step, in this order; those without one are answered."""
        items, going_on = request.items, []
        for place in indices:
            if items[place].steps:
                going_on.append(place)
            else:
                items[place].done = self.now
        deadline = request.arrived + self.patience
        for step, neighbours in groupby(going_on, lambda place: items[place].steps[0]):
            own = list(neighbours)
            prices = [self.table.share(step, items[place].tokens) for place in own]
            span = Span(request, own, prices, step, request.arrived, deadline, request.lane)
            self.scheduler.add(span)

    def _compute(self, batch: list[Span[SimRequest]]) -> None:
        by_step: dict[int, list[SimItem]] = {}
        for span in batch:
            for item in [span.owner.items[place] for place in span.indices]:
                by_step.setdefault(item.steps[0], []).append(item)
        for step, items in by_step.items():
            self._spend(self.table.batch(step, sum(item.tokens for item in items), len(items)))
            for item in items:
                item.steps = item.steps[1:]
        for span in batch:
            self._go_on(span.owner, span.indices)

    def _spend(self, seconds: float) -> None:
        self.now += seconds
        self.busy += seconds
