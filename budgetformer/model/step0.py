"""Step 0: linear classifiers that answer before the encoder runs.

Shapes: B items, T tokens, C labels.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from budgetformer.model.answers import probabilities
from budgetformer.model.architecture import MULTI_LABEL, Architecture
from budgetformer.model.tfidf import (
    HASHED_LEFT,
    HASHED_RIGHT,
    HASHED_SECOND,
    HASHED_SHARED,
    IDF_UNIT,
    MAX_ODDS,
    table_columns,
)


class ExitHead(nn.Module):
    """Step 0 of older checkpoints: a linear classifier on the bag of tokens and token pairs.

    Pairs of neighbouring tokens are hashed into `exit_buckets` rows, as in fastText: they add word
    order, and a look-up needs no multiply-adds. With `exit_rank`, rows are short vectors, and one
    linear map turns their sum into logits.
    """

    def __init__(self, config: Architecture) -> None:
        super().__init__()
        self.vocab_size, self.buckets = config.vocab_size, config.exit_buckets
        self.weight = nn.Embedding(
            config.vocab_size + config.exit_buckets,
            config.exit_rank or config.num_classes,
            padding_idx=config.pad_token_id,
        )
        self.map = (
            nn.Linear(config.exit_rank, config.num_classes, bias=False)
            if config.exit_rank
            else nn.Identity()
        )
        self.bias = nn.Parameter(torch.zeros(config.num_classes))

    def neighbours(self, input_ids: Tensor) -> Tensor:
        """Return the table rows of each pair of neighbours: ids [..., T] to rows [..., T-1].

        Raises:
            ValueError: the table has no rows for pairs.
        """
        if not self.buckets:
            raise ValueError("this step 0 has no rows for token pairs: exit_buckets is 0")
        left, right = input_ids[..., :-1], input_ids[..., 1:]
        return self.vocab_size + (left * HASHED_LEFT + right * HASHED_RIGHT) % self.buckets

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Classify ids [B, T] into logits [B, C]."""
        mask = attention_mask.to(self.bias.dtype)
        rows = input_ids
        if self.buckets:
            rows = torch.cat([input_ids, self.neighbours(input_ids)], dim=1)
            mask = torch.cat([mask, mask[:, :-1] * mask[:, 1:]], dim=1)
        total = (cast(Tensor, self.weight(rows)) * mask.unsqueeze(-1)).sum(1)
        return self.logits(total / mask.sum(1, keepdim=True).clamp(min=1).sqrt())

    def logits(self, bag: Tensor) -> Tensor:
        """Turn bags [B, R] into logits [B, C].

        A bag is the sum of n table rows (of tokens and pairs), divided by the square root of n.
        """
        return cast(Tensor, self.map(bag)) + self.bias


def exit_evidence(exit_logits: Tensor, problem_type: str | None) -> Tensor:
    """Return f_o's features of step-0 logits [B, C]: log-odds of the confidence, and entropy."""
    if problem_type == MULTI_LABEL:
        odds = exit_logits.abs().amin(-1)
    else:
        # From the logits, because 1 - p would lose all digits for a confident answer.
        top = exit_logits.argmax(-1, keepdim=True)
        others = exit_logits.scatter(-1, top, float("-inf")).logsumexp(-1)
        odds = exit_logits.gather(-1, top).squeeze(-1) - others
    p = probabilities(exit_logits, problem_type)
    entropy = torch.special.entr(p).sum(-1)
    if problem_type == MULTI_LABEL:
        entropy = (entropy + torch.special.entr(1 - p).sum(-1)) / p.shape[-1]
    return torch.stack([odds.clamp(max=MAX_ODDS), entropy], dim=-1)


class TfidfHead(nn.Module):
    """Step 0: a linear classifier on TF-IDF features of tokens and pairs of neighbouring tokens.

    Classifying a text sums a few table rows, which takes microseconds. The table has one column
    for two labels and C for C labels. `budgetformer.model.tfidf` defines the features, and computes
    the same with NumPy.
    """

    table: Tensor
    scale: Tensor
    idf: Tensor
    repeats: Tensor
    bias: Tensor

    def __init__(self, config: Architecture) -> None:
        super().__init__()
        self.vocab_size, self.buckets = config.vocab_size, config.exit_buckets
        rows = config.vocab_size + config.exit_buckets
        self.classes = config.num_classes
        columns = table_columns(self.classes, config.problem_type == MULTI_LABEL)
        self.register_buffer("table", torch.zeros(rows, columns, dtype=torch.int8))
        self.register_buffer("idf", torch.ones(rows, dtype=torch.uint8))
        self.register_buffer("scale", torch.zeros(columns))
        self.register_buffer("bias", torch.zeros(columns))
        self.register_buffer("repeats", torch.zeros(()))

    def fill(self, coefficients: Tensor, intercept: Tensor, idf: Tensor, repeats: float) -> None:
        """Set fitted weights.

        Args:
            coefficients: coefficients [K, rows]; stored as int8 with one scale per column.
            intercept: intercept of each column, [K].
            idf: inverse document frequency of each row, in units of `tfidf.IDF_UNIT`, [rows].
            repeats: weight of a feature's count, see `tfidf.tfidf`.
        """
        self.scale = coefficients.abs().amax(-1).float() / 127
        scaled = coefficients.float() / self.scale.clamp(min=1e-12)[:, None]
        self.table = scaled.round().to(torch.int8).T.contiguous()
        self.idf, self.bias = idf, intercept.float()
        self.repeats = torch.tensor(float(repeats))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """Classify ids [B, T] into logits [B, C]."""
        kept = attention_mask.bool()
        texts = [ids[mask] for ids, mask in zip(input_ids, kept, strict=True)]
        segments = (
            None
            if token_type_ids is None
            else [types[mask] for types, mask in zip(token_type_ids, kept, strict=True)]
        )
        return torch.stack(
            [
                self._classify_one(text, None if segments is None else segments[index])
                for index, text in enumerate(texts)
            ]
        )

    def _classify_one(self, ids: Tensor, segments: Tensor | None) -> Tensor:
        """Classify one text's ids [T] into logits [C]."""
        rows = ids
        if self.buckets:
            if segments is not None:
                second = segments > 0
                shared = torch.isin(ids, ids[~second])
                hashed = (ids * HASHED_SECOND + shared.long() * HASHED_SHARED) % self.buckets
                rows = torch.where(second, self.vocab_size + hashed, ids)
            pairs = (ids[:-1] * HASHED_LEFT + ids[1:] * HASHED_RIGHT) % self.buckets
            rows = torch.cat([rows, self.vocab_size + pairs])
        rows, counts = rows.unique(return_counts=True)
        weight = self.idf[rows].float() * IDF_UNIT * (1 + self.repeats * counts.log())
        weight = weight / weight.norm().clamp(min=1e-9)
        scores = (self.table[rows].float() * weight[:, None]).sum(0) * self.scale + self.bias
        return scores if len(scores) == self.classes else torch.cat([-scores, scores])
