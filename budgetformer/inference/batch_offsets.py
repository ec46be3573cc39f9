"""Offsets of the items in a packed batch, known on the host or only on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class BatchOffsets:
    """Offsets of B items with T tokens in all, which fill the first T rows of a packed batch.

    Any rows after them are padding.

    Attributes:
        lengths: number of tokens of each item.
        device: device of the pass.
    """

    lengths: tuple[int, ...]
    device: torch.device

    @property
    def num_items(self) -> int:
        """Number of items B."""
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """Number of tokens T of all items."""
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        """Number of tokens of the longest item."""
        return max(self.lengths, default=0)

    @property
    def single_item(self) -> bool:
        """Whether the batch has exactly one item, so that `owner` is not needed."""
        return len(self.lengths) == 1

    @cached_property
    def owner(self) -> Tensor:
        """Item of each token, [T]."""
        lengths = torch.tensor(self.lengths, dtype=torch.long)
        return torch.arange(self.num_items).repeat_interleave(lengths).to(self.device)

    @cached_property
    def positions(self) -> Tensor:
        """Position of each token within its item, [T]."""
        positions = torch.arange(self.longest)
        if len(self.lengths) > 1:
            positions = torch.cat([positions[:length] for length in self.lengths])
        return positions.to(self.device)

    @cached_property
    def starts(self) -> Tensor:
        """First row of each item, then the end of the last: [B + 1], int32."""
        return torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32).to(self.device)

    @cached_property
    def ends(self) -> Tensor:
        """End row (exclusive) of each token's item, [T], int32."""
        lengths = torch.tensor(self.lengths, dtype=torch.long)
        ends = torch.tensor([*accumulate(self.lengths)], dtype=torch.int32)
        return ends.repeat_interleave(lengths).to(self.device)

    @cached_property
    def divisors(self) -> Tensor:
        """Number of tokens of each item, at least 1 so that it can divide, [B, 1], float32."""
        lengths = torch.tensor(self.lengths, dtype=torch.float32)
        return lengths.clamp(min=1).unsqueeze(-1).to(self.device)

    @property
    def empty(self) -> Tensor:
        """Whether each item has no token, [B, 1]."""
        return (self.starts[1:] == self.starts[:-1]).unsqueeze(-1)

    def select(self, items: Sequence[int]) -> BatchOffsets:
        """Return the offsets of a batch of these items only."""
        return BatchOffsets(tuple(self.lengths[item] for item in items), self.device)


@dataclass(frozen=True)
class StagedOffsets(BatchOffsets):
    """Offsets stored on the device: up to B items in N rows; unused items are empty.

    The host never reads them, so a CUDA graph that was recorded once can run with other items each
    time.

    Attributes:
        item_starts: first row of each item, then the end of the last item: [B + 1], int32.
        row_positions: position of each row within its item, [N], int32; arbitrary for padding rows.
        row_ends: end row (exclusive) of each row's item, [N], int32; for padding rows, the first
            padding row.
    """

    item_starts: Tensor
    row_positions: Tensor
    row_ends: Tensor

    @classmethod
    def from_tensors(
        cls, item_starts: Tensor, row_positions: Tensor, row_ends: Tensor
    ) -> StagedOffsets:
        """Return offsets that read device tensors, whose content may change between passes."""
        return cls((), item_starts.device, item_starts, row_positions, row_ends)

    @property
    def num_items(self) -> int:
        """Maximum number of items B."""
        return len(self.item_starts) - 1

    @property
    def num_tokens(self) -> int:
        """Number of rows N, since any row may belong to an item."""
        return len(self.row_positions)

    @property
    def positions(self) -> Tensor:
        """See `row_positions`."""
        return self.row_positions

    @cached_property
    def owner(self) -> Tensor:
        """Item of each row, [N]; B for padding rows."""
        rows = torch.arange(self.num_tokens, dtype=torch.int32, device=self.device)
        return torch.searchsorted(self.item_starts[1:], rows, right=True)

    @property
    def divisors(self) -> Tensor:
        """Number of tokens of each item, at least 1 so that it can divide, [B, 1], float32."""
        return self.item_starts.diff().clamp(min=1).float().unsqueeze(-1)

    @property
    def starts(self) -> Tensor:
        """See `item_starts`."""
        return self.item_starts

    @property
    def ends(self) -> Tensor:
        """See `row_ends`."""
        return self.row_ends
