"""Time the compact pass at every ladder step, interleaved, as ratios to the full step."""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from budgetformer import cascade
from budgetformer.cascade import Work
from budgetformer.checkpoint import Checkpoint
from budgetformer.classifier import load_network
from budgetformer.compact import PackedPass
from budgetformer.cost import encoder_macs
from budgetformer.policy import BudgetRule

LENGTHS = (12, 80)
"""Tokens of the made-up texts, from and to."""


@dataclass(frozen=True)
class Timing:
    """One step at one batch size: milliseconds (median, quartiles), and ratios to the full step."""

    batch: int
    step: int
    median_ms: float
    low_ms: float
    high_ms: float
    time_ratio: float
    macs_ratio: float

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    def cells(self) -> tuple[str, ...]:
        """Return the line as a table shows it."""
        return (
            str(self.batch),
            str(self.step),
            f"{self.time_ratio:.2f}",
            f"{self.macs_ratio:.2f}",
            f"{self.median_ms:.2f}",
            f"{self.low_ms:.2f}..{self.high_ms:.2f}",
        )


def time_steps(
    checkpoint: Checkpoint,
    batches: tuple[int, ...] = (1, 8, 32),
    repeats: int = 15,
    threads: int = 1,
) -> list[Timing]:
    """Time every step of a checkpoint on random tokens of natural lengths."""
    torch.set_num_threads(threads)
    network = load_network(checkpoint)
    steps = range(1, network.config.num_steps + 1)
    results = []
    for batch in batches:
        items = _items(network, batch)
        taken: dict[int, list[float]] = {step: [] for step in steps}
        for repeat in range(repeats + 1):
            for step in steps:
                seconds = _time(network, items, step)
                if repeat:  # the first round warms up
                    taken[step].append(seconds)
        full = statistics.median(taken[steps[-1]])
        full_macs = _macs(network, items, steps[-1])
        for step in steps:
            low, median, high = statistics.quantiles(taken[step], n=4)
            results.append(
                Timing(
                    batch,
                    step,
                    1000 * median,
                    1000 * low,
                    1000 * high,
                    median / full,
                    _macs(network, items, step) / full_macs,
                )
            )
    return results


def _items(network: PackedPass, batch: int) -> list[Work]:
    draw = random.Random(0)
    longest = min(LENGTHS[1], network.config.max_position_embeddings)
    rule = BudgetRule(point=None, num_steps=network.config.num_steps, fixed=1)
    items = []
    for _ in range(batch):
        length = draw.randint(min(LENGTHS[0], longest), longest)
        ids = [draw.randrange(1, network.config.vocab_size) for _ in range(length)]
        items.append(Work(ids, None, rule))
    cascade.arrive(network, items)
    return items


def _time(network: PackedPass, items: list[Work], step: int) -> float:
    started = time.perf_counter()
    cascade.compute(network, items, [step] * len(items))
    return time.perf_counter() - started


def _macs(network: PackedPass, items: list[Work], step: int) -> int:
    plan = network.config.heads_per_layer(step)
    return sum(encoder_macs(network.config, plan, len(item.ids)) for item in items)
