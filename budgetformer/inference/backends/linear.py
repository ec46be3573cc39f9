"""Linear maps whose weights are laid out once, in the precision in which they are multiplied.

States are float32 between the maps; a map converts what it reads, and its result stays in its own
precision until it is added to the states. So a lower precision costs the accuracy of products and
of nothing else.
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
    """A map that multiplies by a weight [M, D] as it lies, and adds a bias [M].

    Attributes:
        gelu: whether results are activated. In bfloat16 on a GPU that is before they are written,
            and by the approximation with tanh, which is closer to GELU than bfloat16 can tell.
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
    """What of a layer's map some heads need.

    Attributes:
        name: which map.
        rows: for M results, all columns of the whole map.
        bias: [M], if there is one to add.
        columns: D of them that some heads need; a slice begins with the first.
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
        """Return where some of the whole map's columns are in `weight`, those that are."""
        here = self.weight.shape[1]
        if isinstance(self.columns, slice):
            return [column for column in columns if column < here]
        own = self.columns.tolist()
        return [own.index(column) for column in columns if column in own]


PackLinear = Callable[[Weights], Linear]
"""Lays out one of a layer's maps."""


@dataclass
class RangeCheck:
    """Counts the states that int8 maps read, and those outside their calibrated range.

    Attributes:
        checked: states looked at: those of one call in `CHECK_EVERY` of each map.
        clipped: of these, how many were cut off at an end of the range.
    """

    checked: int = 0
    clipped: int = 0

    def count(self, states: Tensor, low: Tensor, high: Tensor) -> None:
        """Count states [N, D]; columns with infinite limits are not in int8."""
        self.checked += len(states) * int(low.isfinite().sum())
        self.clipped += int(((states < low) | (states > high)).sum())

    def take(self) -> tuple[int, int]:
        """Return what was checked and clipped since the last call."""
        taken = self.checked, self.clipped
        self.checked = self.clipped = 0
        return taken


PREPACK_ROWS = 64
"""Rows that a prepacked layout is chosen for; other numbers of rows run on it as well."""
LARGEST_WEIGHT, LEVELS = 63, 255
"""Of int8 products: weights -63 to 63 and states 0 to 255.

Where a processor adds two products in 16 bits, they fit in there.
"""
CHECK_EVERY = 16
"""One in so many calls of an int8 map is checked for states outside their calibrated range."""
STATES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.float32}
"""What the maps of each precision read, if there is a choice."""


def padded_rows(rows: int) -> int:
    """Return the least number above `rows` among a few dozen.

    oneDNN compiles a product for every new number of rows, which takes longer than the product.
    """
    grain = next((g for most, g in ((128, 16), (256, 32), (512, 64)) if rows < most), 128)
    return (rows // grain + 1) * grain


def has_amx() -> bool:
    """Return whether the processor has AMX tiles for bfloat16.

    OneDNN supports bfloat16 on other processors too, but a pass takes longer there than in float32
    (1.7 times as long with AVX-512's bfloat16 instructions).
    """
    # Torch before 2.11 may lack the function; int8 is chosen then.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_bf16"))


def can_multiply_bfloat16(device: torch.device) -> bool:
    """Return whether a device multiplies in bfloat16 without converting each number."""
    if device.type != "cuda":
        return private.multiplies_bfloat16()
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def can_multiply_int8(device: torch.device) -> bool:
    """Return whether there are products in int8: on x86 processors with AVX2."""
    known = ("AVX2", "AVX512", "AVX10", "AMX")
    fits = device.type == "cpu" and torch.backends.cpu.get_cpu_capability().startswith(known)
    return fits and private.has_int8_products()


def bfloat16_linear(weight: Tensor, bias: Tensor | None) -> Linear:
    """Multiply in bfloat16 by a copy of a weight [M, D], on a CPU in oneDNN's own layout.

    Laid out once: oneDNN would otherwise reorder the weight at every call, which for the few rows
    of a lone text takes as long as the product.
    """
    half, half_bias = weight.bfloat16().contiguous(), None if bias is None else bias.bfloat16()
    if weight.device.type != "cpu" or not private.multiplies_bfloat16():
        return Product(half, half_bias)
    return private.bfloat16_product(half, half_bias, PREPACK_ROWS)


def int8_linear(
    weight: Tensor,
    bias: Tensor | None,
    reads: StateRange,
    outliers: Sequence[int] = (),
    largest: Tensor | None = None,
    check: RangeCheck | None = None,
) -> Linear:
    """Multiply in int8 by a copy of a weight [M, D], packed for FBGEMM or oneDNN.

    Each output has a scale of its own for its weights. States are scaled by the range that they
    were found in, and what lies beyond is brought to its end: a row's result is the same whatever
    lies beside it. The few columns whose states go far beyond would make that scale coarse, and
    are multiplied in float32. The result is float32.

    Args:
        weight: in any precision.
        bias: [M], if any.
        reads: what the states lie between.
        outliers: columns that go beyond.
        largest: magnitude of a weight by output, [M], where it is not that of these weights: parts
            of one map are rounded alike, so that it is all one which of them a pass takes.
        check: counts states outside `reads`.
    """
    exact = weight.float()
    beyond = [(slice(column, column + 1), exact[:, column].clone()) for column in outliers]
    if beyond:
        exact = exact.index_fill(1, torch.tensor(outliers), 0.0)
    largest = exact.abs().amax(1) if largest is None else largest
    scales = largest.clamp(min=1e-12) / LARGEST_WEIGHT
    scale = (reads.high - reads.low) / LEVELS or 1.0
    zero = round(-reads.low / scale)
    has = private.has_quantized_tensors()
    pack = private.fbgemm_product if has else private.onednn_product
    run = pack(exact, scales, None if bias is None else bias.float(), scale, zero)

    def with_outliers(states: Tensor) -> Tensor:
        result = run(states)
        for column, own in beyond:
            result.addcmul_(states[:, column], own)
        return result

    product = with_outliers if beyond else run
    if check is None:
        return product
    low = torch.full((weight.shape[1],), reads.low - scale / 2)
    high = torch.full((weight.shape[1],), reads.high + scale / 2)
    low[list(outliers)], high[list(outliers)] = -math.inf, math.inf
    calls = itertools.count()

    def checked(states: Tensor) -> Tensor:
        if next(calls) % CHECK_EVERY == 0:
            check.count(states, low, high)
        return product(states)

    return checked


LINEARS: dict[str, Callable[[Tensor, Tensor | None], Linear]] = {
    "float32": Product,
    "bfloat16": bfloat16_linear,
}
"""How a precision that needs to know nothing of the states lays out a weight."""
PRECISIONS = (*LINEARS, "int8")


def linear_packer(
    precision: str,
    ranges: LayerRanges | None = None,
    alike: bool = False,
    check: RangeCheck | None = None,
) -> PackLinear:
    """Return what lays out a layer's maps in a precision.

    Args:
        precision: one of `PRECISIONS`.
        ranges: of the layer's states, which int8 needs.
        alike: let int8 round a weight alike in every slice, for batches whose items keep different
            heads: it is all one then which slices such a batch takes. A slice that rounds by its
            own weights is more exact.
        check: counts int8 states outside their ranges.
    """
    if precision != "int8":
        return lambda some: LINEARS[precision](some.weight, some.bias)
    if ranges is None:
        raise ValueError("int8 needs the ranges of a layer's states")

    def in_int8(some: Weights) -> Linear:
        reads = ranges.of(some.name)
        known = [column for column in reads.outliers if column < some.rows.shape[1]]
        largest = None
        if alike:
            others = some.rows.float().index_fill(1, torch.tensor(known, dtype=torch.long), 0.0)
            largest = others.abs().amax(1)
        return int8_linear(some.weight, some.bias, reads, some.places(known), largest, check)

    return in_int8
