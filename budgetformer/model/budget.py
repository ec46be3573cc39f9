"""Decide the heads of each input: f_o decides how many, g_d decides which.

Shapes: B items, D width, H heads, L layers, E features of step 0's answer.
Source: Faye et al., "Adaptive Head Budgeting for Efficient Multi-Head Attention", 2026 ("the
paper").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from budgetformer.model.architecture import Architecture


class BudgetController(nn.Module):
    """f_o: predict from a pooled state the share of heads that an input needs (paper)."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(input_size, hidden_size)
        self.out = nn.Linear(hidden_size, 1)

    def forward(self, pooled: Tensor) -> Tensor:
        """Map pooled states [B, D'] to s [B] in (0, 1)."""
        logit = cast(Tensor, self.out(F.relu(self.hidden(pooled))))
        return logit.squeeze(-1).sigmoid()

    def fix(self, share: float) -> None:
        """Return `share` for every input and freeze f_o: the ablation without f_o (paper).

        The share is stored in the weights, so that saved copies and all passes return it too.
        """
        self.requires_grad_(False)
        self.out.weight.zero_()
        self.out.bias.fill_(torch.logit(torch.tensor(share), eps=1e-6).item())


class HeadScorer(nn.Module):
    """g_d: score the relevance of each head from a pooled state (paper, head scorer).

    With `budget_scope = "input"` one scorer scores the heads of all layers.
    """

    def __init__(self, config: Architecture, num_layers: int) -> None:
        super().__init__()
        self.num_layers, self.num_heads = num_layers, config.num_attention_heads
        self.out = nn.Linear(config.hidden_size, num_layers * self.num_heads)

    def forward(self, pooled: Tensor) -> Tensor:
        """Map pooled states [B, D] to scores [B, layers, H]; their softmax is the relevance."""
        return cast(Tensor, self.out(pooled)).view(-1, self.num_layers, self.num_heads)


@dataclass(frozen=True)
class Gating:
    """How budgets become gates while training; evaluation always uses hard gates.

    Attributes:
        mode: "hard" keeps the top k with a straight-through gradient on the relevance; "soft" keeps
            all heads and weights them (the paper's training).
        temperature: divides the scores before the softmax; high early in training (exploration),
            annealed later (exploitation).
        noise: standard deviation of the noise added to the scores, annealed likewise.
        random_heads: replace g_d's scores by noise, also in evaluation: the paper's ablation
            without g_d.
    """

    mode: Literal["hard", "soft"] = "hard"
    temperature: float = 1.0
    noise: float = 0.0
    random_heads: bool = False


@dataclass(frozen=True)
class HeadGates:
    """The head gates of B items, and the results of f_o and g_d that they follow from.

    Attributes:
        budget: f_o's s, [B].
        relevance: g_d's relevance of each head, [B, layers, H]; None with ranked heads.
        gates: factor of each head, [B, layers, H].
    """

    budget: Tensor
    relevance: Tensor | None
    gates: Tensor


class BudgetDecision(nn.Module):
    """Turn a pooled state into the head gates of all layers (scope "input") or one ("layer")."""

    def __init__(self, config: Architecture, layer: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.layers = list(range(config.num_hidden_layers)) if layer is None else [layer]
        self.controller = BudgetController(config.decision_inputs, config.controller_hidden_size)
        scores_heads = config.head_selection == "input"
        self.scorer = HeadScorer(config, len(self.layers)) if scores_heads else None
        self.gating = Gating()

    def budget(self, pooled: Tensor, evidence: Tensor | None = None) -> Tensor:
        """Return f_o's s [B] for pooled states [B, D] and f_o's features of step 0 [B, E]."""
        if self.config.has_one_budget:
            return pooled.new_ones(len(pooled))
        parts = [] if self.config.decides_from_step0 else [pooled]
        missing = self.config.decision_inputs - sum(part.shape[-1] for part in parts)
        if missing:
            zeros = pooled.new_zeros(len(pooled), missing)
            parts.append(zeros if evidence is None else evidence.to(pooled.dtype))
        return cast(Tensor, self.controller(torch.cat(parts, dim=-1)))

    def heads_per_layer(self, steps: Tensor) -> Tensor:
        """Return the number of heads of each layer at ladder steps [B] (0: none), [B, layers]."""
        plans = [[0] * self.config.num_hidden_layers, *self.config.ladder]
        table = torch.tensor(plans, device=steps.device)[:, self.layers]
        return table[steps]

    def forward(
        self, pooled: Tensor, steps: Tensor | None = None, evidence: Tensor | None = None
    ) -> HeadGates:
        """Decide for pooled states [B, D]; `steps` [B] overrides f_o."""
        s = share = self.budget(pooled, evidence)
        if steps is None:
            steps = budget_step(s, self.config.num_steps)
        else:
            share = s.detach()  # the steps do not come from f_o, so it gets no gradient
        heads_per_layer = self.heads_per_layer(steps)
        scores = self._scores(pooled)
        if scores is None:
            first = torch.arange(self.config.num_attention_heads, device=pooled.device)
            hard = (first < heads_per_layer.unsqueeze(-1)).to(pooled.dtype)
            return HeadGates(s, None, self._soften(hard, share, None))
        relevance = (scores / self.gating.temperature).softmax(-1)
        return HeadGates(
            s, relevance, self._soften(keep_top(scores, heads_per_layer), share, relevance)
        )

    def _scores(self, pooled: Tensor) -> Tensor | None:
        if self.scorer is None:
            return None
        scores = cast(Tensor, self.scorer(pooled))
        if self.gating.random_heads:
            return torch.randn_like(scores)
        if self.training and self.gating.noise:
            scores = scores + self.gating.noise * torch.randn_like(scores)
        return scores

    def _soften(self, hard: Tensor, share: Tensor, relevance: Tensor | None) -> Tensor:
        """Return the gates [B, layers, H]: `hard` in evaluation, differentiable ones in training.

        Soft gates are H * share * relevance. Without relevance, they are a sigmoid that relaxes the
        condition "head i is one of the first H * share". In mode "hard", the values are those of
        `hard`, and the soft gates only give the gradient (straight-through).
        """
        if not self.training:
            return hard
        expected_heads = share[:, None, None] * self.config.num_attention_heads
        if relevance is None:
            middles = torch.arange(self.config.num_attention_heads, device=share.device) + 0.5
            soft = ((expected_heads - middles) / self.gating.temperature).sigmoid().expand_as(hard)
        else:
            soft = expected_heads * relevance
        if self.gating.mode == "soft":
            return soft
        return hard + soft - soft.detach()


def budget_step(s: Tensor, num_steps: int) -> Tensor:
    """Map s [B] to steps [B] in 1..S by the paper's rule k = ceil(s * H), with S in place of H."""
    return (s * num_steps).ceil().long().clamp(1, num_steps)


def keep_top(scores: Tensor, num_heads: Tensor) -> Tensor:
    """Return 1 for the `num_heads` [...] highest of scores [..., H], else 0.

    Ties go to the lower index.
    """
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return (order.argsort(dim=-1) < num_heads.unsqueeze(-1)).to(scores.dtype)
