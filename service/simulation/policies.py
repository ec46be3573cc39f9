"""Compare batching policies in virtual time on one device.

python -m service.simulation.policies CHECKPOINT COST_TABLE
"""

from __future__ import annotations

import random
import statistics
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from budgetformer.checkpoint.store import Checkpoint, read_checkpoint
from budgetformer.cost.table import CostTable, read_tables
from budgetformer.inference.policy import QUALITY_NAMES, BudgetRule
from service.scheduling.buckets import Buckets, Lane, Span, lane_of
from service.simulation.device import Scheduler, SimDevice, SimItem, SimRequest
from service.simulation.texts import paths_with_shares

BATCH_SECONDS, BATCH_ITEMS = 0.05, 256
SECONDS = 60.0
BULK = 512


class OneQueue:
    """First come, first served: a batch is the head of one queue, with items of all steps."""

    def __init__(self) -> None:
        self._queue: deque[Span[SimRequest]] = deque()
        """Spans of one item each."""

    def __len__(self) -> int:
        """Return the number of waiting items."""
        return len(self._queue)

    def add(self, span: Span[SimRequest]) -> None:
        """Append the items of a span to the queue."""
        while len(span) > 1:
            self._queue.append(span.cut(1))
        self._queue.append(span)

    def take(self) -> list[Span[SimRequest]]:
        """Return as many items from the head of the queue as fit into a batch."""
        batch: list[Span[SimRequest]] = []
        seconds = 0.0
        while self._queue and len(batch) < BATCH_ITEMS:
            (price,) = self._queue[0].prices
            if batch and seconds + price > BATCH_SECONDS:
                break
            batch.append(self._queue.popleft())
            seconds += price
        return batch


class OneLane(Buckets[SimRequest]):
    """Buckets by step, without a separate lane for large requests."""

    def add(self, span: Span[SimRequest]) -> None:
        """Add a span to its bucket."""
        super().add(replace(span, lane="interactive"))


def policies(table: CostTable) -> dict[str, Callable[[], Scheduler]]:
    """Return the policies to compare, by name."""

    def constant(step: object) -> float:
        assert isinstance(step, int)
        return table.constant(step)

    return {
        "one queue": OneQueue,
        "buckets by step": lambda: OneLane(BATCH_SECONDS, BATCH_ITEMS, constant),
        "buckets and lanes": lambda: Buckets(BATCH_SECONDS, BATCH_ITEMS, constant),
    }


@dataclass(frozen=True)
class Mix:
    """Distribution of texts: weights of the paths of steps, and mean tokens."""

    paths: Sequence[tuple[float, tuple[int, ...]]]
    mean_tokens: float = 50.0

    @classmethod
    def of(cls, rules: Sequence[BudgetRule]) -> Mix:
        """Return the mix of calibrated rules with equally many requests each."""
        return cls([path for rule in rules for path in paths_with_shares(rule)])

    def item(self, draw: random.Random) -> SimItem:
        """Draw a text."""
        shares = [share for share, _ in self.paths]
        steps = draw.choices([steps for _, steps in self.paths], shares)[0]
        tokens = max(4, min(256, round(draw.lognormvariate(0, 0.5) * self.mean_tokens)))
        return SimItem(tokens, steps)


def trace(mix: Mix, rate: float, bulk_share: float, seed: int = 0) -> list[SimRequest]:
    """Draw a minute of Poisson arrivals: `rate` texts per second, a share in large requests."""
    draw = random.Random(seed)
    requests: list[SimRequest] = []
    for size, texts in ((1, rate * (1 - bulk_share)), (BULK, rate * bulk_share)):
        time = 0.0
        while texts and (time := time + draw.expovariate(texts / size)) < SECONDS:
            lane: Lane = lane_of(size)
            requests.append(SimRequest(time, [mix.item(draw) for _ in range(size)], lane))
    return requests


@dataclass(frozen=True)
class Outcome:
    """Texts per second, and latency (s) of single texts (p50, p99) and large requests (p50)."""

    throughput: float
    p50: float
    p99: float
    bulk_p50: float


def simulate(table: CostTable, scheduler: Scheduler, requests: Sequence[SimRequest]) -> Outcome:
    """Simulate a trace to its end."""
    device = SimDevice(table, scheduler)
    device.run(requests)
    items = sum(len(request.items) for request in requests)

    def latencies(lane: Lane) -> list[float]:
        return sorted(r.latency or 0.0 for r in requests if r.lane == lane) or [0.0]

    single = latencies("interactive")
    return Outcome(
        throughput=items / device.now,
        p50=statistics.median(single),
        p99=single[int(0.99 * (len(single) - 1))],
        bulk_p50=statistics.median(latencies("bulk")),
    )


def capacity(table: CostTable, mix: Mix) -> float:
    """Return the texts per second that full batches reach with buckets by step."""
    overload = trace(mix, 20_000.0, 0.0)[:20_000]
    return simulate(table, policies(table)["buckets by step"](), overload).throughput


def compare(checkpoint: Checkpoint, table: CostTable) -> str:
    """Return a Markdown table of every policy under several loads."""
    mix = Mix.of([checkpoint.rule(name) for name in QUALITY_NAMES])
    full = capacity(table, mix)
    lines = [
        f"Capacity in full batches: {full:.0f} texts per second.",
        "",
        "| load | large requests | policy | texts/s | p50 ms | p99 ms | large requests, p50 ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for load in (0.5, 0.8, 1.5):
        for bulk in (0.0, 0.5):
            for name, make in policies(table).items():
                outcome = simulate(table, make(), trace(mix, load * full, bulk))
                cells = [f"{load:.0%}", f"{bulk:.0%}", name, f"{outcome.throughput:.0f}"]
                cells += [f"{1000 * s:.1f}" for s in (outcome.p50, outcome.p99)]
                cells += [f"{1000 * outcome.bulk_p50:.0f}" if bulk else ""]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Print the comparison."""
    checkpoint = read_checkpoint(Path(sys.argv[1]))
    table = read_tables(Path(sys.argv[2]))[checkpoint.label]
    sys.stdout.write(compare(checkpoint, table) + "\n")


if __name__ == "__main__":
    main()
