"""Fit the fusion weights, which combine the encoder's logits and step 0's into an answer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from budgetformer.model.answers import fuse
from budgetformer.model.architecture import MULTI_LABEL

PRIOR = 1.0
"""Weight of the prior (encoder weight 1, exit weight 0), in texts; matters only with few texts."""
ITERATIONS = 100

StepFusion = tuple[float, float]
"""`encoder_weight` and `exit_weight` of one step."""


def fit_fusion(
    logits: Tensor,
    labels: Tensor,
    problem_type: str | None,
    has_step_0: bool,
    start: Sequence[StepFusion] | None = None,
) -> list[StepFusion]:
    """Return the fusion weights of each step 1..S, fitted on held-out texts.

    The answer of step k is `a * encoder + b * step 0`. Its cross-entropy is convex in (a, b), so
    the minimum does not depend on the start. The sum `a + b` also acts as a temperature, so that
    confidences of all steps are comparable. Neither weight is negative.

    Args:
        logits: logits before fusion [S+1, N, C]: those of step 0 in row 0, then the encoder's at
            each step.
        labels: class ids [N], 0/1 targets [N, C] when multi-label, or target probabilities [N, C].
        problem_type: problem type of the network.
        has_step_0: whether row 0 is used; otherwise b is 0.
        start: initial weights, which affect only the time.
    """
    exits = logits[0].double() if has_step_0 else None
    labels = labels.double() if labels.ndim == 2 else labels
    initial = start or [(1.0, 0.0)] * len(logits[1:])
    return [
        _fit_step(encoder.double(), exits, labels, problem_type, weights)
        for encoder, weights in zip(logits[1:], initial, strict=False)
    ]


def _fit_step(
    encoder: Tensor,
    exits: Tensor | None,
    labels: Tensor,
    problem_type: str | None,
    start: StepFusion,
) -> StepFusion:
    fitted = [True, exits is not None]
    weights = _minimise(encoder, exits, labels, problem_type, fitted, start)
    if min(weights) < 0:  # at most one is negative: fix it at 0 and fit the other
        fitted[weights.index(min(weights))] = False
        weights = _minimise(encoder, exits, labels, problem_type, fitted, start)
    return max(weights[0], 0.0), max(weights[1], 0.0)


def _minimise(
    encoder: Tensor,
    exits: Tensor | None,
    labels: Tensor,
    problem_type: str | None,
    fitted: Sequence[bool],
    start: StepFusion,
) -> StepFusion:
    """Return the weights with the lowest cross-entropy; weights that are not fitted are 0."""
    mask = torch.tensor(fitted, dtype=torch.double)
    prior = torch.tensor([1.0, 0.0], dtype=torch.double)
    weights = (torch.tensor(start, dtype=torch.double) * mask).requires_grad_()
    solver = torch.optim.LBFGS([weights], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        encoder_weight, exit_weight = weights * mask
        fused = fuse(encoder, exits, encoder_weight, exit_weight)
        if problem_type == MULTI_LABEL:
            error = F.binary_cross_entropy_with_logits(fused, labels)
        else:
            error = F.cross_entropy(fused, labels)
        error = error + PRIOR / len(labels) * (weights - prior).square().sum()
        error.backward()
        return error

    solver.step(loss)
    encoder_weight, exit_weight = (weights * mask).tolist()
    return encoder_weight, exit_weight
