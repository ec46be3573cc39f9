"""Embed token ids, and average token states into one vector.

Shapes: B items, T tokens, D width.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from budgetformer.model.architecture import Architecture


class Embeddings(nn.Module):
    """Sum word, segment and position embeddings, normalise the sum, and map it to width D."""

    def __init__(self, config: Architecture) -> None:
        super().__init__()
        width = config.embedding_size or config.hidden_size
        self.word = nn.Embedding(config.vocab_size, width, padding_idx=config.pad_token_id)
        self.segment = nn.Embedding(config.type_vocab_size, width)
        positions = config.max_position_embeddings
        self.position = nn.Embedding(positions, width) if config.position_embeddings else None
        normed = config.norm_embeddings
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps) if normed else nn.Identity()
        mapped = config.embedding_size is not None
        self.map = nn.Linear(width, config.hidden_size) if mapped else None
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.states_dtype: torch.dtype | None = None
        """Type that table rows are converted to before they are added; None: no conversion."""

    def forward(self, input_ids: Tensor, token_type_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Embed ids of one shape [...] into states [..., D]."""
        rows = [self.word(input_ids), self.segment(token_type_ids)]
        if self.position is not None:
            rows.append(self.position(position_ids))
        if self.states_dtype is not None:
            rows = [row.to(self.states_dtype) for row in rows]
        states = self.dropout(self.norm(sum(rows[1:], start=rows[0])))
        return cast(Tensor, states if self.map is None else self.map(states))


def masked_mean(states: Tensor, attention_mask: Tensor) -> Tensor:
    """Average token states [B, T, D] over the real tokens of a mask [B, T]; zeros without any."""
    weights = attention_mask.to(states.dtype).unsqueeze(-1)
    return (states * weights).sum(1) / weights.sum(1).clamp(min=1)
