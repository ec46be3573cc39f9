"""All undocumented torch functions that this package uses; each has its own test.

torch has announced the removal of quantized tensors, which `fbgemm_product` requires. Without them,
`onednn_product` replaces it, with the same results.
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
    """Return a context that disables torch's checks for `__torch_function__` of operands."""
    context: AbstractContextManager[None] = torch._C.DisableTorchFunctionSubclass()
    return context


def product_with_gelu(states: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Map states [N, D] on a GPU, with a fused GELU (tanh approximation)."""
    result: Tensor = torch._addmm_activation(bias, states, weight.t(), use_gelu=True)
    return result


def multiplies_bfloat16() -> bool:
    """Return whether oneDNN supports bfloat16 products on this processor."""
    return torch.backends.mkldnn.is_available() and bool(
        torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def bfloat16_product(weight: Tensor, bias: Tensor | None, rows: int) -> LinearMap:
    """Return a map by a bfloat16 weight [M, D], packed by oneDNN for this many rows of states."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    run: Any = torch.ops.mkldnn._linear_pointwise

    def apply(states: Tensor) -> Tensor:
        result: Tensor = run(states.bfloat16(), packed, bias, "none", [], "")
        return result

    return apply


def has_quantized_tensors() -> bool:
    """Return whether torch still has the quantized tensors that `fbgemm_product` requires."""
    return hasattr(torch, "quantize_per_channel")


def has_int8_products() -> bool:
    """Return whether torch was built with a library for int8 products.

    Builds for ARM have only QNNPACK, which is not enough; some builds have none.
    """
    built = set(torch.backends.quantized.supported_engines)
    return bool(built & ({"x86", "fbgemm"} if has_quantized_tensors() else {"onednn"}))


def fbgemm_product(
    weight: Tensor, scales: Tensor, bias: Tensor | None, scale: float, zero: int
) -> LinearMap:
    """Return a map by an int8 weight, which quantizes states to 0..255, in FBGEMM.

    Args:
        weight: float32 weight [M, D].
        scales: scale of each row of the weight, [M].
        bias: float32 bias [M], if any.
        scale, zero: a state x is quantized to x / scale + zero, clipped to 0..255.
    """
    with warnings.catch_warnings():  # about the announced removal of quantized tensors
        warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)
        zeros = torch.zeros_like(scales, dtype=torch.long)
        rounded = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(rounded, bias)
    product: Any = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
    run = getattr(product, "_op", product)  # skips torch's check for tracing

    def apply(states: Tensor) -> Tensor:
        result: Tensor = run(states, scale, zero, packed)
        return result

    return apply


def onednn_product(
    weight: Tensor, scales: Tensor, bias: Tensor | None, scale: float, zero: int
) -> LinearMap:
    """Return the same map as `fbgemm_product`, in oneDNN and without quantized tensors."""
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
