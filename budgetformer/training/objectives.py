"""What training minimises."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from budgetformer.modules import MULTI_LABEL


def distillation_loss(
    logits: Tensor, teacher: Tensor, temperature: float, problem_type: str | None
) -> Tensor:
    """Compare logits [B, C] with a teacher's, both softened by `temperature`.

    The gradient keeps its size whatever the temperature (Hinton et al., 2015).
    """
    if problem_type == MULTI_LABEL:
        target = (teacher / temperature).sigmoid()
        return F.binary_cross_entropy_with_logits(logits / temperature, target) * temperature**2
    student = F.log_softmax(logits / temperature, -1)
    target = F.log_softmax(teacher / temperature, -1)
    return F.kl_div(student, target, reduction="batchmean", log_target=True) * temperature**2


def random_steps(count: int, num_steps: int, bias: float, full_share: float = 0.0) -> Tensor:
    """Draw `count` ladder steps ceil(S * u^bias), u uniform; a share of them is the full step.

    A bias above 1 draws small steps more often.
    """
    steps = (torch.rand(count) ** bias * num_steps).ceil().long().clamp(1, num_steps)
    if full_share:
        steps[torch.rand(count) < full_share] = num_steps
    return steps


def budget_penalty(budget: Tensor, bounds: tuple[float, float]) -> Tensor:
    """Hinge on budgets s outside [s_min, s_max] (paper, regularisers), averaged."""
    low, high = bounds
    return (F.relu(low - budget) + F.relu(budget - high)).mean()


def relevance_entropy(relevance: Tensor) -> Tensor:
    """Mean entropy of relevance distributions [..., H] (paper, regularisers)."""
    entropy: Tensor = torch.special.entr(relevance).sum(-1)
    return entropy.mean()
