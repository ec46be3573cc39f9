"""What a pass does between its matrix products: plain torch on CPUs, Triton on GPUs."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from budgetformer.compact.layout import Layout
from budgetformer.modules import Embeddings


class Kernels(Protocol):
    """A module with these functions; `plain` says what they do."""

    __name__: str

    def embed(
        self, ids: Tensor, kinds: Tensor, layout: Layout, by: Embeddings, dtype: torch.dtype
    ) -> Tensor:
        """Embed tokens."""

    def attend(self, projected: Tensor, layout: Layout, heads: int) -> Tensor:
        """Attend within each item."""

    def add_norm(self, states: Tensor, change: Tensor, by: nn.LayerNorm) -> Tensor:
        """Normalise the sum of states and a change."""

    def mean(self, states: Tensor, layout: Layout) -> Tensor:
        """Average the states of each item."""
