"""The operations of a pass other than matrix products: plain torch on CPUs, Triton on GPUs."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from budgetformer.inference.backends.linear import Linear
from budgetformer.inference.batch_offsets import BatchOffsets
from budgetformer.model.embeddings import Embeddings
from budgetformer.model.layer import AttentionHeads
from budgetformer.model.step0 import ExitHead


class Kernels(Protocol):
    """A module with these functions; `plain` documents their arguments."""

    __name__: str

    def bag(self, ids: Tensor, offsets: BatchOffsets, exit_head: ExitHead) -> Tensor:
        """Sum the table rows of each item for step 0."""

    def exit_evidence(self, exit_logits: Tensor, problem_type: str | None) -> Tensor:
        """Return f_o's features of step-0 logits."""

    def embed(
        self,
        ids: Tensor,
        kinds: Tensor,
        offsets: BatchOffsets,
        embeddings: Embeddings,
        dtype: torch.dtype,
    ) -> Tensor:
        """Embed tokens."""

    def attend(self, projected: Tensor, offsets: BatchOffsets, weights: AttentionHeads) -> Tensor:
        """Attend within each item."""

    def add_norm(self, states: Tensor, change: Tensor, layer_norm: nn.Module) -> Tensor:
        """Normalise the sum of states and a change."""

    def mean(self, states: Tensor, offsets: BatchOffsets) -> Tensor:
        """Average the states of each item."""

    def classify(self, states: Tensor, offsets: BatchOffsets, classifier: nn.Linear) -> Tensor:
        """Map the mean of each item's states to logits."""


class FusingKernels(Kernels, Protocol):
    """Kernels that can also fuse the two maps around a norm, such as `gpu`."""

    def can_fuse(self, first: Linear, second: Linear | None, layer_norm: nn.Module) -> bool:
        """Return whether these maps can be fused."""

    def map_norm_map(
        self,
        inputs: Tensor,
        first: Linear,
        states: Tensor,
        layer_norm: nn.Module,
        second: Linear | None,
        offsets: BatchOffsets,
        two_per_sm: bool = False,
    ) -> Tensor:
        """Add mapped inputs to the states, normalise the sum, and map it."""
