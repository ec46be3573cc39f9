"""What calibration promises, on answers whose truth is known."""

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


def made_up(count: int, seed: int, classes: int = 5) -> tuple[StepOutputs, torch.Tensor]:
    """Return answers of 8 steps, of which larger ones know more, to texts that are harder or not.

    f_o's s says how hard a text is.
    """
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=random)
    easy = torch.rand(count, generator=random)
    shared = torch.randn(count, classes, generator=random)
    logits = torch.zeros(9, count, classes)
    for step in range(9):
        own = torch.randn(count, classes, generator=random)
        logits[step] = 0.6 * shared + own
        know = 6 * easy + (0.5 + 0.6 * step**0.5)
        logits[step, torch.arange(count), labels] += know - 1
    return StepOutputs(logits, 1 - easy, np.full(count, 12)), labels


def network() -> BudgetFormerConfig:
    return small_config(
        embedding_exit=True, num_labels=5, num_attention_heads=8, intermediate_size=32
    )


@pytest.fixture(scope="module")
def held() -> tuple[StepOutputs, torch.Tensor]:
    return made_up(1500, 0)


@pytest.fixture(scope="module")
def found(held: tuple[StepOutputs, torch.Tensor]) -> CalibrationResult:
    return calibrate(network(), *held, LEVEL_COSTS)


@pytest.fixture(scope="module")
def agreed(held: tuple[StepOutputs, torch.Tensor]) -> CalibrationResult:
    return calibrate(network(), held[0], None, LEVEL_COSTS)


def policy_of(found: CalibrationResult) -> Policy:
    assert found.policy is not None
    return found.policy


class TestAccuracy:
    def test_its_chain_may_not_cost_more_than_the_full_step(self, found: CalibrationResult) -> None:
        policy = policy_of(found)
        assert policy.chain[0] == 0
        assert fits_in_full_pass(network(), policy.chain)

    def test_levels_keep_to_their_costs(self, found: CalibrationResult) -> None:
        levels = {level.name: level for level in policy_of(found).levels if level.name}
        assert list(levels) == ["fast", "balanced", "best"]
        for name, most in zip(("fast", "balanced"), LEVEL_COSTS, strict=True):
            assert levels[name].macs_share <= most

    def test_many_levels_without_a_name_lie_between(self, found: CalibrationResult) -> None:
        policy = policy_of(found)
        unnamed = [level for level in policy.levels if not level.name]
        assert 8 <= len(unnamed) <= calibration.UNNAMED_LEVELS
        assert len({level.threshold for level in unnamed}) == len(unnamed)
        numbers = np.linspace(-1, 10, 23)
        thresholds = [policy.level(float(number)).threshold for number in numbers]
        assert thresholds == sorted(thresholds, reverse=True)

    def test_figures_hold_on_other_texts(self, found: CalibrationResult) -> None:
        runs, labels = made_up(6000, 1)
        policy = policy_of(found)
        table = AnswerTable(network(), runs, found.fusion)
        right = table.right(labels)
        for level in policy.levels:
            answers = table.answer_on(
                Route(policy.chain, policy.entry, policy.exit_margin), level.threshold
            )
            accuracy = right[answers.step, table.rows].mean()
            # Twice the interval: what is measured has one, too, and a fold's rule is another.
            low, high = level.interval or (0.0, 1.0)
            assert abs(accuracy - (level.accuracy or 0)) <= high - low
            share = answers.macs.sum() / table.dense.sum()
            least, most = level.macs_interval or (0.0, 1.0)
            assert abs(share - level.macs_share) <= most - least

    def test_shares_of_steps_are_those_of_the_shipped_rule(self, found: CalibrationResult) -> None:
        policy = policy_of(found)
        for level in policy.levels:
            assert set(level.budgets) <= set(policy.chain)
            assert sum(level.budgets.values()) == pytest.approx(1)
            assert set(level.runs) <= set(policy.chain) - {0}
            for step, share in level.budgets.items():
                assert step == 0 or share <= level.runs[step] + 1e-9

    def test_cost_rises_with_the_level_for_every_text(self, found: CalibrationResult) -> None:
        runs, _ = made_up(2000, 2)
        policy = policy_of(found)
        table = AnswerTable(network(), runs, found.fusion)
        route = Route(policy.chain, policy.entry, policy.exit_margin)
        spent = [table.answer_on(route, level.threshold).macs for level in policy.levels]
        assert all((more >= less).all() for less, more in pairwise(spent))
        assert (spent[-1] <= table.macs[-1] + table.decision).all()

    def test_texts_that_a_fold_holds_do_not_choose_for_it(
        self, held: tuple[StepOutputs, torch.Tensor]
    ) -> None:
        """Labels have no relation to the answers: scored on itself, a rule would look better."""
        runs, labels = held
        noise = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(3))]
        chance = calibrate(network(), runs, noise, LEVEL_COSTS)
        for level in policy_of(chance).levels:
            assert level.interval is not None
            assert level.interval[0] <= 0.2 + 0.02

    def test_seconds_can_take_the_place_of_multiply_adds(
        self, held: tuple[StepOutputs, torch.Tensor]
    ) -> None:
        """Where every pass takes as long, small steps are of no use."""
        flat = StepCost(0.0, 0.0, 1e-3)
        table = CostTable("made:1", "cpu", "float32", (StepCost(0.0, 0.0, 1e-6), *[flat] * 8))
        policy = policy_of(calibrate(network(), *held, LEVEL_COSTS, table))
        assert len(policy.chain) == 2
        assert policy.chain[-1] >= 6


class TestAgreement:
    def test_no_label_is_needed_and_none_is_claimed(self, agreed: CalibrationResult) -> None:
        policy = policy_of(agreed)
        assert policy.measure == "agreement"
        for level in policy.levels:
            assert (level.accuracy, level.interval) == (None, None)
            assert level.points_lost == pytest.approx(100 - 100 * (level.agreement or 0))
        assert agreed.fixed[-1].agreement == 1.0
        assert agreed.fixed[0].accuracy is None

    def test_the_full_steps_weights_stay(self, agreed: CalibrationResult) -> None:
        config = network()
        assert agreed.fusion[-1] == (config.encoder_weights[-1], config.exit_weights[-1])

    def test_levels_agree_as_often_as_they_must_on_other_texts(
        self, agreed: CalibrationResult
    ) -> None:
        runs, _ = made_up(6000, 4)
        policy = policy_of(agreed)
        table = AnswerTable(network(), runs, agreed.fusion)
        agrees = table.agrees(table.logits[-1])
        for name, least in calibration.AGREEMENT.items():
            level = policy.level(name)
            answers = table.answer_on(
                Route(policy.chain, policy.entry, policy.exit_margin), level.threshold
            )
            assert agrees[answers.step, table.rows].mean() >= least - 0.01
            assert level.macs_share < 1
