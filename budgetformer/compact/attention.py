"""Attention over packed tokens: each item attends to itself, and nothing is padded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(projected: Tensor, lengths: Sequence[int], heads: int) -> Tensor:
    """Attend within each item of a packed batch.

    Args:
        projected: queries, keys and values, interleaved by head, [N, k * 3 * D/H].
        lengths: tokens of each item; rows after the last item's are spare, and come back as zeros.
        heads: k.

    Returns:
        Contexts [N, k * D/H].
    """
    # [N, k, 3, D/H] to [3, 1, k, N, D/H]
    tokens, width = projected.shape
    per_head = projected.view(tokens, heads, 3, width // (3 * heads)).permute(2, 1, 0, 3)[:, None]
    *items, spare = per_head.split([*lengths, tokens - sum(lengths)], dim=3)
    contexts = [_attend_one(item) for item in items if item.shape[3]]
    if spare.shape[3] or not contexts:
        contexts.append(torch.zeros_like(spare[0, 0]).transpose(0, 1))
    return (torch.cat(contexts) if len(contexts) > 1 else contexts[0]).flatten(1)


def _attend_one(per_head: Tensor) -> Tensor:
    """Attend within one item: [3, 1, k, T, D/H] to [T, k, D/H]."""
    query, key, value = per_head.unbind(0)
    return F.scaled_dot_product_attention(query, key, value)[0].transpose(0, 1)
