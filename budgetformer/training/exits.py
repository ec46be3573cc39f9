"""Fit f_o, which decides before the encoder runs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from budgetformer.model.architecture import MULTI_LABEL
from budgetformer.model.budget import BudgetController, BudgetDecision
from budgetformer.model.encoder import SequenceClassifier
from budgetformer.model.modeling import BudgetFormerForSequenceClassification
from budgetformer.training.data import TokenizedTexts
from budgetformer.training.trainer import inputs, progress_bar

BATCH = 256
CONTROLLER_EPOCHS = 8
REFERENCE_THRESHOLDS = (0.8, 0.9, 0.95)
"""Confidence that counts as enough when f_o learns: about what the quality levels ask for."""
FOLDS = 5
SHARE_UPDATES = 200


def wrong(logits: Tensor, labels: Tensor, problem_type: str | None) -> Tensor:
    """Mark the rows of logits [N, C] whose answer is not the labels', as 0/1 floats [N]."""
    if problem_type == MULTI_LABEL:
        return ((logits > 0).long() != labels).any(-1).float()
    return (logits.argmax(-1) != labels).float()


@torch.no_grad()
def pooled_states(
    model: BudgetFormerForSequenceClassification, tokens: TokenizedTexts, title: str
) -> list[Tensor]:
    """Return what each decision of the network reads: pooled states [N, D], one per decision.

    With scope "input" that needs the embeddings alone; with scope "layer" a pass at the full
    budget.
    """
    decisions = [m for m in model.modules() if isinstance(m, BudgetDecision)]
    states = [torch.zeros(len(tokens.ids), model.config.hidden_size) for _ in decisions]
    seen: dict[int, Tensor] = {}
    hooks = [
        decision.register_forward_pre_hook(lambda _, args, i=i: seen.__setitem__(i, args[0]))
        for i, decision in enumerate(decisions)
    ]
    model.eval()
    skip_layers = model.config.budget_scope == "input"
    layers = model.encoder.layers
    if skip_layers:
        model.encoder.layers = torch.nn.ModuleList()
    try:
        with progress_bar() as bar:
            task = bar.add_task(title, total=len(tokens.ids), note="")
            for batch in tokens.batches(64):
                model(**inputs(batch), steps=model.config.num_steps)
                for i, pooled in seen.items():
                    states[i][batch.rows] = pooled
                bar.advance(task, len(batch.rows))
    finally:
        model.encoder.layers = layers
        for hook in hooks:
            hook.remove()
    return states


def fit_controllers(
    model: BudgetFormerForSequenceClassification, states: list[Tensor], target: Tensor, seed: int
) -> None:
    """Teach every f_o the probability that the cheapest step errs.

    Args:
        model: whose decisions are trained.
        states: what each decision reads, [N, E].
        target: 1 where the cheapest step's answer was wrong, [N].
        seed: of order and initial weights.
    """
    decisions = [m for m in model.modules() if isinstance(m, BudgetDecision)]
    for decision, read in zip(decisions, states, strict=True):
        torch.manual_seed(seed)
        optimizer = torch.optim.AdamW(decision.controller.parameters(), 1e-3, weight_decay=0.01)
        for _ in range(CONTROLLER_EPOCHS):
            for rows in torch.randperm(len(read)).split(BATCH):
                loss = F.binary_cross_entropy(decision.controller(read[rows]), target[rows])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()


def fit_controller(model: SequenceClassifier, read: Tensor, confident: Tensor, seed: int) -> Tensor:
    """Teach f_o, which reads step 0's answer alone, at which step a text will be confident.

    s learns the share of the ladder that a text needs: its first confident step k as k / S, and 1
    where no step is confident, averaged over `REFERENCE_THRESHOLDS`.

    Args:
        model: whose f_o is trained, on all texts.
        read: f_o's inputs [N, E] (`budgetformer.model.tfidf.evidence`).
        confident: confidence of the served answer at each step [S+1, N], on texts that no weight
            has seen.
        seed: of folds and initial weights.

    Returns:
        s [N] of each text, from an f_o that was trained without it: what calibration may use.
    """
    decision = model.encoder.decision
    assert decision is not None
    steps = len(confident) - 1
    target = torch.zeros(len(read))
    for threshold in REFERENCE_THRESHOLDS:
        reached = confident[1:] >= threshold
        first = torch.where(reached.any(0), reached.int().argmax(0) + 1, steps)
        target += first / (steps * len(REFERENCE_THRESHOLDS))
    folds = torch.randperm(len(read), generator=torch.Generator().manual_seed(seed)) % FOLDS
    s = torch.zeros(len(read))
    with torch.enable_grad():
        for fold in range(FOLDS):
            held = folds == fold
            _fit_share(decision.controller, read[~held], target[~held], seed)
            s[held] = decision.controller(read[held]).detach()
        _fit_share(decision.controller, read, target, seed)
    with torch.no_grad():  # as a checkpoint holds it
        for weight in decision.controller.parameters():
            weight.copy_(weight.half())
    return s


def _fit_share(controller: BudgetController, read: Tensor, target: Tensor, seed: int) -> None:
    """Fit f_o to shares [N] from new weights, on standardised inputs [N, E]."""
    mean, spread = read.mean(0), read.std(0).clamp(min=1e-3)
    torch.manual_seed(seed)
    for layer in (controller.hidden, controller.out):
        layer.reset_parameters()
    optimizer = torch.optim.AdamW(controller.parameters(), 1e-2, weight_decay=0.01)
    for _ in range(SHARE_UPDATES):
        loss = F.binary_cross_entropy(controller((read - mean) / spread), target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    with torch.no_grad():  # the served f_o reads its inputs as they are
        controller.hidden.weight.div_(spread)
        controller.hidden.bias.sub_(controller.hidden.weight @ mean)
