"""Every kernel in plain torch: the implementation on CPUs, and the reference for others."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from budgetformer.inference.backends.linear import Linear
from budgetformer.inference.batch_offsets import BatchOffsets
from budgetformer.model.embeddings import Embeddings
from budgetformer.model.layer import AttentionHeads
from budgetformer.model.layer import attend as attend_padded
from budgetformer.model.step0 import ExitHead, exit_evidence

__all__ = ["add", "add_norm", "attend", "bag", "classify", "embed", "exit_evidence"]
__all__ += ["map_norm_map", "mean", "norm"]


def bag(ids: Tensor, offsets: BatchOffsets, exit_head: ExitHead) -> Tensor:
    """Sum the table rows of each item's tokens and token pairs for step 0.

    Args:
        ids: token ids [N].
        offsets: the items' offsets.
        exit_head: step 0, which has the table.

    Returns:
        Bags [B, R], the input of `ExitHead.logits`.
    """
    rows, counts = ids.long(), offsets.divisors
    owner = None if offsets.single_item else offsets.owner
    if exit_head.buckets and len(rows):
        rows = torch.cat([rows, exit_head.neighbours(rows)])
        counts = 2 * counts - 1
        if owner is not None:
            together = owner[:-1] == owner[1:]
            owner = torch.cat([owner, torch.where(together, owner[:-1], offsets.num_items)])
    added = F.embedding(rows, exit_head.weight.weight).to(exit_head.bias.dtype)
    if owner is None:
        total = added.sum(0, keepdim=True)
    else:
        # One more row for pairs across items and padding rows, which belong to no item.
        total = added.new_zeros(offsets.num_items + 1, added.shape[1])
        total = total.index_add_(0, owner, added)[:-1]
    return total / counts.sqrt()


def embed(
    ids: Tensor, kinds: Tensor, offsets: BatchOffsets, embeddings: Embeddings, dtype: torch.dtype
) -> Tensor:
    """Embed tokens.

    Args:
        ids, kinds: token and segment ids, [N] each.
        offsets: the items' offsets.
        embeddings: the tables and the norm.
        dtype: type of the result.

    Returns:
        States [N, D].
    """
    # Modules are bypassed: for a short text, calling them takes as long as the look-ups.
    states = embeddings.word.weight.index_select(0, ids)
    states = states.to(embeddings.states_dtype or states.dtype)
    states += embeddings.segment.weight.index_select(0, kinds)
    if embeddings.position is not None:
        states += embeddings.position.weight.index_select(0, offsets.positions)
    states = norm(states, embeddings.norm)
    return (
        states if embeddings.map is None else embeddings.map(states.to(embeddings.map.weight.dtype))
    ).to(dtype)


def attend(projected: Tensor, offsets: BatchOffsets, weights: AttentionHeads) -> Tensor:
    """Attend within each item of a packed batch.

    Args:
        projected: queries, keys and values, interleaved by head, [N, k * 3 * D/H].
        offsets: the items' offsets; the contexts of padding rows are arbitrary.
        weights: the heads, positions and window.

    Returns:
        Contexts [N, k * D/H].
    """
    tokens, width = projected.shape
    num_heads, positions, window = weights.num_heads, weights.positions, weights.spec.window
    size = width // (3 * num_heads)
    per_head = projected.view(1, tokens, num_heads, 3, size).permute(3, 0, 2, 1, 4)

    def attend_one(item: Tensor) -> Tensor:
        """Attend within one item: [3, 1, k, T, D/H] to [1, T, k, D/H]."""
        query, key, value = item.unbind(0)
        return attend_padded(query, key, value, positions, window).transpose(1, 2)

    if offsets.single_item and offsets.num_tokens == tokens > 0:
        return attend_one(per_head).reshape(tokens, num_heads * size)
    *items, spare = per_head.split([*offsets.lengths, tokens - offsets.num_tokens], dim=3)
    contexts = [attend_one(item) for item in items if item.shape[3]]
    if spare.shape[3] or not contexts:
        contexts.append(torch.zeros_like(spare[0]).transpose(1, 2))
    return torch.cat(contexts, dim=1).reshape(tokens, num_heads * size)


def add(states: Tensor, change: Tensor) -> Tensor:
    """Return the sum of states and a change [N, D], stored in the change unless types differ.

    The change is converted first, because sums of mixed types are slow.
    """
    if change.dtype != states.dtype:
        change = change.to(states.dtype)
    return change.add_(states)


def norm(states: Tensor, layer_norm: nn.Module) -> Tensor:
    """Normalise states [N, D]; return them unchanged if `layer_norm` is no `nn.LayerNorm`."""
    if not isinstance(layer_norm, nn.LayerNorm):
        return states
    # The module is bypassed: for a short text, calling it takes as long as the norm.
    weight = layer_norm.weight
    if states.dtype != weight.dtype:
        states = states.to(weight.dtype)
    return torch.layer_norm(
        states, layer_norm.normalized_shape, weight, layer_norm.bias, layer_norm.eps
    )


def add_norm(states: Tensor, change: Tensor, layer_norm: nn.Module) -> Tensor:
    """Normalise the sum of states and a change, [N, D] each."""
    return norm(add(states, change), layer_norm)


def map_norm_map(
    inputs: Tensor, first: Linear, states: Tensor, layer_norm: nn.Module, second: Linear | None
) -> Tensor:
    """Add mapped inputs to the states, normalise the sum, and map it.

    Args:
        inputs: inputs of the first map, [N, K].
        first: maps the inputs to [N, D].
        states: states [N, D]; replaced by the normalised sum.
        layer_norm: norm of the sum.
        second: maps the normalised sum; None: no map.

    Returns:
        The result of `second`, [N, M]; [N, 0] without it.
    """
    states.copy_(add_norm(states, first(inputs), layer_norm))
    return states.new_empty(len(states), 0) if second is None else second(states)


def mean(states: Tensor, offsets: BatchOffsets) -> Tensor:
    """Return the mean state of each item, [B, D] in float32; zeros for items without tokens."""
    states = states[: offsets.num_tokens].float()
    if offsets.single_item:
        return states.sum(0, keepdim=True) / max(offsets.num_tokens, 1)
    total = states.new_zeros(offsets.num_items, states.shape[-1])
    return total.index_add_(0, offsets.owner, states) / offsets.divisors


def classify(states: Tensor, offsets: BatchOffsets, classifier: nn.Linear) -> Tensor:
    """Return logits [B, C] in float32 for the mean of each item's states [N, D]."""
    logits: Tensor = classifier(mean(states, offsets))
    return logits
