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
    """Step 0: a linear classifier on the bag of tokens and of neighbours, before the encoder runs.

    Neighbouring tokens share a table of `exit_buckets` rows by their hash (as fastText does): word
    order is where a bag of single tokens is weakest, and a look-up multiplies nothing. With many
    labels the table holds short vectors, and one linear map makes logits of their sum.
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
        """Return the table rows of each token and its right neighbour: ids [..., T] to [..., T-1].

        Raises:
            ValueError: this head reads single tokens only.
        """
        if not self.buckets:
            raise ValueError("this step 0 has no rows for neighbours")
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

        A bag is the sum of the rows of n tokens and neighbours, divided by the root of n.
        """
        return cast(Tensor, self.map(bag)) + self.bias


def exit_evidence(exit_logits: Tensor, problem_type: str | None) -> Tensor:
    """Summarise step-0 logits [B, C] for f_o.

    Log-odds of its confidence, and its mean entropy, [B, 2].
    """
    if problem_type == MULTI_LABEL:
        odds = exit_logits.abs().amin(-1)
    else:
        # From the logits: 1 - p would lose all its digits where step 0 is confident.
        top = exit_logits.argmax(-1, keepdim=True)
        others = exit_logits.scatter(-1, top, float("-inf")).logsumexp(-1)
        odds = exit_logits.gather(-1, top).squeeze(-1) - others
    p = probabilities(exit_logits, problem_type)
    entropy = torch.special.entr(p).sum(-1)
    if problem_type == MULTI_LABEL:
        entropy = (entropy + torch.special.entr(1 - p).sum(-1)) / p.shape[-1]
    return torch.stack([odds.clamp(max=MAX_ODDS), entropy], dim=-1)


class TfidfHead(nn.Module):
    """Step 0: a linear classifier on TF-IDF features of tokens and of neighbouring tokens.

    A look-up multiplies nothing, and a text's features are few, so this costs microseconds. Two
    labels need one column of the table, C labels C. `budgetformer.model.tfidf` computes the same
    with NumPy, and says what the features are.
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
        """Take fitted weights.

        Args:
            coefficients: of each column, [K, rows]; kept as whole numbers of eight bits.
            intercept: of each column, [K].
            idf: of each row, in units of `step0.IDF_UNIT`, [rows].
            repeats: see `step0.tfidf`.
        """
        self.scale = coefficients.abs().amax(-1).float() / 127
        whole = coefficients.float() / self.scale.clamp(min=1e-12)[:, None]
        self.table = whole.round().to(torch.int8).T.contiguous()
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
            else [own[mask] for own, mask in zip(token_type_ids, kept, strict=True)]
        )
        return torch.stack(
            [
                self._one(text, None if segments is None else segments[place])
                for place, text in enumerate(texts)
            ]
        )

    def _one(self, ids: Tensor, segments: Tensor | None) -> Tensor:
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
