"""Measure a network's cost table on this device."""

from __future__ import annotations

import statistics
import time

import torch

from budgetformer.cost.table import CostTable, Measurement, fit_table
from budgetformer.inference.packed import PackedPass, PackedTokens

GRID = ((1, 16), (1, 64), (4, 40), (8, 24), (8, 64), (24, 40))
"""Timed batches: (items, tokens per item)."""
GPU_GRID = (*GRID, (64, 24), (64, 64), (200, 40), (256, 64))
"""Timed batches on a GPU; only the larger ones use all of it."""
ROUNDS = 5


def measure_costs(network: PackedPass, model: str) -> CostTable:
    """Time the decision and every ladder step on several batch sizes; return the cost table.

    Takes a few seconds for a small encoder. Batches take turns; times are medians.

    Args:
        network: pass to time, in the precision to be served.
        model: `name:version` of the model, stored in the table.
    """
    longest = network.config.max_position_embeddings
    sizes = GPU_GRID if network.device.type == "cuda" else GRID
    grid = [(items, min(tokens, longest)) for items, tokens in sizes]
    steps = range(network.config.num_steps + 1)
    rounds: dict[tuple[int, int, int], list[float]] = {
        (step, *size): [] for step in steps for size in grid
    }
    for turn in range(ROUNDS + 1):
        for (step, items, tokens), seconds in rounds.items():
            elapsed = _time(network, step, items, tokens)
            if turn:
                seconds.append(elapsed)
    measured = [
        Measurement(step, items * tokens, items, statistics.median(seconds))
        for (step, items, tokens), seconds in rounds.items()
    ]
    return fit_table(model, network.device.type, network.precision, measured)


def _time(network: PackedPass, step: int, items: int, tokens: int) -> float:
    packed = PackedTokens.filler([tokens] * items)
    ranking = network.decide(packed).ranking if step and network.sizes.picks_heads else None
    _wait(network)
    started = time.perf_counter()
    if step:
        network.run(packed, [step] * items, ranking=ranking)
    else:
        network.decide(packed)
    _wait(network)
    return time.perf_counter() - started


def _wait(network: PackedPass) -> None:
    if network.device.type == "cuda":
        torch.cuda.synchronize()
