"""Loss functions and random steps for training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from budgetformer.model.architecture import MULTI_LABEL


def distillation_loss(
    logits: Tensor, teacher: Tensor, temperature: float, problem_type: str | None
) -> Tensor:
    """Return the distillation loss [B] of logits [B, C] against a teacher's logits.

    The factor temperature^2 keeps the scale of the gradient (Hinton et al., 2015).
    """
    if problem_type == MULTI_LABEL:
        target = (teacher / temperature).sigmoid()
        losses = F.binary_cross_entropy_with_logits(logits / temperature, target, reduction="none")
        return losses.mean(-1) * temperature**2
    student = F.log_softmax(logits / temperature, -1)
    target = F.log_softmax(teacher / temperature, -1)
    return F.kl_div(student, target, reduction="none", log_target=True).sum(-1) * temperature**2


def label_loss(logits: Tensor, labels: Tensor, problem_type: str | None) -> Tensor:
    """Return the cross-entropy [B] of logits [B, C]; when multi-label, the mean over labels."""
    if problem_type == MULTI_LABEL:
        target = labels.to(logits.dtype)
        return F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(-1)
    return F.cross_entropy(logits, labels, reduction="none")


def random_steps(count: int, num_steps: int, bias: float, full_share: float = 0.0) -> Tensor:
    """Draw `count` random ladder steps ceil(S * u^bias), with u uniform in 0..1.

    A bias above 1 favours small steps. A share `full_share` of the steps becomes the full step.
    """
    steps = (torch.rand(count) ** bias * num_steps).ceil().long().clamp(1, num_steps)
    if full_share:
        steps[torch.rand(count) < full_share] = num_steps
    return steps


def budget_penalty(budget: Tensor, bounds: tuple[float, float]) -> Tensor:
    """Return the mean hinge loss of budgets s outside their bounds (paper, regularisers)."""
    low, high = bounds
    return (F.relu(low - budget) + F.relu(budget - high)).mean()


def relevance_entropy(relevance: Tensor) -> Tensor:
    """Return the mean entropy of relevance distributions [..., H] (paper, regularisers)."""
    entropy: Tensor = torch.special.entr(relevance).sum(-1)
    return entropy.mean()
