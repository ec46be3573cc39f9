"""Tile sizes and precisions of the Triton kernels."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

MIN_SIDE = 16
"""Smallest side of a tile that tensor cores multiply."""
LARGEST_PART = 128


def tile_side(value: int) -> int:
    """Return the side of a tile that holds `value` columns: a power of two."""
    side: int = triton.next_power_of_2(value)
    return max(MIN_SIDE, side)


def equal_part(width: int) -> int:
    """Return the largest power of two that divides `width`, up to `LARGEST_PART`."""
    return min(LARGEST_PART, width & -width)


def dot_precision(states: Tensor) -> str:
    """Return Triton's `input_precision`: exact for float32, ignored for other types."""
    return "ieee" if states.dtype == torch.float32 else "tf32"
