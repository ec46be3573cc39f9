"""Linear maps whose weights are laid out once, in the precision in which they are multiplied.

States are float32 between the maps; a map converts what it reads, and its result stays in its own
precision until it is added to the states. So a lower precision costs the accuracy of products and
of nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Linear = Callable[[Tensor], Tensor]
"""A map of states [N, D] to [N, M]."""

PREPACK_ROWS = 64
"""Rows that a prepacked layout is chosen for; other numbers of rows run on it as well."""


def padded_rows(rows: int) -> int:
    """Return the least number above `rows` among a few dozen.

    oneDNN compiles a product for every new number of rows, which takes longer than the product.
    """
    grain = next((g for most, g in ((128, 16), (256, 32), (512, 64)) if rows < most), 128)
    return (rows // grain + 1) * grain


def worth_a_try(precision: str, device: torch.device) -> bool:
    """Say whether a device may multiply faster in a precision than in float32.

    A CPU without products in bfloat16 converts each number, and takes ten times as long.
    """
    return device.type != "cpu" or precision != "bfloat16" or _has_bfloat16()


def _has_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def float32_linear(weight: Tensor, bias: Tensor | None) -> Linear:
    """Multiply by a weight [M, D] as it lies, views among them."""

    def apply(states: Tensor) -> Tensor:
        return F.linear(states, weight, bias)

    return apply


def bfloat16_linear(weight: Tensor, bias: Tensor | None) -> Linear:
    """Multiply in bfloat16 by a copy of a weight [M, D], on a CPU in oneDNN's own layout.

    Laid out once: oneDNN would otherwise reorder the weight at every call, which for the few rows
    of a lone text takes as long as the product.
    """
    half, half_bias = weight.bfloat16().contiguous(), None if bias is None else bias.bfloat16()
    if weight.device.type != "cpu" or not _has_bfloat16():

        def apply(states: Tensor) -> Tensor:
            return F.linear(states.bfloat16(), half, half_bias)

        return apply
    packed = torch.ops.mkldnn._reorder_linear_weight(half, PREPACK_ROWS)
    run: Any = torch.ops.mkldnn._linear_pointwise

    def apply_packed(states: Tensor) -> Tensor:
        result: Tensor = run(states.bfloat16(), packed, half_bias, "none", [], "")
        return result

    return apply_packed


def gelu_linear(weight: Tensor, bias: Tensor) -> Linear:
    """Multiply in bfloat16 on a GPU, and activate the results before they are written.

    By the approximation with tanh, which is closer to GELU than bfloat16 can tell.
    """
    half, half_bias = weight.bfloat16().contiguous(), bias.bfloat16()

    def apply(states: Tensor) -> Tensor:
        return torch._addmm_activation(half_bias, states.bfloat16(), half.t(), use_gelu=True)

    return apply


LINEARS: dict[str, Callable[[Tensor, Tensor | None], Linear]] = {
    "float32": float32_linear,
    "bfloat16": bfloat16_linear,
}
"""How each precision lays out a weight."""
