"""Fit how the encoder's and step 0's logits are combined into the answer of each step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from budgetformer.model.answers import fuse
from budgetformer.model.architecture import MULTI_LABEL

PRIOR = 1.0
"""Weight of the prior, counted in texts: it decides only where there are hardly any."""
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
    """Fit the weights of each step 1..S on held-out texts.

    The answer of step k is `a * encoder + b * step 0`. Its cross-entropy is convex in (a, b), so
    the fit is the one minimum whatever its start. The sum `a + b` is also a temperature: it makes
    the confidence of every step mean the same. Neither weight is negative: a step that only says
    the opposite of another has nothing to add.

    Args:
        logits: [S+1, N, C], row 0 step 0's, then the encoder's at each step, before fusion.
        labels: class ids [N], or 0/1 targets [N, C] when multi-label; or probabilities [N, C],
            which the answers are to meet.
        problem_type: of the network.
        has_step_0: whether row 0 says anything; otherwise b is 0.
        start: weights to start from, which changes how long it takes and nothing else.
    """
    exits = logits[0].double() if has_step_0 else None
    labels = labels.double() if labels.ndim == 2 else labels
    begin = start or [(1.0, 0.0)] * len(logits[1:])
    return [
        _fit_step(step.double(), exits, labels, problem_type, own)
        for step, own in zip(logits[1:], begin, strict=False)
    ]


def _fit_step(
    encoder: Tensor,
    exits: Tensor | None,
    labels: Tensor,
    problem_type: str | None,
    start: StepFusion,
) -> StepFusion:
    kept = [True, exits is not None]
    weights = _minimise(encoder, exits, labels, problem_type, kept, start)
    if min(weights) < 0:  # at most one is: the other alone is better than nothing
        kept[weights.index(min(weights))] = False
        weights = _minimise(encoder, exits, labels, problem_type, kept, start)
    return max(weights[0], 0.0), max(weights[1], 0.0)


def _minimise(
    encoder: Tensor,
    exits: Tensor | None,
    labels: Tensor,
    problem_type: str | None,
    kept: Sequence[bool],
    start: StepFusion,
) -> StepFusion:
    """Return the weights of least cross-entropy; those that are not kept are 0."""
    mask = torch.tensor(kept, dtype=torch.double)
    prior = torch.tensor([1.0, 0.0], dtype=torch.double)
    weights = (torch.tensor(start, dtype=torch.double) * mask).requires_grad_()
    solver = torch.optim.LBFGS([weights], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        own, share = weights * mask
        fused = fuse(encoder, exits, own, share)
        if problem_type == MULTI_LABEL:
            error = F.binary_cross_entropy_with_logits(fused, labels)
        else:
            error = F.cross_entropy(fused, labels)
        error = error + PRIOR / len(labels) * (weights - prior).square().sum()
        error.backward()
        return error

    solver.step(loss)
    own, share = (weights * mask).tolist()
    return own, share
