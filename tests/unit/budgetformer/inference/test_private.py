"""What torch does not document, each function against what it is to compute."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from budgetformer.inference.backends import linear, private
from budgetformer.inference.backends.linear import can_multiply_int8, int8_linear
from budgetformer.inference.ranges import StateRange

CPU = torch.device("cpu")
in_int8 = pytest.mark.skipif(not can_multiply_int8(CPU), reason="no products in int8 here")


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_operands_are_not_asked() -> None:
    class Asked(Tensor):
        asked = 0

        @classmethod
        def __torch_function__(cls, *args: object, **_: object) -> object:
            cls.asked += 1
            return super().__torch_function__(*args, **_)  # type: ignore[arg-type]

    operand = torch.ones(2).as_subclass(Asked)
    torch.add(operand, 1)
    seen = Asked.asked
    with private.without_overrides():
        torch.add(operand, 1)
    assert (seen, Asked.asked) == (1, 1)


@pytest.mark.skipif(not private.multiplies_bfloat16(), reason="no products in bfloat16 here")
@pytest.mark.parametrize("rows", [1, 16, 65])
@pytest.mark.parametrize("has_bias", [True, False])
def test_bfloat16(rows: int, has_bias: bool) -> None:
    weight, bias = drawn(24, 40).bfloat16(), drawn(24).bfloat16() if has_bias else None
    states = drawn(rows, 40)
    result = private.bfloat16_product(weight, bias, 64)(states)
    expected = F.linear(states.bfloat16(), weight, bias)
    torch.testing.assert_close(result, expected, rtol=0.02, atol=0.05)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="on a GPU only")
def test_gelu() -> None:
    states, weight, bias = (x.cuda().bfloat16() for x in (drawn(8, 32), drawn(16, 32), drawn(16)))
    expected = F.gelu(F.linear(states, weight, bias), approximate="tanh")
    result = private.product_with_gelu(states, weight, bias)
    torch.testing.assert_close(result, expected, rtol=0.02, atol=0.05)


@in_int8
@pytest.mark.parametrize("product", [private.fbgemm_product, private.onednn_product])
@pytest.mark.parametrize("rows", [1, 16, 70])
@pytest.mark.parametrize("has_bias", [True, False])
def test_int8(product: object, rows: int, has_bias: bool) -> None:
    if product is private.fbgemm_product and not private.has_quantized_tensors():
        pytest.skip("torch has no quantized tensors any more")
    weight, states = drawn(24, 40), 3 * drawn(rows, 40)
    bias = drawn(24) if has_bias else None
    scales, scale, zero = weight.abs().amax(1) / 63, 0.03, 100
    levels = ((states / scale).round() + zero).clamp(0, 255) - zero
    whole = (weight / scales[:, None]).round()
    expected = levels @ whole.T * scale * scales + (0 if bias is None else bias)
    result = product(weight, scales, bias, scale, zero)(states)  # type: ignore[operator]
    # A state half way between two levels may become either.
    assert (result - expected).abs().max() <= scale * weight.abs().max() + 1e-4
    assert (result - expected).abs().median() <= 1e-4


@in_int8
def test_int8_does_without_quantized_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, bias, states = drawn(24, 40), drawn(24), drawn(9, 40)
    reads = StateRange(low=-2, high=2)
    before = int8_linear(weight, bias, reads, [3])(states)
    monkeypatch.setattr(linear.private, "has_quantized_tensors", lambda: False)
    monkeypatch.setattr(linear.private, "fbgemm_product", None)
    after = int8_linear(weight, bias, reads, [3])(states)
    torch.testing.assert_close(after, before, rtol=0.02, atol=0.05)
