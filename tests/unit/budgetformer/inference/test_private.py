"""Each undocumented function of torch computes what the inference code expects of it."""

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


def random_tensor(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_without_overrides_bypasses_the_overrides_of_operands() -> None:
    class Overriding(Tensor):
        calls = 0

        @classmethod
        def __torch_function__(cls, *args: object, **_: object) -> object:
            cls.calls += 1
            return super().__torch_function__(*args, **_)  # type: ignore[arg-type]

    operand = torch.ones(2).as_subclass(Overriding)
    torch.add(operand, 1)
    before = Overriding.calls
    with private.without_overrides():
        torch.add(operand, 1)
    assert (before, Overriding.calls) == (1, 1)


@pytest.mark.skipif(not private.multiplies_bfloat16(), reason="no products in bfloat16 here")
@pytest.mark.parametrize("rows", [1, 16, 65])
@pytest.mark.parametrize("has_bias", [True, False])
def test_the_bfloat16_product(rows: int, has_bias: bool) -> None:
    weight, bias = (
        random_tensor(24, 40).bfloat16(),
        random_tensor(24).bfloat16() if has_bias else None,
    )
    states = random_tensor(rows, 40)
    result = private.bfloat16_product(weight, bias, 64)(states)
    expected = F.linear(states.bfloat16(), weight, bias)
    torch.testing.assert_close(result, expected, rtol=0.02, atol=0.05)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="on a GPU only")
def test_the_product_with_gelu() -> None:
    states, weight, bias = (
        x.cuda().bfloat16()
        for x in (random_tensor(8, 32), random_tensor(16, 32), random_tensor(16))
    )
    expected = F.gelu(F.linear(states, weight, bias), approximate="tanh")
    result = private.product_with_gelu(states, weight, bias)
    torch.testing.assert_close(result, expected, rtol=0.02, atol=0.05)


@in_int8
@pytest.mark.parametrize("product", [private.fbgemm_product, private.onednn_product])
@pytest.mark.parametrize("rows", [1, 16, 70])
@pytest.mark.parametrize("has_bias", [True, False])
def test_the_int8_products(product: object, rows: int, has_bias: bool) -> None:
    if product is private.fbgemm_product and not private.has_quantized_tensors():
        pytest.skip("torch has no quantized tensors any more")
    weight, states = random_tensor(24, 40), 3 * random_tensor(rows, 40)
    bias = random_tensor(24) if has_bias else None
    scales, scale, zero = weight.abs().amax(1) / 63, 0.03, 100
    levels = ((states / scale).round() + zero).clamp(0, 255) - zero
    quantized = (weight / scales[:, None]).round()
    expected = levels @ quantized.T * scale * scales + (0 if bias is None else bias)
    result = product(weight, scales, bias, scale, zero)(states)  # type: ignore[operator]
    # A state half way between two levels may be rounded to either.
    assert (result - expected).abs().max() <= scale * weight.abs().max() + 1e-4
    assert (result - expected).abs().median() <= 1e-4


@in_int8
def test_int8_works_without_quantized_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, bias, states = random_tensor(24, 40), random_tensor(24), random_tensor(9, 40)
    reads = StateRange(low=-2, high=2)
    before = int8_linear(weight, bias, reads, [3])(states)
    monkeypatch.setattr(linear.private, "has_quantized_tensors", lambda: False)
    monkeypatch.setattr(linear.private, "fbgemm_product", None)
    after = int8_linear(weight, bias, reads, [3])(states)
    torch.testing.assert_close(after, before, rtol=0.02, atol=0.05)
