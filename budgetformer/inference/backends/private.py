"""Functions of torch that it does not document, in one place; each has a test of its own.

torch has announced that quantized tensors go. `fbgemm_product` needs them; `onednn_product` takes
its place where they are gone, with the same numbers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

LinearMap = Callable[[Tensor], Tensor]
"""Maps states [N, D] to [N, M]."""


def without_overrides() -> AbstractContextManager[None]:
    """Return a context in which no operand is asked whether it overrides torch's functions."""
    context: AbstractContextManager[None] = torch._C.DisableTorchFunctionSubclass()
    return context


def product_with_gelu(states: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Map states [N, D] on a GPU, and activate results before they are written.

    GELU is the approximation with tanh.
    """
    result: Tensor = torch._addmm_activation(bias, states, weight.t(), use_gelu=True)
    return result


def multiplies_bfloat16() -> bool:
    """Say whether oneDNN has products in bfloat16 on this processor."""
    return torch.backends.mkldnn.is_available() and bool(
        torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def bfloat16_product(weight: Tensor, bias: Tensor | None, rows: int) -> LinearMap:
    """Pack a weight [M, D] in bfloat16 for oneDNN, best for so many rows of states."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    run: Any = torch.ops.mkldnn._linear_pointwise

    def apply(states: Tensor) -> Tensor:
        result: Tensor = run(states.bfloat16(), packed, bias, "none", [], "")
        return result

    return apply


def has_quantized_tensors() -> bool:
    """Say whether torch still has the tensors that `fbgemm_product` takes."""
    return hasattr(torch, "quantize_per_channel")


def has_int8_products() -> bool:
    """Say whether torch was built with the library that the products in int8 run in.

    Builds for ARM have QNNPACK alone, some have none.
    """
    built = set(torch.backends.quantized.supported_engines)
    return bool(built & ({"x86", "fbgemm"} if has_quantized_tensors() else {"onednn"}))


def fbgemm_product(
    weight: Tensor, scales: Tensor, bias: Tensor | None, scale: float, zero: int
) -> LinearMap:
    """Multiply states, rounded to 0..255, by a rounded weight, in FBGEMM.

    Args:
        weight: [M, D], in float32.
        scales: of each of its rows, [M].
        bias: [M] in float32, if any.
        scale, zero: a state x becomes x / scale + zero, cut off at 0 and 255.
    """
    with warnings.catch_warnings():  # torch means to drop these tensors, not the products
        warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)
        zeros = torch.zeros_like(scales, dtype=torch.long)
        rounded = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(rounded, bias)
    product: Any = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
    run = getattr(product, "_op", product)  # without a look for operands that are traced

    def apply(states: Tensor) -> Tensor:
        result: Tensor = run(states, scale, zero, packed)
        return result

    return apply


def onednn_product(
    weight: Tensor, scales: Tensor, bias: Tensor | None, scale: float, zero: int
) -> LinearMap:
    """Multiply as `fbgemm_product` does, in oneDNN and without quantized tensors."""
    rounded = (weight / scales[:, None]).round_().to(torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(rounded, None)
    zeros, scales = torch.zeros_like(scales, dtype=torch.long), scales.float()
    run: Any = torch.ops.onednn.qlinear_pointwise.default
    run, factor = getattr(run, "_op", run), 1.0 / scale

    def apply(states: Tensor) -> Tensor:
        levels = (states * factor).round_().add_(zero).clamp_(0, 255).to(torch.uint8)
        result: Tensor = run(
            *(levels, scale, zero, packed, scales, zeros, bias),
            *(1.0, 0, torch.float32, "none", [], ""),
        )
        return result

    return apply
