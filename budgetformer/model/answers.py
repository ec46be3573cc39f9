"""Turn logits into probabilities and confidence, and combine the logits of several steps."""

from __future__ import annotations

import torch
from torch import Tensor

from budgetformer.model.architecture import MULTI_LABEL


def probabilities(logits: Tensor, problem_type: str | None) -> Tensor:
    """Turn logits [..., C] into probabilities: a softmax, or a sigmoid per label if multi-label."""
    return logits.sigmoid() if problem_type == MULTI_LABEL else logits.softmax(-1)


def confidence(logits: Tensor, problem_type: str | None) -> Tensor:
    """Return the confidence [...] in (0, 1) of answers with logits [..., C].

    It is the largest probability; for multi-label, max(p, 1 - p) of the most uncertain label.
    """
    p = probabilities(logits, problem_type)
    if problem_type == MULTI_LABEL:
        return torch.maximum(p, 1 - p).amin(-1)
    return p.amax(-1)


def fuse(
    logits: Tensor,
    exit_logits: Tensor | None,
    encoder_weight: Tensor | float,
    exit_weight: Tensor | float,
) -> Tensor:
    """Return the weighted sum of the encoder's logits and step 0's: the answer of a step >= 1.

    Args:
        logits: from the encoder, [B, C].
        exit_logits: from step 0, [B, C]; None if the network has no step 0.
        encoder_weight, exit_weight: see `Architecture`; one number, or one per item [B, 1].
    """
    weighted = encoder_weight * logits
    return weighted if exit_logits is None else weighted + exit_weight * exit_logits
