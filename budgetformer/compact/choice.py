"""Choose the pass that runs a network fastest on the machine at hand."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from budgetformer.compact.linear import lay_out, worth_a_try
from budgetformer.compact.packed import PackedPass, PackedTokens
from budgetformer.cost import Sizes
from budgetformer.modules import SequenceClassifier
from budgetformer.ranges import LayerRanges

BATCHES = ((40,), (40,) * 8)
"""Tokens of the items that are timed: a lone text, and a small batch."""
ROUNDS = 5
GAIN = 1.2
"""A lower precision must be so many times as fast as float32, or it is not worth its error."""
FEWEST_WEIGHTS = 2**20
"""An encoder with fewer gains nothing: its time is that of the calls."""


def make_pass(
    model: SequenceClassifier, precision: str, ranges: Sequence[LayerRanges] = ()
) -> PackedPass:
    """Return the pass of a network in one precision, where its weights are."""
    if precision == "int8":
        sizes = Sizes.of(model.config)
        alike = sizes.picks_heads or sizes.layerwise
        own = [lay_out(precision, of_layer, alike) for of_layer in ranges]
        return PackedPass(model, precision, lay_outs=own)
    if model.where.type != "cuda":
        return PackedPass(model, precision)
    from budgetformer.compact.graphs import GraphedPass
    from budgetformer.compact.kernels import gpu

    return GraphedPass(model, precision, gpu)


def fastest_pass(
    model: SequenceClassifier, precisions: Sequence[str], ranges: Sequence[LayerRanges]
) -> PackedPass:
    """Time the pass in each precision on made-up texts at the middle step, and return the best.

    A fraction of a second, for a small encoder on a CPU.
    """
    if sum(p.numel() for p in model.encoder.layers.parameters()) < FEWEST_WEIGHTS:
        precisions = precisions[:1]
    if len(precisions) > 1:
        precisions = [name for name in precisions if worth_a_try(name, model.where)]
    there = [make_pass(model, precision, ranges) for precision in precisions]
    if len(there) == 1:
        return there[0]
    seconds = _time(there)
    best, least = min(zip(there, seconds, strict=True), key=lambda pair: pair[1])
    chosen = best if seconds[0] / least >= GAIN else there[0]
    chosen.forget()
    return chosen


def _time(passes: list[PackedPass]) -> list[float]:
    taken: list[list[float]] = [[] for _ in passes]
    for turn in range(ROUNDS + 1):
        for network, own in zip(passes, taken, strict=True):
            started = time.perf_counter()
            for lengths in BATCHES:
                _run(network, lengths)
            if turn:  # the first round lays out weights and compiles
                own.append(time.perf_counter() - started)
    return [min(own) for own in taken]  # what else runs here only ever adds


def _run(network: PackedPass, lengths: tuple[int, ...]) -> None:
    most = network.config.max_position_embeddings
    tokens = PackedTokens.filler([min(length, most) for length in lengths])
    network.run_at((network.config.num_steps + 1) // 2, tokens)
    if network.device.type == "cuda":
        torch.cuda.synchronize()
