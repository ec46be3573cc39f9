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
    """Offsets of B items, one after another in N rows; rows after the last item are padding.

    Attributes:
        lengths: number of tokens of each item.
        device: device of the pass.
    """

    lengths: tuple[int, ...]
    device: torch.device

    @property
    def items(self) -> int:
        """Number of items B."""
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        """Number of rows that belong to items."""
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest item."""
        return max(self.lengths, default=0)

    @property
    def single_item(self) -> bool:
        """Whether the batch has exactly one item, so that `owner` is not needed."""
        return len(self.lengths) == 1

    @cached_property
    def owner(self) -> Tensor:
        """Item of each token, [N]."""
        lengths = torch.tensor(self.lengths, dtype=torch.long)
        return torch.arange(self.items).repeat_interleave(lengths).to(self.device)

    @cached_property
    def positions(self) -> Tensor:
        """Position of each token within its item, [N]."""
        positions = torch.arange(self.longest)
        if len(self.lengths) > 1:
            positions = torch.cat([positions[:length] for length in self.lengths])
        return positions.to(self.device)

    @cached_property
    def starts(self) -> Tensor:
        """First row of each item, then the end of the last: [B + 1], int32."""
        bounds = [0, *accumulate(self.lengths)]
        return torch.tensor(bounds, dtype=torch.int32).to(self.device)

    @cached_property
    def ends(self) -> Tensor:
        """End row (exclusive) of each token's item, [N]."""
        lengths = torch.tensor(self.lengths, dtype=torch.long)
        ends = torch.tensor([*accumulate(self.lengths)], dtype=torch.int32)
        return ends.repeat_interleave(lengths).to(self.device)

    @cached_property
    def counts(self) -> Tensor:
        """Tokens of each item, at least 1 as a divisor, [B, 1] in float32."""
        counts = [[max(length, 1.0)] for length in self.lengths]
        return torch.tensor(counts, device=self.device).view(-1, 1)

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

    The host never reads them, so a recorded pass can run with other items each time.

    Attributes:
        bounds: see `starts`.
        places: see `positions`.
        last: see `ends`; for padding rows, the first padding row.
    """

    bounds: Tensor
    places: Tensor
    last: Tensor

    @classmethod
    def of(cls, bounds: Tensor, places: Tensor, last: Tensor) -> StagedOffsets:
        """Return offsets that read int32 tensors [B + 1], [N] and [N], whose content may change."""
        return cls((), bounds.device, bounds, places, last)

    @property
    def items(self) -> int:
        """Maximum number of items B."""
        return len(self.bounds) - 1

    @property
    def tokens(self) -> int:
        """N, as any row may belong to an item."""
        return len(self.places)

    @property
    def positions(self) -> Tensor:
        """Position of each row within its item, [N]; arbitrary for padding rows."""
        return self.places

    @cached_property
    def owner(self) -> Tensor:
        """Item of each row, [N]; B for padding rows."""
        rows = torch.arange(self.tokens, dtype=torch.int32, device=self.device)
        return torch.searchsorted(self.bounds[1:], rows, right=True)

    @property
    def counts(self) -> Tensor:
        """Tokens of each item, at least 1 as a divisor, [B, 1] in float32."""
        return self.bounds.diff().clamp(min=1).float().unsqueeze(-1)

    @property
    def starts(self) -> Tensor:
        """First row of each item, then the end of the last: [B + 1], int32."""
        return self.bounds

    @property
    def ends(self) -> Tensor:
        """End row (exclusive) of each row's item, [N]; for padding rows, the first padding row."""
        return self.last
