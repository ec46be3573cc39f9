"""Calibration of quality levels, on synthetic answers with known labels."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from budgetformer.cost.macs import fits_in_full_pass
from budgetformer.cost.table import CostTable, StepCost
from budgetformer.inference.policy import Policy
from budgetformer.model.configuration import BudgetFormerConfig
from budgetformer.training import calibration
from budgetformer.training.calibration import AnswerTable, CalibrationResult, StepOutputs, calibrate
from budgetformer.training.chains import Route
from tests.support.networks import small_config

LEVEL_COSTS = (0.15, 0.4)


def synthetic_answers(count: int, seed: int, classes: int = 5) -> tuple[StepOutputs, torch.Tensor]:
    """Return answers and labels of easy and hard texts; larger steps are right more often.

    The s of f_o is the difficulty of the text.
    """
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=random)
    easy = torch.rand(count, generator=random)
    shared = torch.randn(count, classes, generator=random)
    logits = torch.zeros(9, count, classes)
    for step in range(9):
        noise = torch.randn(count, classes, generator=random)
        logits[step] = 0.6 * shared + noise
        signal = 6 * easy + (0.5 + 0.6 * step**0.5)
        logits[step, torch.arange(count), labels] += signal - 1
    return StepOutputs(logits, 1 - easy, np.full(count, 12)), labels


def with_a_nearly_agreeing_step(count: int, seed: int) -> StepOutputs:
    """Return answers of which step 6 gives 99 % of the texts the label of the full step."""
    runs, labels = synthetic_answers(count, seed)
    full = runs.logits[-1]
    full += 3 * torch.nn.functional.one_hot(labels, full.shape[-1])
    random = torch.Generator().manual_seed(seed)
    step = full + 0.3 * torch.randn(full.shape, generator=random)
    other = torch.rand(count, generator=random) < 0.01
    step[other] = full[other].roll(1, -1)
    runs.logits[6] = step
    return runs


def network() -> BudgetFormerConfig:
    return small_config(
        embedding_exit=True, num_labels=5, num_attention_heads=8, intermediate_size=32
    )


@pytest.fixture(scope="module")
def held() -> tuple[StepOutputs, torch.Tensor]:
    return synthetic_answers(1500, 0)


@pytest.fixture(scope="module")
def calibrated(held: tuple[StepOutputs, torch.Tensor]) -> CalibrationResult:
    return calibrate(network(), *held, LEVEL_COSTS)


@pytest.fixture(scope="module")
def calibrated_by_agreement(held: tuple[StepOutputs, torch.Tensor]) -> CalibrationResult:
    return calibrate(network(), held[0], None, LEVEL_COSTS)


def policy_of(result: CalibrationResult) -> Policy:
    assert result.policy is not None
    return result.policy


class TestAccuracy:
    def test_the_chain_fits_in_a_full_pass(self, calibrated: CalibrationResult) -> None:
        policy = policy_of(calibrated)
        assert policy.chain[0] == 0
        assert fits_in_full_pass(network(), policy.chain)

    def test_levels_respect_their_cost_limits(self, calibrated: CalibrationResult) -> None:
        levels = {level.name: level for level in policy_of(calibrated).levels if level.name}
        assert list(levels) == ["fast", "balanced", "best"]
        for name, limit in zip(("fast", "balanced"), LEVEL_COSTS, strict=True):
            assert levels[name].macs_share <= limit

    def test_unnamed_levels_make_quality_nearly_continuous(
        self, calibrated: CalibrationResult
    ) -> None:
        policy = policy_of(calibrated)
        unnamed = [level for level in policy.levels if not level.name]
        assert 8 <= len(unnamed) <= calibration.UNNAMED_LEVELS
        assert len({level.threshold for level in unnamed}) == len(unnamed)
        numbers = np.linspace(-1, 10, 23)
        thresholds = [policy.level(float(number)).threshold for number in numbers]
        assert thresholds == sorted(thresholds, reverse=True)

    def test_stated_accuracy_and_cost_hold_on_other_texts(
        self, calibrated: CalibrationResult
    ) -> None:
        runs, labels = synthetic_answers(6000, 1)
        policy = policy_of(calibrated)
        table = AnswerTable(network(), runs, calibrated.fusion)
        right = table.right(labels)
        for level in policy.levels:
            answers = table.answer_on(
                Route(policy.chain, policy.entry, policy.exit_margin), level.threshold
            )
            accuracy = right[answers.step, table.rows].mean()
            # Twice the interval, because this measurement has one too, and other folds other rules.
            low, high = level.interval or (0.0, 1.0)
            assert abs(accuracy - (level.accuracy or 0)) <= high - low
            share = answers.macs.sum() / table.dense.sum()
            low, high = level.macs_interval or (0.0, 1.0)
            assert abs(share - level.macs_share) <= high - low

    def test_stated_shares_of_steps_are_consistent_with_the_chain(
        self, calibrated: CalibrationResult
    ) -> None:
        policy = policy_of(calibrated)
        for level in policy.levels:
            assert set(level.budgets) <= set(policy.chain)
            assert sum(level.budgets.values()) == pytest.approx(1)
            assert set(level.runs) <= set(policy.chain) - {0}
            for step, share in level.budgets.items():
                assert step == 0 or share <= level.runs[step] + 1e-9

    def test_no_text_costs_less_at_a_higher_level(self, calibrated: CalibrationResult) -> None:
        runs, _ = synthetic_answers(2000, 2)
        policy = policy_of(calibrated)
        table = AnswerTable(network(), runs, calibrated.fusion)
        route = Route(policy.chain, policy.entry, policy.exit_margin)
        spent = [table.answer_on(route, level.threshold).macs for level in policy.levels]
        assert all((more >= less).all() for less, more in pairwise(spent))
        assert (spent[-1] <= table.macs[-1] + table.decision).all()

    def test_levels_are_scored_on_texts_that_did_not_choose_them(
        self, held: tuple[StepOutputs, torch.Tensor]
    ) -> None:
        """With random labels, a rule scored on its own texts would look better than chance."""
        runs, labels = held
        noise = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(3))]
        chance = calibrate(network(), runs, noise, LEVEL_COSTS)
        for level in policy_of(chance).levels:
            assert level.interval is not None
            assert level.interval[0] <= 0.2 + 0.02

    def test_costs_can_be_seconds_instead_of_multiply_adds(
        self, held: tuple[StepOutputs, torch.Tensor]
    ) -> None:
        """If all passes take the same time, small steps have no advantage."""
        flat = StepCost(0.0, 0.0, 1e-3)
        table = CostTable("made:1", "cpu", "float32", (StepCost(0.0, 0.0, 1e-6), *[flat] * 8))
        policy = policy_of(calibrate(network(), *held, LEVEL_COSTS, table))
        assert len(policy.chain) == 2
        assert policy.chain[-1] >= 6


class TestAgreement:
    def test_without_labels_no_accuracy_is_stated(
        self, calibrated_by_agreement: CalibrationResult
    ) -> None:
        policy = policy_of(calibrated_by_agreement)
        assert policy.measure == "agreement"
        for level in policy.levels:
            assert (level.accuracy, level.interval) == (None, None)
            assert level.points_lost == pytest.approx(100 - 100 * (level.agreement or 0))
        assert calibrated_by_agreement.fixed[-1].agreement == 1.0
        assert calibrated_by_agreement.fixed[0].accuracy is None

    def test_the_weights_of_the_full_step_are_kept(
        self, calibrated_by_agreement: CalibrationResult
    ) -> None:
        config = network()
        assert calibrated_by_agreement.fusion[-1] == (
            config.encoder_weights[-1],
            config.exit_weights[-1],
        )

    def test_levels_reach_their_agreement_on_other_texts(
        self, calibrated_by_agreement: CalibrationResult
    ) -> None:
        runs, _ = synthetic_answers(6000, 4)
        policy = policy_of(calibrated_by_agreement)
        table = AnswerTable(network(), runs, calibrated_by_agreement.fusion)
        agrees = table.agrees(table.logits[-1])
        for name, target in calibration.AGREEMENT.items():
            level = policy.level(name)
            answers = table.answer_on(
                Route(policy.chain, policy.entry, policy.exit_margin), level.threshold
            )
            assert agrees[answers.step, table.rows].mean() >= target - 0.01
            assert level.macs_share < 1

    @pytest.mark.parametrize(
        ("count", "seed"),
        [
            pytest.param(300, 6, id="the last step of the cheapest chain misses it"),
            pytest.param(300, 4, id="thresholds that suffice on seen texts miss it"),
        ],
    )
    def test_an_agreement_reached_only_on_seen_texts_is_not_enough(
        self, count: int, seed: int
    ) -> None:
        runs = with_a_nearly_agreeing_step(count, seed)
        level = policy_of(calibrate(network(), runs, None, LEVEL_COSTS)).level("balanced")
        assert level.agreement is not None
        assert level.agreement >= calibration.AGREEMENT["balanced"]
        assert level.macs_share < 1

    def test_steps_with_the_same_heads_end_no_chain_of_their_own(self) -> None:
        config = network()
        config.ladder = [*config.ladder[:-2], config.ladder[-1], config.ladder[-1]]
        runs = with_a_nearly_agreeing_step(300, 6)
        assert policy_of(calibrate(config, runs, None, LEVEL_COSTS)).chain[-1] != 8
