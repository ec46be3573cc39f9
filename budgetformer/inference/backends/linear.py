"""Linear maps in each precision, with weights that are packed once.

States are float32 between the maps. A map converts its input, and its result stays in the map's
precision until it is added to the states. So a lower precision affects only the products.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from budgetformer.inference.backends import private
from budgetformer.inference.ranges import LayerRanges, MapName, StateRange

Linear = Callable[[Tensor], Tensor]
"""A map of states [N, D] to [N, M]."""


@dataclass(frozen=True)
class Product:
    """A map by an unpacked weight [M, D] and a bias [M].

    Attributes:
        gelu: apply GELU to the results. In bfloat16 on a GPU it is fused and uses the tanh
            approximation, whose error is below the resolution of bfloat16.
    """

    weight: Tensor
    bias: Tensor | None
    gelu: bool = False

    def __call__(self, states: Tensor) -> Tensor:
        """Map states [N, D] of any precision to [N, M] in the weight's."""
        states = states.to(self.weight.dtype)
        if not self.gelu:
            return F.linear(states, self.weight, self.bias)
        if self.bias is None or not self.weight.is_cuda or self.weight.dtype == torch.float32:
            return F.gelu(F.linear(states, self.weight, self.bias))
        return private.product_with_gelu(states, self.weight, self.bias)


@dataclass(frozen=True)
class Weights:
    """The part of one of a layer's linear maps that some heads need.

    Attributes:
        name: name of the map.
        rows: M rows of the layer's weight, with all columns.
        bias: bias [M], if any.
        columns: indices of the D required columns; a slice begins at 0.
    """

    name: MapName
    rows: Tensor
    bias: Tensor | None
    columns: slice | Tensor = field(default_factory=lambda: slice(None))

    @cached_property
    def weight(self) -> Tensor:
        """The weight [M, D]."""
        return self.rows[:, self.columns]

    def places(self, columns: Sequence[int]) -> list[int]:
        """Return the indices in `weight` of those of the layer map's columns that it has."""
        if isinstance(self.columns, slice):
            return [column for column in columns if column < self.weight.shape[1]]
        kept = self.columns.tolist()
        return [kept.index(column) for column in columns if column in kept]


PackLinear = Callable[[Weights], Linear]
"""Packs one of a layer's linear maps."""


@dataclass
class RangeCheck:
    """Count the states that int8 maps read, and those outside their calibrated range.

    Attributes:
        checked: number of checked states, in one of `CHECK_EVERY` calls of each map.
        clipped: number of checked states that were outside the range, and so clipped.
    """

    checked: int = 0
    clipped: int = 0

    def count(self, states: Tensor, low: Tensor, high: Tensor, columns: int) -> None:
        """Count states [N, D], of which `columns` are in int8; the others have infinite limits."""
        self.checked += len(states) * columns
        self.clipped += int(((states < low) | (states > high)).sum())

    def take(self) -> tuple[int, int]:
        """Return (checked, clipped) since the last call."""
        taken = self.checked, self.clipped
        self.checked = self.clipped = 0
        return taken


PREPACK_ROWS = 64
"""Number of rows for which oneDNN optimises the packed layout; any number can be multiplied."""
MAX_INT8_WEIGHT, STATE_LEVELS = 63, 255
"""Quantized weights are -63..63 and states 0..255.

With these bounds the sum of two products fits into 16 bits, which some processors add in.
"""
CHECK_EVERY = 64
"""An int8 map checks the range of its states in one of this many calls."""
INPUT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.float32}
"""Preferred input type of the maps, by precision."""


def padded_rows(rows: int) -> int:
    """Return the next larger of a few dozen row counts.

    oneDNN compiles a product for every new number of rows, which takes longer than the product.
    """
    grain = next((g for limit, g in ((128, 16), (256, 32), (512, 64)) if rows < limit), 128)
    return (rows // grain + 1) * grain


def _capabilities() -> dict[str, Any]:
    """Return the instruction sets of the processor that torch reports.

    torch before 2.11 may lack the function; int8 and training in float32 are chosen then.
    """
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return capabilities


def has_amx() -> bool:
    """Return whether the processor has AMX tiles for bfloat16.

    oneDNN supports bfloat16 on other processors too, but a pass is slower there than in float32
    (1.7 times as long with AVX-512's bfloat16 instructions).
    """
    return bool(_capabilities().get("amx_bf16"))


def has_fast_bfloat16(device: torch.device) -> bool:
    """Return whether training is faster in bfloat16: the device has instructions for it.

    With those of AVX-512, products of whole batches take a third of float32's time, unlike those of
    a pass (see `has_amx`).
    """
    if device.type != "cpu":
        return can_multiply_bfloat16(device)
    return bool(_capabilities().get("avx512_bf16")) or has_amx()


def can_multiply_bfloat16(device: torch.device) -> bool:
    """Return whether a device has native bfloat16 products."""
    if device.type != "cuda":
        return private.multiplies_bfloat16()
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def can_multiply_int8(device: torch.device) -> bool:
    """Return whether a device supports int8 products: x86 processors with AVX2 do."""
    known = ("AVX2", "AVX512", "AVX10", "AMX")
    fits = device.type == "cpu" and torch.backends.cpu.get_cpu_capability().startswith(known)
    return fits and private.has_int8_products()


def bfloat16_linear(weight: Tensor, bias: Tensor | None) -> Linear:
    """Return a map by a bfloat16 copy of a weight [M, D], packed for oneDNN on a CPU.

    Without packing, oneDNN would reorder the weight at every call, which takes as long as the
    product for the few rows of a single text.
    """
    weight, bias = weight.bfloat16().contiguous(), None if bias is None else bias.bfloat16()
    if weight.device.type != "cpu" or not private.multiplies_bfloat16():
        return Product(weight, bias)
    return private.bfloat16_product(weight, bias, PREPACK_ROWS)


def int8_linear(
    weight: Tensor,
    bias: Tensor | None,
    reads: StateRange,
    outliers: Sequence[int] = (),
    max_weights: Tensor | None = None,
    check: RangeCheck | None = None,
) -> Linear:
    """Return a float32 map by an int8 copy of a weight [M, D], packed for FBGEMM or oneDNN.

    Weights have one scale per output. States are scaled by their calibrated range and clipped to
    it, so a row's result does not depend on the other rows. The few outlier columns, whose states
    go far beyond the range, would make the scale coarse and are multiplied in float32 instead.

    Args:
        weight: weight in any precision.
        bias: bias [M], if any.
        reads: calibrated range of the states.
        outliers: indices of the outlier columns.
        max_weights: largest weight magnitude per output, [M]; None: that of `weight`. If all slices
            of a map get the same value, results do not depend on which slice is used.
        check: counts states outside `reads`.
    """
    exact = weight.float()
    exact_columns = [(slice(column, column + 1), exact[:, column].clone()) for column in outliers]
    if exact_columns:
        exact = exact.index_fill(1, torch.tensor(outliers), 0.0)
    max_weights = exact.abs().amax(1) if max_weights is None else max_weights
    scales = max_weights.clamp(min=1e-12) / MAX_INT8_WEIGHT
    scale = (reads.high - reads.low) / STATE_LEVELS or 1.0
    zero = round(-reads.low / scale)
    quantized_tensors = private.has_quantized_tensors()
    pack = private.fbgemm_product if quantized_tensors else private.onednn_product
    run = pack(exact, scales, None if bias is None else bias.float(), scale, zero)

    def with_outliers(states: Tensor) -> Tensor:
        result = run(states)
        for column, weights in exact_columns:
            result.addcmul_(states[:, column], weights)
        return result

    product = with_outliers if exact_columns else run
    if check is None:
        return product
    low = torch.full((weight.shape[1],), reads.low - scale / 2)
    high = torch.full((weight.shape[1],), reads.high + scale / 2)
    low[list(outliers)], high[list(outliers)] = -math.inf, math.inf
    calls = itertools.count()

    def checked(states: Tensor) -> Tensor:
        if next(calls) % CHECK_EVERY == 0:
            check.count(states, low, high, weight.shape[1] - len(outliers))
        return product(states)

    return checked


LINEARS: dict[str, Callable[[Tensor, Tensor | None], Linear]] = {
    "float32": Product,
    "bfloat16": bfloat16_linear,
}
"""Linear maps of the precisions that need no state ranges."""
PRECISIONS = (*LINEARS, "int8")


def linear_packer(
    precision: str,
    ranges: LayerRanges | None = None,
    same_scales: bool = False,
    check: RangeCheck | None = None,
) -> PackLinear:
    """Return a function that packs a layer's linear maps in a precision.

    Args:
        precision: one of `PRECISIONS`.
        ranges: state ranges of the layer, required for int8.
        same_scales: quantize a weight with the same scale in every slice, for batches whose items
            keep different heads: results then do not depend on which slice is used. Scales per
            slice are more exact.
        check: counts int8 states outside their ranges.
    """
    if precision != "int8":
        return lambda part: LINEARS[precision](part.weight, part.bias)
    if ranges is None:
        raise ValueError("int8 requires the layer's state ranges")

    def pack_int8(part: Weights) -> Linear:
        reads = ranges.of(part.name)
        outliers = [column for column in reads.outliers if column < part.rows.shape[1]]
        max_weights = None
        if same_scales:
            others = part.rows.float().index_fill(1, torch.tensor(outliers, dtype=torch.long), 0.0)
            max_weights = others.abs().amax(1)
        return int8_linear(part.weight, part.bias, reads, part.places(outliers), max_weights, check)

    return pack_int8
