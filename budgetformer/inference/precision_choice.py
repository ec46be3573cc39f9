"""Choose the precision of a network's pass on this machine.

`auto` depends only on facts known in advance: the device, the processor's instructions, the number
of weights, and whether the checkpoint has state ranges. So the same checkpoint on the same machine
always gets the same precision, and the same text the same answer. `fastest` times the pass in every
precision instead, and may choose differently after a restart.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import get_args

import torch

from budgetformer.cost.macs import Sizes
from budgetformer.inference.backends.linear import (
    PRECISIONS,
    RangeCheck,
    can_multiply_bfloat16,
    can_multiply_int8,
    has_amx,
    linear_packer,
)
from budgetformer.inference.packed import PackedPass, PackedTokens
from budgetformer.inference.precision import Precision
from budgetformer.inference.ranges import LayerRanges
from budgetformer.model.encoder import SequenceClassifier

BATCHES = ((40,), (40,) * 8)
"""Lengths of the timed items: a single text, and a small batch."""
ROUNDS = 5
MIN_SPEEDUP = 1.2
"""Speedup over float32 below which a lower precision is not worth its error."""
MIN_WEIGHTS = 2**20
"""Smaller encoders stay in float32: call overhead dominates their time."""


def make_pass(
    model: SequenceClassifier,
    precision: str,
    ranges: Sequence[LayerRanges] = (),
    timed: bool = False,
) -> PackedPass:
    """Return the pass of a network in one precision, on the device of its weights.

    Args:
        model: network to run.
        precision: precision of the matrix products, one of `PRECISIONS`.
        ranges: state ranges of each layer, required for int8.
        timed: on a GPU, choose among kernel variants by timing instead of by size.
    """
    if precision == "int8":
        sizes = Sizes.of(model.config)
        same_scales = sizes.picks_heads or sizes.layerwise
        check = RangeCheck()
        packers = [linear_packer(precision, layer, same_scales, check) for layer in ranges]
        return PackedPass(model, precision, packers=packers, range_check=check)
    if model.device.type != "cuda":
        return PackedPass(model, precision)
    from budgetformer.inference.backends.kernels import gpu
    from budgetformer.inference.graphs import GraphedPass

    if not gpu.can_attend(model.config):
        return PackedPass(model, precision)
    return GraphedPass(model, precision, gpu, timed)


def load_pass(
    model: SequenceClassifier, precision: str = "float32", ranges: Sequence[LayerRanges] = ()
) -> PackedPass:
    """Return the compact pass over the weights of `model`.

    Args:
        model: network to run.
        precision: precision of the matrix products: one of `PRECISIONS`; "auto", chosen by
            capability (see `choose_precision`); or "fastest", chosen by timing.
        ranges: state ranges of each layer (`measure_ranges`), required for int8.

    Raises:
        ValueError: the precision is unknown, or this device or checkpoint does not support it.
    """
    if precision not in get_args(Precision):
        raise ValueError(
            f"unknown precision {precision!r}; known: auto, fastest, {', '.join(PRECISIONS)}"
        )
    if precision == "auto":
        return auto_pass(model, ranges)
    if precision == "fastest":
        return fastest_pass(model, ranges)
    if precision == "int8" and not ranges:
        raise ValueError("int8 requires state ranges, which `budgetformer calibrate` measures")
    if precision == "int8" and not can_multiply_int8(model.device):
        raise ValueError(
            "int8 requires an x86 processor with AVX2, and torch built with FBGEMM or oneDNN"
        )
    return make_pass(model, precision, ranges)


def choose_precision(device: torch.device, weights: int, ranges: bool) -> tuple[str, str]:
    """Return the precision that `auto` selects, and the reason in words.

    Args:
        device: device of the network.
        weights: number of weights of its encoder.
        ranges: whether the checkpoint has state ranges.
    """
    if weights < MIN_WEIGHTS:
        return "float32", f"the encoder has fewer than {MIN_WEIGHTS:,} weights"
    if device.type == "cuda":
        has = can_multiply_bfloat16(device)
        return ("bfloat16" if has else "float32"), f"the GPU has {'' if has else 'no '}bfloat16"
    if has_amx():
        return "bfloat16", "the processor has AMX"
    if not can_multiply_int8(device):
        return "float32", "there is no AMX, and no int8 (AVX2 and FBGEMM or oneDNN)"
    if not ranges:
        return "float32", "the checkpoint has no ranges of states for int8"
    return "int8", "the checkpoint has ranges of states, and the processor AVX2 without AMX"


def auto_pass(model: SequenceClassifier, ranges: Sequence[LayerRanges]) -> PackedPass:
    """Return the pass in the precision that `choose_precision` selects."""
    precision, reason = choose_precision(model.device, _weights(model), bool(ranges))
    chosen = make_pass(model, precision, ranges)
    chosen.precision_reason = reason
    return chosen


def fastest_pass(model: SequenceClassifier, ranges: Sequence[LayerRanges]) -> PackedPass:
    """Return the pass in the precision that is fastest on synthetic texts at the middle step.

    Takes a few seconds for a small encoder on a CPU.
    """
    precisions = ["float32"]
    if _weights(model) >= MIN_WEIGHTS:
        if can_multiply_bfloat16(model.device):
            precisions.append("bfloat16")
        if ranges and can_multiply_int8(model.device):
            precisions.append("int8")
    candidates = [make_pass(model, precision, ranges, timed=True) for precision in precisions]
    if len(candidates) == 1:
        chosen, reason = candidates[0], "no other precision is available here"
    else:
        seconds = _time(candidates)
        fastest, lowest = min(zip(candidates, seconds, strict=True), key=lambda pair: pair[1])
        chosen = fastest if seconds[0] / lowest >= MIN_SPEEDUP else candidates[0]
        times = zip(precisions, seconds, strict=True)
        reason = "timed: " + ", ".join(f"{name} {1000 * time:.1f} ms" for name, time in times)
        chosen.forget()
    chosen.precision_reason = reason
    return chosen


def _weights(model: SequenceClassifier) -> int:
    return sum(p.numel() for p in model.encoder.layers.parameters())


def _time(passes: list[PackedPass]) -> list[float]:
    seconds: list[list[float]] = [[] for _ in passes]
    for turn in range(ROUNDS + 1):
        for network, rounds in zip(passes, seconds, strict=True):
            started = time.perf_counter()
            for lengths in BATCHES:
                _run(network, lengths)
            if turn:  # the first round packs weights and compiles
                rounds.append(time.perf_counter() - started)
    return list(map(min, seconds))  # other work on the machine only adds time


def _run(network: PackedPass, lengths: tuple[int, ...]) -> None:
    max_tokens = network.config.max_position_embeddings
    tokens = PackedTokens.filler([min(length, max_tokens) for length in lengths])
    network.run_at((network.config.num_steps + 1) // 2, tokens)
    if network.device.type == "cuda":
        torch.cuda.synchronize()
