"""Where the items of a packed batch lie: as the host knows it, or only the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class BatchOffsets:
    """B items, one after another in N rows; rows after the last item's are spare.

    Attributes:
        lengths: tokens of each item.
        device: where the pass runs.
    """

    lengths: tuple[int, ...]
    device: torch.device

    @property
    def items(self) -> int:
        """B."""
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        """Rows that are some item's."""
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest item."""
        return max(self.lengths, default=0)

    @property
    def alone(self) -> bool:
        """Whether every row is the same item's, so that there is nothing to tell apart."""
        return len(self.lengths) == 1

    @cached_property
    def owner(self) -> Tensor:
        """Item of each token, [N]."""
        lengths = torch.tensor(self.lengths, dtype=torch.long)
        return torch.arange(self.items).repeat_interleave(lengths).to(self.device)

    @cached_property
    def positions(self) -> Tensor:
        """Place of each token within its item, [N]."""
        places = torch.arange(self.longest)
        if len(self.lengths) > 1:
            places = torch.cat([places[:length] for length in self.lengths])
        return places.to(self.device)

    @cached_property
    def starts(self) -> Tensor:
        """First row of each item, and after them the end of the last: [B + 1], int32."""
        bounds = [0, *accumulate(self.lengths)]
        return torch.tensor(bounds, dtype=torch.int32).to(self.device)

    @cached_property
    def ends(self) -> Tensor:
        """Row behind the last of each token's item, [N]."""
        lengths = torch.tensor(self.lengths, dtype=torch.long)
        ends = torch.tensor([*accumulate(self.lengths)], dtype=torch.int32)
        return ends.repeat_interleave(lengths).to(self.device)

    @cached_property
    def counts(self) -> Tensor:
        """Tokens of each item, [B, 1] in float32; at least one, to divide by."""
        counts = [[max(length, 1.0)] for length in self.lengths]
        return torch.tensor(counts, device=self.device).view(-1, 1)

    @property
    def empty(self) -> Tensor:
        """Whether an item has no token, [B, 1]."""
        return (self.starts[1:] == self.starts[:-1]).unsqueeze(-1)

    def select(self, items: Sequence[int]) -> BatchOffsets:
        """Return the offsets of some of the items, one after another."""
        return BatchOffsets(tuple(self.lengths[item] for item in items), self.device)


@dataclass(frozen=True)
class StagedOffsets(BatchOffsets):
    """Offsets that only the device knows: of up to B items in N rows, the last ones empty.

    Nothing of them is read on the host, so that a recorded pass can run with other items each time.

    Attributes:
        bounds: as `starts`.
        places: as `positions`.
        last: as `ends`; of a spare row where the spare rows begin.
    """

    bounds: Tensor
    places: Tensor
    last: Tensor

    @classmethod
    def of(cls, bounds: Tensor, places: Tensor, last: Tensor) -> StagedOffsets:
        """Read the offsets from [B + 1], [N] and [N] in int32, which may change between runs."""
        return cls((), bounds.device, bounds, places, last)

    @property
    def items(self) -> int:
        """B."""
        return len(self.bounds) - 1

    @property
    def tokens(self) -> int:
        """Rows that may be some item's: N."""
        return len(self.places)

    @property
    def positions(self) -> Tensor:
        """Place of each row within its item, [N]; a spare row has any."""
        return self.places

    @cached_property
    def owner(self) -> Tensor:
        """Item of each row, [N]; a spare row has B."""
        places = torch.arange(self.tokens, dtype=torch.int32, device=self.device)
        return torch.searchsorted(self.bounds[1:], places, right=True)

    @property
    def counts(self) -> Tensor:
        """Tokens of each item, [B, 1] in float32; at least one, to divide by."""
        return self.bounds.diff().clamp(min=1).float().unsqueeze(-1)

    @property
    def starts(self) -> Tensor:
        """First row of each item, and after them the end of the last: [B + 1], int32."""
        return self.bounds

    @property
    def ends(self) -> Tensor:
        """Row behind the last of each row's item, [N]; of a spare row where those begin."""
        return self.last
