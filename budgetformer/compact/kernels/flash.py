"""The kernels in Triton, but for attention, which is torch's flash attention over packed texts.

Half precisions only, and GPUs that it is written for.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from budgetformer.compact.kernels.gpu import add_norm, mean
from budgetformer.compact.layout import Layout

__all__ = ["add_norm", "attend", "mean"]


def attend(projected: Tensor, layout: Layout, heads: int) -> Tensor:
    """Do as `plain.attend`; spare rows come back as they will."""
    size = projected.shape[1] // (3 * heads)
    query, key, value = projected.view(-1, heads, 3, size).unbind(2)
    bounds, longest = layout.starts, layout.longest
    contexts = varlen_attn(query, key, value, bounds, bounds, longest, longest)
    return cast(Tensor, contexts).flatten(1)
