"""What the quality levels of a checkpoint cost on this machine: time and money."""

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
    """Time every named quality level, and the full budget, on some texts in batches.

    Tokenization counts. The levels take turns; each one's time is the median of its rounds.

    Args:
        checkpoint: what answers.
        examples: texts, of which some are taken evenly.
        core_hour_price: of one core, in any currency.
    """
    some = examples.evenly(TEXTS)
    classifier = Classifier(checkpoint.path)
    levels: list[str | None] = [*checkpoint.manifest.named_levels, None]
    seconds: dict[str, list[float]] = {level or FULL: [] for level in levels}
    for turn in range(ROUNDS + 1):
        for level in levels:
            heads = checkpoint.num_heads if level is None else None
            began = time.perf_counter()
            classifier(some.texts, some.pairs, level, heads)
            if turn:  # the first round warms up
                seconds[level or FULL].append(time.perf_counter() - began)
    return Timing(
        processor=processor_name(),
        threads=torch.get_num_threads(),
        precision=classifier.network.precision,
        texts=len(some.texts),
        milliseconds={
            name: 1000 * statistics.median(own) / len(some.texts) for name, own in seconds.items()
        },
        core_hour_price=core_hour_price,
    )
