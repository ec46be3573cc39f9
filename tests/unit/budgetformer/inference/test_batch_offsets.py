"""Offsets of the items of a packed batch."""

from __future__ import annotations

import pytest
import torch

from budgetformer.inference.batch_offsets import BatchOffsets, StagedOffsets


@pytest.mark.parametrize("lengths", [(), (3, 1), (3, 0)])
def test_divisors_are_float32_and_at_least_1(lengths: tuple[int, ...]) -> None:
    offsets = BatchOffsets(lengths, torch.device("cpu"))
    staged = StagedOffsets.from_tensors(offsets.starts, offsets.positions, offsets.ends)
    expected = torch.tensor([max(length, 1) for length in lengths], dtype=torch.float32)
    torch.testing.assert_close(offsets.divisors, expected.view(-1, 1))
    torch.testing.assert_close(staged.divisors, expected.view(-1, 1))
