"""Attention in bfloat16."""

from __future__ import annotations

import torch

from budgetformer.model.layer import attend


def gradients(dtype: torch.dtype) -> list[torch.Tensor]:
    """Return the gradients of queries, keys and values, rounded to bfloat16."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4, 2, 4, 9, 8, generator=generator).bfloat16().to(dtype)
    query, key, value, weight = (part.clone().requires_grad_() for part in values)
    mask = torch.zeros(2, 1, 1, 9)
    mask[1, ..., 5:] = -1e9
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        context = attend(query, key, value, mask=mask)
    assert context.dtype == dtype
    context.backward(weight)
    return [part.grad.bfloat16() for part in (query, key, value) if part.grad is not None]


class TestBfloat16:
    def test_gradients_are_computed_in_float32(self) -> None:
        pairs = zip(gradients(torch.bfloat16), gradients(torch.float32), strict=True)
        for in_bfloat16, in_float32 in pairs:
            assert torch.equal(in_bfloat16, in_float32)
