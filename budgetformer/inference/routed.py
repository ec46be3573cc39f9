"""Run a layer whose items keep different heads, without a loop over items.

As in mixture-of-experts kernels, (token, head) pairs are sorted by head. Each head is one matrix
product over all tokens that keep it, and its result is added to the rows of these tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from budgetformer.inference.backends.kernels import Kernels, plain
from budgetformer.inference.backends.linear import padded_rows
from budgetformer.inference.batch_offsets import BatchOffsets
from budgetformer.inference.weights import HeadSet, SliceCache
from budgetformer.model.layer import LayerSpec, LayerWeights
from budgetformer.model.positions import Positions


@dataclass(frozen=True)
class HeadTokens:
    """The tokens that keep one head.

    Attributes:
        head: index of the head.
        count: number of tokens n that keep the head.
        rows: rows of these tokens in the states, [n']; if n is padded to n', followed by the index
            of a spare row.
        pairs: indices of the head's pairs among all pairs sorted by token, [n'].
    """

    head: int
    count: int
    rows: Tensor
    pairs: Tensor

    @classmethod
    def of(
        cls, head: int, count: int, rows: Tensor, pairs: Tensor, spare: int | None
    ) -> HeadTokens:
        """Return a head's tokens, padded with the row `spare` unless that is None."""
        if spare is None:
            return cls(head, count, rows, pairs)
        missing = padded_rows(count) - count
        return cls(head, count, F.pad(rows, (0, missing), value=spare), F.pad(pairs, (0, missing)))


@dataclass(frozen=True)
class Routing:
    """The assignment of tokens to heads: P pairs of a token and a head that it keeps.

    Attributes:
        tokens_by_head: tokens of each head that any item keeps.
        places: index in the order of `tokens_by_head` of each pair sorted by token, [P].
        items: runs of neighbouring items, with one call of attention each: (heads of the first
            item, offsets).
        rows: number of state rows, N'.
        used: whether a row keeps any head, [N', 1]; None: every row does.
    """

    tokens_by_head: list[HeadTokens]
    places: Tensor
    items: list[tuple[HeadSet, BatchOffsets]]
    rows: int
    used: Tensor | None

    @classmethod
    def of(
        cls,
        sets: Sequence[HeadSet],
        offsets: BatchOffsets,
        num_heads: int,
        spare_rows: int,
        interchangeable: bool = True,
    ) -> Routing:
        """Assign the tokens of B items to heads.

        Args:
            sets: heads that each item keeps.
            offsets: offsets of the items.
            num_heads: number of heads H.
            spare_rows: number of padding rows after the last token; if any, the tokens of each head
                are padded too.
            interchangeable: whether heads differ only in queries, keys and values. Items with
                equally many heads can then share a run; otherwise only items with the same heads.
        """
        owner = offsets.owner
        cells = [item * num_heads + head for item, head_set in enumerate(sets) for head in head_set]
        kept = torch.zeros(len(sets) * num_heads, dtype=torch.bool)
        kept[torch.tensor(cells, dtype=torch.long)] = True
        kept = kept.view(len(sets), num_heads).to(owner.device)
        heads, rows = kept[owner].t().nonzero().unbind(1)
        by_token = kept.sum(1)[owner]
        rank = (kept.cumsum(1) - 1)[owner[rows], heads]
        pairs = (by_token.cumsum(0) - by_token)[rows] + rank
        places = torch.empty_like(pairs)
        places[pairs] = torch.arange(len(pairs), device=owner.device)
        counts = heads.bincount(minlength=num_heads).tolist()
        by_head = zip(counts, rows.split(counts), pairs.split(counts), strict=True)
        runs: list[tuple[HeadSet, list[int]]] = []
        for head_set, length in zip(sets, offsets.lengths, strict=True):
            last = runs[-1][0] if runs else None
            same = len(last) == len(head_set) if last and interchangeable else last == head_set
            if not same:
                runs.append((head_set, []))
            runs[-1][1].append(length)
        return cls(
            tokens_by_head=[
                HeadTokens.of(head, count, rows, pairs, len(owner) if spare_rows else None)
                for head, (count, rows, pairs) in enumerate(by_head)
                if count
            ],
            places=places,
            items=[(head_set, BatchOffsets(tuple(run), offsets.device)) for head_set, run in runs],
            rows=len(owner) + spare_rows,
            used=None if all(sets) else F.pad(kept.any(1)[owner], (0, spare_rows)).unsqueeze(1),
        )


class RoutedWeights:
    """The `LayerWeights` of routed tokens, applied head by head so that each head stays in cache.

    States are [N', D]; contexts and neurons are those of all pairs of a token and a head.

    Args:
        slices: slices of the network's weights.
        index: index of the layer.
        routing: assignment of tokens to heads.
    """

    def __init__(self, slices: SliceCache, index: int, routing: Routing) -> None:
        self.routing = routing
        self._dtype = slices.dtype
        self._by_head = [
            (pairs, slices.get(index, (pairs.head,), with_bias=False))
            for pairs in routing.tokens_by_head
        ]
        self._weights = slices.layers[index]
        self._output_bias, self._down_bias = self._weights.biases
        layer = self._weights.layer
        self.spec, self.num_heads = layer.spec, layer.spec.num_heads
        self.positions = self._weights.positions
        self.attention_norm, self.feed_forward_norm = layer.attention_norm, layer.feed_forward_norm

    def qkv(self, states: Tensor) -> Tensor:
        """Return queries, keys and values of each pair, sorted by token, [P, 3 * D/H]."""
        read = states.to(self._dtype)
        parts = [
            kept.qkv(read.index_select(0, pairs.rows))[: pairs.count]
            for pairs, kept in self._by_head
        ]
        return torch.cat(parts).index_select(0, self.routing.places)

    def output(self, context: Tensor) -> Tensor:
        """Map contexts [P, D/H] to states [N', D]."""
        added = self._output_bias.float().repeat(self.routing.rows, 1)
        for pairs, kept in self._by_head:
            result = kept.output(context.index_select(0, pairs.pairs))
            added.index_add_(0, pairs.rows, result.float())
        return added

    def up(self, states: Tensor) -> Any:
        """Map states [N', D] to neurons; if heads own them, to a list with one tensor per head."""
        if self.spec.neurons_per_head is None:
            return self._weights.shared_feed_forward[0](states)
        read = states.to(self._dtype)
        return [kept.up(read.index_select(0, pairs.rows)) for pairs, kept in self._by_head]

    def down(self, neurons: Any) -> Tensor:
        """Map neurons to states [N', D]."""
        if self.spec.neurons_per_head is None:
            return self._weights.shared_feed_forward[1](neurons)
        added = self._down_bias.float().repeat(self.routing.rows, 1)
        for (pairs, kept), of_head in zip(self._by_head, neurons, strict=True):
            added.index_add_(0, pairs.rows, kept.down(of_head).float())
        return added


class PlainSums:
    """The sums and norms of a `Backend` in plain torch."""

    norm = staticmethod(plain.norm)
    add = staticmethod(plain.add)
    add_norm = staticmethod(plain.add_norm)


@dataclass(frozen=True)
class ItemRun:
    """The `AttentionHeads` of neighbouring items with equally many heads."""

    num_heads: int
    spec: LayerSpec
    positions: Positions | None


@dataclass(frozen=True)
class RoutedBackend(PlainSums):
    """The `Backend` for routed tokens."""

    kernels: Kernels
    routing: Routing

    def attend(self, projected: Tensor, weights: LayerWeights) -> Tensor:
        """Attend within each item, over the pairs of its tokens: [P, 3 * D/H] to [P, D/H]."""
        contexts, start, width = [], 0, projected.shape[1]
        for head_set, offsets in self.routing.items:
            if not head_set:
                continue
            num_heads = len(head_set)
            count = num_heads * offsets.num_tokens
            part = projected[start : start + count].view(offsets.num_tokens, num_heads * width)
            positions = weights.positions
            if positions is not None and positions.tables:
                positions = positions.of_heads(torch.tensor(head_set, device=projected.device))
            context = self.kernels.attend(
                part, offsets, ItemRun(num_heads, weights.spec, positions)
            )
            contexts.append(context.view(count, width // 3))
            start += count
        return torch.cat(contexts)
