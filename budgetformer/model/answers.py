"""From logits to answers: probabilities, confidence, and what several steps say together."""

from __future__ import annotations

import torch
from torch import Tensor

from budgetformer.model.architecture import MULTI_LABEL


def probabilities(logits: Tensor, problem_type: str | None) -> Tensor:
    """Turn logits [..., C] into probabilities.

    A softmax, or one sigmoid per label when multi-label.
    """
    return logits.sigmoid() if problem_type == MULTI_LABEL else logits.softmax(-1)


def confidence(logits: Tensor, problem_type: str | None) -> Tensor:
    """Return how confident logits [..., C] are of their answer, [...] in (0, 1).

    The largest probability; for multi-label, the least decided label's distance from a coin flip.
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
    """Combine the encoder's logits [B, C] with step 0's into the answer of a step >= 1.

    Args:
        logits: the encoder's, [B, C].
        exit_logits: step 0's, [B, C]; None: the network has no step 0.
        encoder_weight: see `Architecture`; one number, or one for each item [B, 1].
        exit_weight: the same.
    """
    weighted = encoder_weight * logits
    return weighted if exit_logits is None else weighted + exit_weight * exit_logits
