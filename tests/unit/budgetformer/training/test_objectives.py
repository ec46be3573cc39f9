"""Losses of the training: distillation, random steps, budget penalty and relevance entropy."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from budgetformer.model.architecture import MULTI_LABEL
from budgetformer.training.objectives import (
    budget_penalty,
    distillation_loss,
    random_steps,
    relevance_entropy,
)
from tests.support.networks import PROPERTY

SINGLE = "single_label_classification"
LOGITS = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.3, 3.0]])
TEACHER = torch.tensor([[2.0, -1.0, 0.0], [0.5, 0.5, 0.5]])


def mean_distillation(
    logits: Tensor, teacher: Tensor, temperature: float, problem_type: str | None
) -> Tensor:
    losses = distillation_loss(logits, teacher, temperature, problem_type)
    assert losses.shape == logits.shape[:1]
    return losses.mean()


class TestDistillation:
    @pytest.mark.parametrize("problem_type", [SINGLE, MULTI_LABEL, None])
    @pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 10.0])
    def test_is_minimal_at_the_teachers_answers(
        self, problem_type: str | None, temperature: float
    ) -> None:
        student = TEACHER.clone().requires_grad_()
        mean_distillation(student, TEACHER, temperature, problem_type).backward()
        assert student.grad is not None
        assert student.grad.abs().max().item() < 1e-6
        minimum = mean_distillation(TEACHER, TEACHER, temperature, problem_type)
        assert mean_distillation(LOGITS, TEACHER, temperature, problem_type) > minimum

    @pytest.mark.parametrize("temperature", [1.0, 2.0])
    def test_single_label_is_the_kl_divergence(self, temperature: float) -> None:
        p, q = (TEACHER / temperature).softmax(-1), (LOGITS / temperature).softmax(-1)
        expected = (p * (p / q).log()).sum(-1).mean() * temperature**2
        actual = mean_distillation(LOGITS, TEACHER, temperature, SINGLE)
        torch.testing.assert_close(actual, expected)

    def test_is_zero_if_the_probabilities_are_equal(self) -> None:
        loss = mean_distillation(TEACHER + 3.0, TEACHER, 2.0, SINGLE)
        assert loss.item() == pytest.approx(0.0, abs=1e-6)

    def test_multi_label_is_the_mean_cross_entropy_of_labels(self) -> None:
        p, q = TEACHER.sigmoid(), LOGITS.sigmoid()
        expected = -(p * q.log() + (1 - p) * (1 - q).log()).mean()
        torch.testing.assert_close(mean_distillation(LOGITS, TEACHER, 1.0, MULTI_LABEL), expected)

    @pytest.mark.parametrize("problem_type", [SINGLE, MULTI_LABEL])
    def test_gradient_size_does_not_depend_on_the_temperature(self, problem_type: str) -> None:
        sizes = []
        for temperature in (4.0, 8.0, 16.0):
            student = LOGITS.clone().requires_grad_()
            mean_distillation(student, TEACHER, temperature, problem_type).backward()
            assert student.grad is not None
            sizes.append(student.grad.norm().item())
        assert max(sizes) < 1.3 * min(sizes)

    @pytest.mark.parametrize("problem_type", [SINGLE, MULTI_LABEL])
    def test_stays_finite(self, problem_type: str) -> None:
        loss = mean_distillation(LOGITS * 1e3, -TEACHER * 1e3, 1.0, problem_type)
        assert loss.isfinite()


class TestRandomSteps:
    @PROPERTY
    @given(st.integers(0, 50), st.integers(1, 12), st.floats(0.2, 5), st.integers(0, 1000))
    def test_stay_on_the_ladder(self, count: int, num_steps: int, bias: float, seed: int) -> None:
        torch.manual_seed(seed)
        steps = random_steps(count, num_steps, bias)
        assert steps.shape == (count,)
        assert steps.dtype == torch.long
        assert ((steps >= 1) & (steps <= num_steps)).all()

    def test_without_bias_all_steps_are_equally_likely(self) -> None:
        torch.manual_seed(0)
        shares = torch.bincount(random_steps(40_000, 4, 1.0))[1:] / 40_000
        torch.testing.assert_close(shares, torch.full((4,), 0.25), rtol=0, atol=0.02)

    @pytest.mark.parametrize("bias", [2.0, 3.0])
    def test_bias_makes_small_steps_rarer(self, bias: float) -> None:
        torch.manual_seed(0)
        shares = torch.bincount(random_steps(40_000, 4, bias))[1:] / 40_000
        expected = [(k / 4) ** (1 / bias) - ((k - 1) / 4) ** (1 / bias) for k in range(1, 5)]
        torch.testing.assert_close(shares, torch.tensor(expected), rtol=0, atol=0.02)

    def test_full_share_adds_full_steps(self) -> None:
        torch.manual_seed(0)
        shares = torch.bincount(random_steps(40_000, 4, 1.0, full_share=0.4))[1:] / 40_000
        expected = torch.tensor([0.15, 0.15, 0.15, 0.55])
        torch.testing.assert_close(shares, expected, rtol=0, atol=0.02)

    def test_depend_on_the_seed(self) -> None:
        drawn = []
        for _ in range(2):
            torch.manual_seed(3)
            drawn.append(random_steps(20, 8, 2.0))
        assert torch.equal(*drawn)


class TestBudgetPenalty:
    @pytest.mark.parametrize(
        ("budgets", "expected"),
        [
            ([0.1, 0.5, 0.9], 0.0),
            ([0.05], 0.05),
            ([0.95], 0.05),
            ([0.0, 1.0], 0.1),
            ([0.0, 0.5], 0.05),
        ],
    )
    def test_is_the_mean_distance_from_the_bounds(
        self, budgets: list[float], expected: float
    ) -> None:
        penalty = budget_penalty(torch.tensor(budgets), (0.1, 0.9))
        assert penalty.item() == pytest.approx(expected, abs=1e-6)

    def test_gradient_points_back_into_the_bounds(self) -> None:
        budgets = torch.tensor([0.02, 0.5, 0.98], requires_grad=True)
        budget_penalty(budgets, (0.1, 0.9)).backward()
        assert budgets.grad is not None
        assert budgets.grad.sign().tolist() == [-1, 0, 1]


class TestRelevanceEntropy:
    @pytest.mark.parametrize("heads", [1, 2, 8])
    def test_of_equal_relevance_is_the_log_of_the_heads(self, heads: int) -> None:
        entropy = relevance_entropy(torch.full((2, 3, heads), 1 / heads))
        assert entropy.item() == pytest.approx(math.log(heads), abs=1e-6)

    def test_of_one_relevant_head_is_zero(self) -> None:
        assert relevance_entropy(torch.tensor([[0.0, 1.0, 0.0]])).item() == 0.0

    def test_is_the_mean_over_inputs(self) -> None:
        both = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
        assert relevance_entropy(both).item() == pytest.approx(math.log(2) / 2)
