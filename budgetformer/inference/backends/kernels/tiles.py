"""How the Triton kernels cut up what they work on."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

MIN_SIDE = 16
"""Of a tile that tensor cores multiply."""
LARGEST_PART = 128


def tile_side(value: int) -> int:
    """Return the side of a tile that holds so many: a power of two."""
    side: int = triton.next_power_of_2(value)
    return max(MIN_SIDE, side)


def equal_part(width: int) -> int:
    """Return the largest power of two, up to `LARGEST_PART`, whose multiple a row is."""
    return min(LARGEST_PART, width & -width)


def dot_precision(states: Tensor) -> str:
    """Return how products multiply float32; other states have one way."""
    return "ieee" if states.dtype == torch.float32 else "tf32"
