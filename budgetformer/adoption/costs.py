"""Measure the time and price of a checkpoint's quality levels on this machine."""

from __future__ import annotations

import statistics
import time

import torch

from budgetformer.checkpoint.manifest import FULL, Timing
from budgetformer.checkpoint.store import Checkpoint
from budgetformer.classifier import Classifier
from budgetformer.cost.processor import processor_name
from budgetformer.training.data import Examples

TEXTS, ROUNDS = 512, 3


def measure_levels(checkpoint: Checkpoint, examples: Examples, core_hour_price: float) -> Timing:
    """Time every named quality level, and the full budget, on batches of texts.

    Times include tokenization. The levels take turns; the time of a level is the median of its
    rounds.

    Args:
        checkpoint: checkpoint to time.
        examples: texts, of which an even sample is used.
        core_hour_price: price of one core for an hour, in any currency.
    """
    sample = examples.evenly(TEXTS)
    classifier = Classifier(checkpoint.path)
    levels: list[str | None] = [*checkpoint.manifest.named_levels, None]
    seconds: dict[str, list[float]] = {level or FULL: [] for level in levels}
    for turn in range(ROUNDS + 1):
        for level in levels:
            heads = checkpoint.num_heads if level is None else None
            began = time.perf_counter()
            classifier(sample.texts, sample.pairs, level, heads)
            if turn:  # the first round warms up
                seconds[level or FULL].append(time.perf_counter() - began)
    return Timing(
        processor=processor_name(),
        threads=torch.get_num_threads(),
        precision=classifier.network.precision,
        texts=len(sample.texts),
        milliseconds={
            name: 1000 * statistics.median(rounds) / len(sample.texts)
            for name, rounds in seconds.items()
        },
        core_hour_price=core_hour_price,
    )
