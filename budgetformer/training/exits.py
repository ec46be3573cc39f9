"""Fit f_o, which decides before the encoder runs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from budgetformer.modeling import BudgetFormerForSequenceClassification
from budgetformer.modules import MULTI_LABEL, BudgetDecision
from budgetformer.training.data import TokenizedTexts
from budgetformer.training.trainer import inputs, progress_bar

BATCH = 256
CONTROLLER_EPOCHS = 8


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
