"""Training of f_o: it predicts the share of the ladder that a text needs."""

from __future__ import annotations

import torch

from budgetformer.model.architecture import EVIDENCE_FEATURES
from budgetformer.model.modeling import BudgetFormerForSequenceClassification
from budgetformer.training.exits import fit_controller
from tests.support.networks import random_network, small_config

STEPS, TEXTS = 4, 400


def network() -> BudgetFormerForSequenceClassification:
    return random_network(small_config(embedding_exit=True, exit_tfidf=True))


def inputs_and_needs(noise: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the inputs of f_o, the step that each text needs, and confidences at each step."""
    random = torch.Generator().manual_seed(0)
    read = torch.rand(TEXTS, EVIDENCE_FEATURES, generator=random) * 10
    hard = (10 - read[:, 0]) / 10 + noise * torch.randn(TEXTS, generator=random)
    needs = (hard * STEPS).ceil().clamp(1, STEPS).long()
    ladder = torch.arange(STEPS + 1)[:, None]
    return read, needs, torch.where(ladder >= needs, 0.99, 0.4)


def test_s_predicts_the_share_of_the_ladder_that_a_text_needs() -> None:
    read, needs, confident = inputs_and_needs()
    model = network()
    fit_controller(model, read, confident, seed=0)
    with torch.no_grad():
        s = model.encoder.decision.controller(read)
    assert (s - needs / STEPS).abs().mean() < 0.1
    assert (s * STEPS - needs).abs().max() < 1.5


def test_a_text_that_no_step_makes_confident_needs_the_whole_ladder() -> None:
    read, _, _ = inputs_and_needs()
    model = network()
    s = fit_controller(model, read, torch.full((STEPS + 1, TEXTS), 0.3), seed=0)
    assert s.min() > 0.9


def test_out_of_fold_shares_do_not_depend_on_their_own_text() -> None:
    """If the needs are random, s must not correlate with them."""
    read, needs, confident = inputs_and_needs()
    shuffled = torch.randperm(TEXTS, generator=torch.Generator().manual_seed(1))
    s = fit_controller(network(), read, confident[:, shuffled], seed=0)
    correlation = torch.corrcoef(torch.stack([s, needs[shuffled] / STEPS]))[0, 1]
    assert abs(correlation.item()) < 0.15


def test_training_is_repeatable() -> None:
    read, _, confident = inputs_and_needs(noise=0.2)
    first, second = (fit_controller(network(), read, confident, seed=3) for _ in range(2))
    assert torch.equal(first, second)
