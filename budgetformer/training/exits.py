"""Fit step 0 and f_o: the two parts that decide before the encoder runs."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from budgetformer.modeling import BudgetFormerForSequenceClassification
from budgetformer.modules import MULTI_LABEL, BudgetDecision, ExitHead, exit_evidence
from budgetformer.training.data import Examples, TokenizedTexts
from budgetformer.training.recipe import Recipe
from budgetformer.training.trainer import inputs, progress_bar

BATCH = 256
CONTROLLER_EPOCHS = 8


def fit_exit_head(
    model: BudgetFormerForSequenceClassification,
    tokens: TokenizedTexts,
    examples: Examples,
    recipe: Recipe,
) -> Tensor:
    """Train step 0 on all rows, and return out-of-fold logits [N, C] for every row.

    The second come from heads that never saw the row, so that they are as right and as sure as step
    0 will be on new texts; f_o learns from them.
    """
    rows = np.arange(len(examples))
    folds = np.random.default_rng(recipe.seed).permutation(len(rows)) % recipe.exit_folds
    unseen = torch.zeros(len(rows), model.config.num_classes)
    with progress_bar() as bar:
        task = bar.add_task("step 0", total=recipe.exit_folds + 1, note="")
        for fold in range(recipe.exit_folds):
            head = _fit_head(model, tokens, examples, rows[folds != fold], recipe)
            held = rows[folds == fold]
            unseen[torch.from_numpy(held)] = exit_logits(head, tokens, held)
            bar.advance(task)
        model.exit_head = _fit_head(model, tokens, examples, rows, recipe)
        bar.advance(task)
    return unseen


def _fit_head(
    model: BudgetFormerForSequenceClassification,
    tokens: TokenizedTexts,
    examples: Examples,
    rows: np.ndarray,
    recipe: Recipe,
) -> ExitHead:
    torch.manual_seed(recipe.seed)
    head = ExitHead(model.config)
    torch.nn.init.zeros_(head.weight.weight)  # tokens never seen say nothing
    optimizer = torch.optim.AdamW(
        head.parameters(), recipe.exit_learning_rate, weight_decay=recipe.exit_weight_decay
    )
    labels = torch.from_numpy(examples.labels)
    random = np.random.default_rng(recipe.seed)
    total = recipe.exit_epochs * -(-len(rows) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / max(total, 1))
    for _ in range(recipe.exit_epochs):
        order = random.permutation(rows)
        for start in range(0, len(order), BATCH):
            batch = tokens.batch(order[start : start + BATCH])
            loss = model.loss(head(batch.input_ids, batch.attention_mask), labels[batch.rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    return head


@torch.no_grad()
def exit_logits(head: ExitHead, tokens: TokenizedTexts, rows: np.ndarray) -> Tensor:
    """Return step 0's logits [len(rows), C]."""
    parts = []
    for start in range(0, len(rows), BATCH):
        batch = tokens.batch(rows[start : start + BATCH])
        parts.append(head(batch.input_ids, batch.attention_mask))
    return torch.cat(parts)


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
    model: BudgetFormerForSequenceClassification,
    pooled: list[Tensor],
    target: Tensor,
    unseen_exit_logits: Tensor | None,
    seed: int,
) -> None:
    """Teach every f_o the probability that the cheapest step errs.

    Args:
        model: whose decisions are trained.
        pooled: what each decision reads, [N, D].
        target: 1 where the cheapest step's answer was wrong, [N].
        unseen_exit_logits: step 0's out-of-fold logits [N, C], if there is a step 0.
        seed: of order and initial weights.
    """
    evidence = (
        None
        if unseen_exit_logits is None
        else exit_evidence(unseen_exit_logits, model.config.problem_type)
    )
    decisions = [m for m in model.modules() if isinstance(m, BudgetDecision)]
    for decision, states in zip(decisions, pooled, strict=True):
        torch.manual_seed(seed)
        optimizer = torch.optim.AdamW(decision.controller.parameters(), 1e-3, weight_decay=0.01)
        for _ in range(CONTROLLER_EPOCHS):
            for rows in torch.randperm(len(states)).split(BATCH):
                s = decision.budget(states[rows], None if evidence is None else evidence[rows])
                loss = F.binary_cross_entropy(s, target[rows])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
