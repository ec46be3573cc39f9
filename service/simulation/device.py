"""One engine in virtual time: a cost table in place of a network, the real scheduler's batches."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from budgetformer.cost.table import CostTable
from service.scheduling.buckets import Entry, Lane


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
        """Return how many entries wait."""

    def add(self, entry: Entry[SimItem]) -> None:
        """Let an entry wait."""

    def take(self) -> list[Entry[SimItem]]:
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
        came: list[tuple[SimRequest, SimItem]] = []
        while self._arrivals and self._arrivals[0][0] <= self.now:
            _, _, request = heapq.heappop(self._arrivals)
            came += [(request, item) for item in request.items]
        if not came:
            return
        self._spend(self.table.batch(0, sum(item.tokens for _, item in came), len(came)))
        for request, item in came:
            if not item.steps:
                item.done = self.now
                continue
            deadline = request.arrived + self.patience
            self._wait(Entry(item, 0, 0.0, request.arrived, deadline, request.lane))

    def _wait(self, entry: Entry[SimItem]) -> None:
        step = entry.item.steps[0]
        seconds = self.table.share(step, entry.item.tokens)
        self.scheduler.add(replace(entry, bucket=step, seconds=seconds))

    def _compute(self, batch: list[Entry[SimItem]]) -> None:
        by_step: dict[int, list[SimItem]] = {}
        for entry in batch:
            by_step.setdefault(entry.item.steps[0], []).append(entry.item)
        for step, items in by_step.items():
            self._spend(self.table.batch(step, sum(item.tokens for item in items), len(items)))
        for entry in batch:
            entry.item.steps = entry.item.steps[1:]
            if entry.item.steps:
                self._wait(entry)
            else:
                entry.item.done = self.now

    def _spend(self, seconds: float) -> None:
        self.now += seconds
        self.busy += seconds
