"""Scores from logits.

Shapes: B texts, C labels.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from budgetformer.checkpoint.store import Checkpoint
from budgetformer.model.tfidf import Array

Activation = Literal["softmax", "sigmoid", "none"]


def activation_of(checkpoint: Checkpoint) -> Activation:
    """Return the activation for the problem type of a checkpoint."""
    return "sigmoid" if checkpoint.multi_label else "softmax"


def activate(logits: Array, function: Activation) -> Array:
    """Turn logits [B, C] into scores, float64 [B, C]."""
    scores = logits.astype(np.float64)
    if function == "sigmoid":
        scores = 0.5 * (1 + np.tanh(0.5 * scores))
    elif function == "softmax":
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
    return scores
