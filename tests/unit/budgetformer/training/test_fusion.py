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


def drawn(seed: int) -> tuple[Callable[..., Tensor], Tensor]:
    """Return what draws normal numbers, and labels [N]."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (TEXTS,), generator=random)
    return lambda *shape: torch.randn(*shape, generator=random), labels


def noisy_logits(seed: int) -> tuple[Tensor, Tensor]:
    """Return logits [3, N, C] of step 0 and two steps with independent noise, and the labels."""
    normal, labels = drawn(seed)
    truth = F.one_hot(labels, CLASSES).float()
    return 3 * (truth + normal(3, TEXTS, CLASSES)), labels


def loss(logits: Tensor, labels: Tensor, own: float, share: float, step: int = 1) -> float:
    return F.cross_entropy(own * logits[step] + share * logits[0], labels).item()


@PROPERTY
@given(st.integers(0, 10_000))
def test_no_other_weights_fit_better(seed: int) -> None:
    logits, labels = noisy_logits(seed)
    for step, (own, share) in enumerate(fit_fusion(logits, labels, None, True), start=1):
        least = loss(logits, labels, own, share, step)
        for other in ((1, 0), (0, 1), (own + 0.2, share), (own, share + 0.2), (own, 0), (0, share)):
            assert least < loss(logits, labels, *other, step) + 2 / TEXTS


def test_its_confidence_is_as_high_as_its_accuracy() -> None:
    logits, labels = noisy_logits(0)
    ((own, share),) = fit_fusion(5 * logits[:2], labels, None, True)
    p = (own * 5 * logits[1] + share * 5 * logits[0]).softmax(-1)
    right = (p.argmax(-1) == labels).float().mean()
    assert float(p.amax(-1).mean()) == pytest.approx(float(right), abs=0.03)


def test_logits_that_point_away_from_the_labels_get_no_weight() -> None:
    normal, labels = drawn(1)
    truth = F.one_hot(labels, CLASSES)
    good, bad = truth + normal(TEXTS, CLASSES), -truth + normal(TEXTS, CLASSES)
    ((own, share),) = fit_fusion(torch.stack([bad, good]), labels, None, True)
    assert own > 0
    assert share == 0
    ((own, share),) = fit_fusion(torch.stack([good, bad]), labels, None, True)
    assert own == 0
    assert share > 0


def test_without_step_0_only_the_scale_is_fitted() -> None:
    logits, labels = noisy_logits(2)
    silent = torch.stack([torch.zeros_like(logits[0]), 4 * logits[1]])
    ((own, share),) = fit_fusion(silent, labels, None, False)
    assert share == 0
    assert 0 < own < 1


def test_a_handful_of_separable_texts_cannot_carry_the_weights_away() -> None:
    labels = torch.tensor([0, 1])
    logits = 9 * F.one_hot(labels, 2).float().expand(2, 2, 2)
    ((own, share),) = fit_fusion(logits, labels, None, True)
    assert 0.5 < own + share < 2


def test_multi_label_answers_are_fitted_label_by_label() -> None:
    normal, _ = drawn(3)
    targets = (normal(TEXTS, CLASSES) > 0).long()
    logits = (2 * targets - 1 + normal(2, TEXTS, CLASSES)).float()
    ((own, share),) = fit_fusion(logits, targets, MULTI_LABEL, True)

    def error(own: float, share: float) -> float:
        fused = own * logits[1] + share * logits[0]
        return F.binary_cross_entropy_with_logits(fused, targets.float()).item()

    assert error(own, share) < min(error(1, 0), error(0, 1), error(1, 1))
