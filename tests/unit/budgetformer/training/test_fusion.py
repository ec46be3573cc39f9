"""Fusion weights: how the logits of encoder and step 0 are combined at each step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from budgetformer.model.architecture import MULTI_LABEL
from budgetformer.training.fusion import fit_fusion
from tests.support.networks import PROPERTY

TEXTS, CLASSES = 400, 3


def normal_and_labels(seed: int) -> tuple[Callable[..., Tensor], Tensor]:
    """Return a function that draws normal numbers, and labels [N]."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (TEXTS,), generator=random)
    return lambda *shape: torch.randn(*shape, generator=random), labels


def noisy_logits(seed: int) -> tuple[Tensor, Tensor]:
    """Return logits [3, N, C] of step 0 and two steps with independent noise, and the labels."""
    normal, labels = normal_and_labels(seed)
    truth = F.one_hot(labels, CLASSES).float()
    return 3 * (truth + normal(3, TEXTS, CLASSES)), labels


def loss(
    logits: Tensor, labels: Tensor, encoder_weight: float, exit_weight: float, step: int = 1
) -> float:
    return F.cross_entropy(encoder_weight * logits[step] + exit_weight * logits[0], labels).item()


@PROPERTY
@given(st.integers(0, 10_000))
def test_no_other_weights_fit_better(seed: int) -> None:
    logits, labels = noisy_logits(seed)
    for step, (encoder_weight, exit_weight) in enumerate(
        fit_fusion(logits, labels, None, True), start=1
    ):
        fitted = loss(logits, labels, encoder_weight, exit_weight, step)
        for other in (
            (1, 0),
            (0, 1),
            (encoder_weight + 0.2, exit_weight),
            (encoder_weight, exit_weight + 0.2),
            (encoder_weight, 0),
            (0, exit_weight),
        ):
            assert fitted < loss(logits, labels, *other, step) + 2 / TEXTS


def test_the_fused_confidence_equals_the_accuracy() -> None:
    logits, labels = noisy_logits(0)
    ((encoder_weight, exit_weight),) = fit_fusion(5 * logits[:2], labels, None, True)
    p = (encoder_weight * 5 * logits[1] + exit_weight * 5 * logits[0]).softmax(-1)
    right = (p.argmax(-1) == labels).float().mean()
    assert float(p.amax(-1).mean()) == pytest.approx(float(right), abs=0.03)


def test_wrong_logits_get_no_weight() -> None:
    normal, labels = normal_and_labels(1)
    truth = F.one_hot(labels, CLASSES)
    good, bad = truth + normal(TEXTS, CLASSES), -truth + normal(TEXTS, CLASSES)
    ((encoder_weight, exit_weight),) = fit_fusion(torch.stack([bad, good]), labels, None, True)
    assert encoder_weight > 0
    assert exit_weight == 0
    ((encoder_weight, exit_weight),) = fit_fusion(torch.stack([good, bad]), labels, None, True)
    assert encoder_weight == 0
    assert exit_weight > 0


def test_without_step_0_only_the_scale_is_fitted() -> None:
    logits, labels = noisy_logits(2)
    without_step_0 = torch.stack([torch.zeros_like(logits[0]), 4 * logits[1]])
    ((encoder_weight, exit_weight),) = fit_fusion(without_step_0, labels, None, False)
    assert exit_weight == 0
    assert 0 < encoder_weight < 1


def test_weights_stay_bounded_for_a_few_separable_texts() -> None:
    labels = torch.tensor([0, 1])
    logits = 9 * F.one_hot(labels, 2).float().expand(2, 2, 2)
    ((encoder_weight, exit_weight),) = fit_fusion(logits, labels, None, True)
    assert 0.5 < encoder_weight + exit_weight < 2


def test_multi_label_answers_are_fitted_label_by_label() -> None:
    normal, _ = normal_and_labels(3)
    targets = (normal(TEXTS, CLASSES) > 0).long()
    logits = (2 * targets - 1 + normal(2, TEXTS, CLASSES)).float()
    ((encoder_weight, exit_weight),) = fit_fusion(logits, targets, MULTI_LABEL, True)

    def error(encoder_weight: float, exit_weight: float) -> float:
        fused = encoder_weight * logits[1] + exit_weight * logits[0]
        return F.binary_cross_entropy_with_logits(fused, targets.float()).item()

    assert error(encoder_weight, exit_weight) < min(error(1, 0), error(0, 1), error(1, 1))
