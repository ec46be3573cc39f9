"""Fit f_o, the controller of budgets."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from budgetformer.model.architecture import MULTI_LABEL
from budgetformer.model.budget import BudgetController, BudgetDecision
from budgetformer.model.encoder import SequenceClassifier
from budgetformer.model.modeling import BudgetFormerForSequenceClassification
from budgetformer.training.data import TokenizedTexts
from budgetformer.training.trainer import inputs, rows_by_length

BATCH = 256
CONTROLLER_EPOCHS = 8
REFERENCE_THRESHOLDS = (0.8, 0.9, 0.95)
"""Thresholds for f_o's targets, similar to those of the quality levels."""
FOLDS = 5
SHARE_UPDATES = 200


def wrong(logits: Tensor, labels: Tensor, problem_type: str | None) -> Tensor:
    """Return 1.0 for rows of logits [N, C] whose answer differs from the labels, else 0.0: [N]."""
    if problem_type == MULTI_LABEL:
        return ((logits > 0).long() != labels).any(-1).float()
    return (logits.argmax(-1) != labels).float()


@torch.no_grad()
def pooled_states(
    model: BudgetFormerForSequenceClassification, tokens: TokenizedTexts
) -> list[Tensor]:
    """Return the pooled states [N, D] that each budget decision of the network reads.

    With scope "input" this runs only the embeddings, with scope "layer" the full network.
    """
    decisions = [m for m in model.modules() if isinstance(m, BudgetDecision)]
    states = [torch.zeros(len(tokens.ids), model.config.hidden_size) for _ in decisions]
    pooled_by_decision: dict[int, Tensor] = {}
    hooks = [
        decision.register_forward_pre_hook(
            lambda _, args, i=i: pooled_by_decision.__setitem__(i, args[0])
        )
        for i, decision in enumerate(decisions)
    ]
    model.eval()
    skip_layers = model.config.budget_scope == "input"
    layers = model.encoder.layers
    if skip_layers:
        model.encoder.layers = torch.nn.ModuleList()
    try:
        for rows in rows_by_length(tokens, 64, "pooled states"):
            model(**inputs(tokens.batch(rows)), steps=model.config.num_steps)
            for i, pooled in pooled_by_decision.items():
                states[i][rows] = pooled
    finally:
        model.encoder.layers = layers
        for hook in hooks:
            hook.remove()
    return states


def fit_controllers(
    model: BudgetFormerForSequenceClassification, states: list[Tensor], target: Tensor, seed: int
) -> None:
    """Train every f_o to predict the probability that the cheapest step is wrong.

    Args:
        model: network with the budget decisions.
        states: inputs of each decision [N, E].
        target: 1 where the cheapest step's answer is wrong, else 0 [N].
        seed: seed of the order of the texts.
    """
    decisions = [m for m in model.modules() if isinstance(m, BudgetDecision)]
    for decision, pooled in zip(decisions, states, strict=True):
        torch.manual_seed(seed)
        optimizer = torch.optim.AdamW(decision.controller.parameters(), 1e-3, weight_decay=0.01)
        for _ in range(CONTROLLER_EPOCHS):
            for rows in torch.randperm(len(pooled)).split(BATCH):
                loss = F.binary_cross_entropy(decision.controller(pooled[rows]), target[rows])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()


def fit_controller(
    model: SequenceClassifier, features: Tensor, confidence: Tensor, seed: int
) -> Tensor:
    """Train an f_o that reads only step 0's answer to predict the first confident step of a text.

    The target of s is the mean over `REFERENCE_THRESHOLDS` of k / S, where k is the text's first
    step with a confidence above the threshold, or S if there is none.

    Args:
        model: network whose f_o is trained, on all texts.
        features: inputs of f_o [N, E] (`budgetformer.model.tfidf.evidence`).
        confidence: confidence of each step's served answer [S+1, N], on held-out texts.
        seed: seed of the folds and the initial weights.

    Returns:
        Out-of-fold s [N], for calibration.
    """
    decision = model.encoder.decision
    assert decision is not None
    steps = len(confidence) - 1
    target = torch.zeros(len(features))
    for threshold in REFERENCE_THRESHOLDS:
        confident = confidence[1:] >= threshold
        first = torch.where(confident.any(0), confident.int().argmax(0) + 1, steps)
        target += first / (steps * len(REFERENCE_THRESHOLDS))
    folds = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed)) % FOLDS
    s = torch.zeros(len(features))
    with torch.enable_grad():
        for fold in range(FOLDS):
            unseen = folds == fold
            _fit_share(decision.controller, features[~unseen], target[~unseen], seed)
            s[unseen] = decision.controller(features[unseen]).detach()
        _fit_share(decision.controller, features, target, seed)
    with torch.no_grad():  # round to float16, as checkpoints do
        for weight in decision.controller.parameters():
            weight.copy_(weight.half())
    return s


def _fit_share(controller: BudgetController, features: Tensor, target: Tensor, seed: int) -> None:
    """Fit f_o from new initial weights to shares of the ladder [N]; it reads features [N, E]."""
    mean, scale = features.mean(0), features.std(0).clamp(min=1e-3)
    torch.manual_seed(seed)
    for layer in (controller.hidden, controller.out):
        layer.reset_parameters()
    optimizer = torch.optim.AdamW(controller.parameters(), 1e-2, weight_decay=0.01)
    for _ in range(SHARE_UPDATES):
        loss = F.binary_cross_entropy(controller((features - mean) / scale), target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    with torch.no_grad():  # fold the standardisation into the weights
        controller.hidden.weight.div_(scale)
        controller.hidden.bias.sub_(controller.hidden.weight @ mean)
