"""Measure the time and price of a checkpoint's quality levels on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from budgetformer.checkpoint.manifest import FULL, Manifest, Timing, write_manifest
from budgetformer.checkpoint.store import Checkpoint, read_checkpoint
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


def add_timing(
    folder: Path, examples: Examples, core_hour_price: float, log: Callable[[str], None]
) -> Manifest:
    """Measure the quality levels of the checkpoint in a folder, and write them to its manifest.

    Args:
        folder: checkpoint folder.
        examples, core_hour_price: see `measure_levels`.
        log: function that is called with one line per event.

    Returns:
        The manifest with the times.
    """
    log("measuring time per text")
    checkpoint = read_checkpoint(folder)
    timing = measure_levels(checkpoint, examples, core_hour_price)
    manifest = checkpoint.manifest.model_copy(update={"timing": timing})
    write_manifest(folder, manifest)
    return manifest
