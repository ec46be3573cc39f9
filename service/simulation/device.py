"""Simulation of one device with the real scheduler and a cost table instead of a network."""

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
    """A text: its tokens, and the ladder steps that it will run; empty: step 0 answers it."""

    tokens: int
    steps: tuple[int, ...]
    done: float | None = None


@dataclass(eq=False)
class SimRequest:
    """A request: its arrival, its texts and its lane."""

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
    """A policy that forms batches."""

    def __len__(self) -> int:
        """Return the number of waiting items."""

    def add(self, span: Span[SimRequest]) -> None:
        """Let a span wait; its bucket is the step that its items run next."""

    def take(self) -> list[Span[SimRequest]]:
        """Return the next batch."""


@dataclass
class SimDevice:
    """A device whose passes take the time that a cost table predicts.

    Like an engine, it decides the budgets of all arrived requests before each batch.

    Attributes:
        table: cost table.
        scheduler: forms the batches.
        patience: seconds from arrival to deadline.
        now: present time, in seconds.
        busy: total time of all passes, in seconds.
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
        arrived: list[SimRequest] = []
        while self._arrivals and self._arrivals[0][0] <= self.now:
            arrived.append(heapq.heappop(self._arrivals)[2])
        items = [item for request in arrived for item in request.items]
        if not items:
            return
        self._spend(self.table.batch(0, sum(item.tokens for item in items), len(items)))
        for request in arrived:
            self._advance(request, range(len(request.items)))

    def _advance(self, request: SimRequest, indices: Iterable[int]) -> None:
        """Let items wait for their next step, in this order; answer those without a next step."""
        items, waiting = request.items, []
        for index in indices:
            if items[index].steps:
                waiting.append(index)
            else:
                items[index].done = self.now
        deadline = request.arrived + self.patience
        for step, group in groupby(waiting, lambda index: items[index].steps[0]):
            same_step = list(group)
            prices = [self.table.share(step, items[index].tokens) for index in same_step]
            span = Span(request, same_step, prices, step, request.arrived, deadline, request.lane)
            self.scheduler.add(span)

    def _compute(self, batch: list[Span[SimRequest]]) -> None:
        by_step: dict[int, list[SimItem]] = {}
        for span in batch:
            for item in [span.owner.items[index] for index in span.indices]:
                by_step.setdefault(item.steps[0], []).append(item)
        for step, items in by_step.items():
            self._spend(self.table.batch(step, sum(item.tokens for item in items), len(items)))
            for item in items:
                item.steps = item.steps[1:]
        for span in batch:
            self._advance(span.owner, span.indices)

    def _spend(self, seconds: float) -> None:
        self.now += seconds
        self.busy += seconds
