"""One layer in which items keep different heads, without a loop over items.

As in mixture-of-experts kernels, (token, head) pairs are sorted by head: each head is one matrix
product over all the tokens that keep it, and what it adds is summed into those tokens' rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from budgetformer.inference.backends.kernels import Kernels
from budgetformer.inference.backends.linear import padded_rows
from budgetformer.inference.layout import Layout
from budgetformer.inference.weights import HeadSet, SliceCache


@dataclass(frozen=True)
class Pairs:
    """The tokens that keep one head.

    Attributes:
        head: which.
        count: how many, n.
        rows: of states, [n']; where n is padded, the last ones are a row that is no token's.
        pairs: the same tokens' places among all pairs sorted by token, [n'].
    """

    head: int
    count: int
    rows: Tensor
    pairs: Tensor

    @classmethod
    def of(cls, head: int, count: int, rows: Tensor, pairs: Tensor, spare: int | None) -> Pairs:
        """Pad a head's tokens with the row `spare`, if there is one."""
        if spare is None:
            return cls(head, count, rows, pairs)
        missing = padded_rows(count) - count
        return cls(head, count, F.pad(rows, (0, missing), value=spare), F.pad(pairs, (0, missing)))


@dataclass(frozen=True)
class Routing:
    """Which tokens go to which heads: P pairs of a token and a head that it keeps.

    Attributes:
        heads: those that some item keeps, with their tokens.
        places: of the pairs sorted by token, in the order of `heads`, [P].
        items: in runs of as many kept heads: (kept heads, where the run's items are).
        used: whether a row keeps any head, [N', 1]; None: all of them do.
    """

    heads: list[Pairs]
    places: Tensor
    items: list[tuple[int, Layout]]
    used: Tensor | None

    @classmethod
    def of(
        cls,
        sets: Sequence[HeadSet],
        layout: Layout,
        num_heads: int,
        spare_rows: int,
    ) -> Routing:
        """Sort the pairs of B items.

        Args:
            sets: heads that each item keeps.
            layout: where they are.
            num_heads: H.
            spare_rows: rows of states after the tokens'; with any, a head's tokens are padded.
        """
        owner = layout.owner
        cells = [item * num_heads + head for item, heads in enumerate(sets) for head in heads]
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
        runs: list[tuple[int, list[int]]] = []
        for head_set, length in zip(sets, layout.lengths, strict=True):
            if not runs or runs[-1][0] != len(head_set):
                runs.append((len(head_set), []))
            runs[-1][1].append(length)
        return cls(
            heads=[
                Pairs.of(head, count, rows, pairs, len(owner) if spare_rows else None)
                for head, (count, rows, pairs) in enumerate(by_head)
                if count
            ],
            places=places,
            items=[(heads, Layout(tuple(run), layout.device)) for heads, run in runs],
            used=None if all(sets) else F.pad(kept.any(1)[owner], (0, spare_rows)).unsqueeze(1),
        )


class RoutedLayer:
    """The two maps of one layer over routed tokens, head by head so that each stays in cache."""

    def __init__(self, slices: SliceCache, kernels: Kernels, index: int, routing: Routing) -> None:
        self.routing = routing
        self._kernels = kernels
        self._dtype = slices.dtype
        self._heads = [
            (pairs, slices.get(index, (pairs.head,), with_bias=False)) for pairs in routing.heads
        ]
        self._output_bias, self._down_bias = slices.layers[index].biases

    def attend(self, states: Tensor, onto: Tensor) -> Tensor:
        """Return `onto` [N', D] and what attention to states [N', D] adds."""
        read = states.to(self._dtype)
        by_head = [
            kept.qkv(read.index_select(0, pairs.rows))[: pairs.count] for pairs, kept in self._heads
        ]
        projected = torch.cat(by_head).index_select(0, self.routing.places)
        contexts, start = [], 0
        for heads, layout in self.routing.items:
            if not heads:
                continue
            count = heads * layout.tokens
            part = projected[start : start + count].view(layout.tokens, heads * projected.shape[1])
            context = self._kernels.attend(part, layout, heads)
            contexts.append(context.view(count, projected.shape[1] // 3))
            start += count
        context = torch.cat(contexts)
        added = onto + self._output_bias
        for pairs, kept in self._heads:
            result = kept.output(context.index_select(0, pairs.pairs))
            added.index_add_(0, pairs.rows, result.to(added.dtype))
        return added

    def transform(self, states: Tensor, onto: Tensor) -> Tensor:
        """Return `onto` [N', D] and what the coupled feed-forward net makes of states [N', D]."""
        read = states.to(self._dtype)
        added = onto + self._down_bias
        for pairs, kept in self._heads:
            result = kept.down(kept.up(read.index_select(0, pairs.rows)))
            added.index_add_(0, pairs.rows, result.to(added.dtype))
        return added
