"""The reference network: budgets, gates, step 0, loss, saving and loading."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification

import budgetformer
from budgetformer.model.answers import confidence, probabilities
from budgetformer.model.architecture import MULTI_LABEL
from budgetformer.model.budget import (
    BudgetController,
    BudgetDecision,
    Gating,
    budget_step,
    keep_top,
)
from budgetformer.model.configuration import BudgetFormerConfig
from budgetformer.model.embeddings import masked_mean
from budgetformer.model.layer import PrefixWeights
from budgetformer.model.modeling import BudgetFormerForSequenceClassification, BudgetFormerModel
from budgetformer.model.step0 import exit_evidence
from tests.support.networks import (
    POSITIONS,
    PROPERTY,
    Item,
    assert_close,
    batches,
    networks,
    pad,
    random_items,
    random_network,
    small_config,
)

SINGLE = "single_label_classification"


class TestBudgetRule:
    @pytest.mark.parametrize(
        ("s", "heads", "kept"),
        [
            (0.0001, 8, 1),
            (0.125, 8, 1),
            (0.126, 8, 2),
            (0.5, 8, 4),
            (0.51, 8, 5),
            (0.875, 8, 7),
            (0.9999, 8, 8),
            (0.5, 1, 1),
            (0.34, 3, 2),
        ],
    )
    def test_keeps_ceil_of_s_times_heads(self, s: float, heads: int, kept: int) -> None:
        assert budget_step(torch.tensor([s]), heads).tolist() == [kept]

    @pytest.mark.parametrize(("s", "step"), [(0.0, 1), (1.0, 4)])
    def test_the_step_is_never_below_1_or_above_the_ladder(self, s: float, step: int) -> None:
        assert budget_step(torch.tensor([s]), 4).item() == step

    @pytest.mark.parametrize("scope", ["input", "layer"])
    def test_the_network_computes_the_heads_of_its_budget(self, scope: str) -> None:
        network = random_network(small_config(budget_scope=scope))
        with torch.no_grad():
            output = network(**pad(random_items([5, 9, 2])))
        kept = budget_step(output.budget, 4).float()
        assert torch.equal(output.gates.sum(-1), kept.expand(3, 3))

    def test_the_ladder_defines_the_heads_of_each_step(self) -> None:
        ladder = [[0, 1, 0], [1, 1, 2], [4, 2, 3]]
        network = random_network(small_config(ladder=ladder))
        with torch.no_grad():
            output = network(**pad(random_items([5, 5, 5])), steps=torch.tensor([3, 1, 2]))
        assert output.gates.sum(-1).tolist() == [ladder[2], ladder[0], ladder[1]]


class TestKeepTop:
    @pytest.mark.parametrize(
        ("heads", "expected"),
        [
            (0, [0, 0, 0, 0]),
            (1, [0, 1, 0, 0]),
            (2, [0, 1, 0, 1]),
            (3, [1, 1, 0, 1]),
            (4, [1, 1, 1, 1]),
        ],
    )
    def test_keeps_the_highest_scores(self, heads: int, expected: list[int]) -> None:
        scores = torch.tensor([0.5, 3.0, -1.0, 2.0])
        assert keep_top(scores, torch.tensor(heads)).tolist() == expected

    @pytest.mark.parametrize(
        ("scores", "heads", "expected"),
        [
            ([1.0, 1.0, 1.0, 1.0], 2, [1, 1, 0, 0]),
            ([0.0, 1.0, 1.0, 1.0], 2, [0, 1, 1, 0]),
            ([2.0, 1.0, 2.0, 2.0], 1, [1, 0, 0, 0]),
            ([0.0, 0.0, 1.0, 0.0], 2, [1, 0, 1, 0]),
        ],
    )
    def test_ties_go_to_the_lower_index(
        self, scores: list[float], heads: int, expected: list[int]
    ) -> None:
        assert keep_top(torch.tensor(scores), torch.tensor(heads)).tolist() == expected

    def test_each_row_has_its_own_number_of_heads(self) -> None:
        scores = torch.tensor([[[1.0, 2.0], [2.0, 1.0]], [[1.0, 2.0], [2.0, 1.0]]])
        kept = keep_top(scores, torch.tensor([[1, 1], [0, 2]]))
        assert kept.tolist() == [[[0, 1], [1, 0]], [[0, 0], [1, 1]]]

    @PROPERTY
    @given(st.lists(st.integers(-3, 3), min_size=1, max_size=8), st.data())
    def test_no_dropped_score_beats_a_kept_one(
        self, values: list[int], data: st.DataObject
    ) -> None:
        heads = data.draw(st.integers(0, len(values)))
        gates = keep_top(torch.tensor(values, dtype=torch.float), torch.tensor(heads)).tolist()
        kept = [v for v, gate in zip(values, gates, strict=True) if gate]
        dropped = [v for v, gate in zip(values, gates, strict=True) if not gate]
        assert len(kept) == heads
        if kept and dropped:
            assert min(kept) >= max(dropped)


class TestMaskedMean:
    def test_ignores_padding(self) -> None:
        states = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [99.0, 99.0]]])
        assert masked_mean(states, torch.tensor([[1, 1, 0]])).tolist() == [[2.0, 3.0]]

    def test_without_tokens_is_zero(self) -> None:
        assert masked_mean(torch.ones(1, 3, 2), torch.zeros(1, 3)).tolist() == [[0.0, 0.0]]


class TestConfidence:
    def test_single_label_probabilities_sum_to_one(self) -> None:
        p = probabilities(torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]), SINGLE)
        torch.testing.assert_close(p.sum(-1), torch.ones(2))

    def test_no_problem_type_means_single_label(self) -> None:
        logits = torch.tensor([[1.0, 2.0, 3.0]])
        assert torch.equal(probabilities(logits, None), probabilities(logits, SINGLE))

    def test_multi_label_probabilities_are_independent(self) -> None:
        p = probabilities(torch.tensor([0.0, 100.0, -100.0]), MULTI_LABEL)
        torch.testing.assert_close(p, torch.tensor([0.5, 1.0, 0.0]))

    def test_single_label_is_the_largest_probability(self) -> None:
        logits = torch.tensor([0.1, 0.7, 0.2]).log()
        torch.testing.assert_close(confidence(logits, SINGLE), torch.tensor(0.7))

    @pytest.mark.parametrize(
        ("ps", "expected"),
        [([0.9, 0.2], 0.8), ([0.5, 0.99], 0.5), ([0.05, 0.95], 0.95), ([0.6], 0.6)],
    )
    def test_multi_label_is_the_least_decided_label(self, ps: list[float], expected: float) -> None:
        logits = torch.logit(torch.tensor(ps))
        torch.testing.assert_close(confidence(logits, MULTI_LABEL), torch.tensor(expected))

    @pytest.mark.parametrize("problem_type", [SINGLE, MULTI_LABEL])
    def test_has_one_value_per_item(self, problem_type: str) -> None:
        confident = confidence(torch.randn(5, 3), problem_type)
        assert confident.shape == (5,)
        assert ((confident > 0) & (confident < 1)).all()


class TestExitEvidence:
    def test_single_label_log_odds_and_entropy(self) -> None:
        p = torch.tensor([[0.5, 0.25, 0.25]])
        log_odds, entropy = exit_evidence(p.log(), SINGLE)[0]
        assert log_odds.item() == pytest.approx(0.0, abs=1e-6)
        assert entropy.item() == pytest.approx(-(p * p.log()).sum().item(), rel=1e-5)

    def test_multi_label_entropy_is_a_mean_over_labels(self) -> None:
        p = torch.tensor([0.5, 0.8])
        log_odds, entropy = exit_evidence(torch.logit(p)[None], MULTI_LABEL)[0]
        entropies = -(p * p.log() + (1 - p) * (1 - p).log())
        assert log_odds.item() == pytest.approx(0.0, abs=1e-6)
        assert entropy.item() == pytest.approx(entropies.mean().item(), rel=1e-5)

    @pytest.mark.parametrize("problem_type", [SINGLE, MULTI_LABEL])
    @pytest.mark.parametrize("size", [0.0, 30.0, 1e4])
    def test_stays_finite(self, problem_type: str, size: float) -> None:
        evidence = exit_evidence(torch.tensor([[size, -size, 0.0]]), problem_type)
        assert evidence.shape == (1, 2)
        assert evidence.isfinite().all()

    def test_confident_answers_have_higher_odds_and_lower_entropy(self) -> None:
        uncertain, confident = exit_evidence(torch.tensor([[1.0, 0.0], [4.0, 0.0]]), SINGLE)
        assert confident[0] > uncertain[0]
        assert confident[1] < uncertain[1]


def decision(**changes: Any) -> BudgetDecision:
    """Return the decision of a random network with scope "input", ready to train."""
    network = random_network(small_config(**changes)).train()
    assert network.encoder.decision is not None
    return network.encoder.decision


POOLED = torch.randn(6, 16, generator=torch.Generator().manual_seed(3))
STEPS = torch.tensor([1, 2, 3, 4, 1, 2])


class TestGating:
    @pytest.mark.parametrize("selection", ["input", "ranked"])
    def test_hard_training_gates_are_the_evaluation_gates(self, selection: str) -> None:
        gate = decision(head_selection=selection)
        trained = gate(POOLED, STEPS).gates
        evaluated = gate.eval()(POOLED, STEPS).gates
        torch.testing.assert_close(trained, evaluated, rtol=0, atol=1e-6)
        assert torch.equal(trained != 0, evaluated != 0)
        assert set(evaluated.unique().tolist()) == {0.0, 1.0}

    def test_gradient_reaches_the_scores_of_every_head(self) -> None:
        gate = decision(head_selection="input")
        gates = gate(POOLED, torch.ones(6, dtype=torch.long)).gates
        (gates * torch.randn(gates.shape)).sum().backward()
        assert gate.scorer is not None
        assert (gate.scorer.out.bias.grad != 0).all()
        assert (gate.scorer.out.weight.grad != 0).all()

    @pytest.mark.parametrize("mode", ["hard", "soft"])
    @pytest.mark.parametrize("selection", ["input", "ranked"])
    def test_gradient_reaches_the_budget(self, mode: str, selection: str) -> None:
        gate = decision(head_selection=selection)
        gate.gating = Gating(mode=mode)  # type: ignore[arg-type]
        gate(POOLED).gates.square().sum().backward()
        assert gate.controller.out.bias.grad.abs().item() > 0

    @pytest.mark.parametrize("selection", ["input", "ranked"])
    def test_soft_training_keeps_all_heads(self, selection: str) -> None:
        gate = decision(head_selection=selection)
        gate.gating = Gating(mode="soft")
        assert (gate(POOLED).gates > 0).all()

    def test_soft_gates_share_the_budget_by_relevance(self) -> None:
        gate = decision(head_selection="input")
        gate.gating = Gating(mode="soft")
        decided = gate(POOLED)
        expected = (decided.budget * 4)[:, None].expand(6, 3)
        torch.testing.assert_close(decided.relevance.sum(-1), torch.ones(6, 3))
        torch.testing.assert_close(decided.gates.sum(-1), expected)

    def test_soft_ranked_gates_fall_with_the_rank(self) -> None:
        gate = decision()
        gate.gating = Gating(mode="soft")
        gates = gate(POOLED).gates
        assert (gates[..., 1:] < gates[..., :-1]).all()

    def test_gates_are_hard_in_evaluation_in_soft_mode(self) -> None:
        gate = decision(head_selection="input")
        gate.gating = Gating(mode="soft")
        gates = gate.eval()(POOLED, STEPS).gates
        assert torch.equal(gates.sum(-1), STEPS[:, None].expand(6, 3).float())

    @pytest.mark.parametrize("temperature", [0.25, 1.0, 8.0])
    def test_temperature_divides_the_scores(self, temperature: float) -> None:
        gate = decision(head_selection="input").eval()
        assert gate.scorer is not None
        gate.gating = Gating(temperature=temperature)
        expected = (gate.scorer(POOLED) / temperature).softmax(-1)
        torch.testing.assert_close(gate(POOLED).relevance, expected)

    def test_noise_changes_the_heads_but_not_the_budget_in_training(self) -> None:
        gate = decision(head_selection="input")
        gate.gating = Gating(noise=2.0)
        torch.manual_seed(0)
        first, second = gate(POOLED, STEPS), gate(POOLED, STEPS)
        assert not torch.equal(first.relevance, second.relevance)
        assert not torch.equal(first.gates.round(), second.gates.round())
        assert torch.equal(first.budget, second.budget)

    def test_noise_has_no_effect_in_evaluation(self) -> None:
        gate = decision(head_selection="input").eval()
        without_noise = gate(POOLED)
        gate.gating = Gating(noise=2.0)
        assert torch.equal(gate(POOLED).relevance, without_noise.relevance)

    def test_training_without_noise_is_repeatable(self) -> None:
        gate = decision(head_selection="input")
        assert torch.equal(gate(POOLED).relevance, gate(POOLED).relevance)

    @pytest.mark.parametrize("training", [True, False])
    def test_random_heads_ignore_the_scorer(self, training: bool) -> None:
        gate = decision(head_selection="input").train(training)
        gate.gating = Gating(random_heads=True)
        pooled = torch.ones(64, 16)
        gates = (gate(pooled, torch.full((64,), 2)).gates > 0.5).float()
        assert (gates.sum(-1) == 2).all()
        # the same text 64 times: every head of every layer is drawn
        assert (gates.mean(0) > 0.2).all()
        assert (gates.mean(0) < 0.8).all()

    @pytest.mark.parametrize(("scope", "decisions"), [("input", 1), ("layer", 3)])
    def test_set_gating_reaches_every_decision(self, scope: str, decisions: int) -> None:
        network = random_network(small_config(budget_scope=scope))
        gating = Gating("soft", 2.0, 0.5)
        network.set_gating(gating)
        gatings = [m.gating for m in network.modules() if isinstance(m, BudgetDecision)]
        assert gatings == [gating] * decisions

    def test_ranked_selection_has_no_relevance(self) -> None:
        assert decision()(POOLED).relevance is None

    def test_evidence_changes_the_budget(self) -> None:
        gate = decision(embedding_exit=True)
        without = gate.budget(POOLED)
        assert torch.equal(gate.budget(POOLED, torch.zeros(6, 2)), without)
        assert not torch.equal(gate.budget(POOLED, torch.ones(6, 2)), without)


class TestFixedShare:
    @pytest.mark.parametrize(("share", "heads"), [(0.1, 1), (0.3, 2), (0.5001, 3), (1.0, 4)])
    @pytest.mark.parametrize("scope", ["input", "layer"])
    def test_every_input_has_the_fixed_share(self, scope: str, share: float, heads: int) -> None:
        model = random_network(small_config(budget_scope=scope))
        for module in model.modules():
            if isinstance(module, BudgetController):
                module.fix(share)
        output = model.half().float()(torch.randint(1, 40, (9, 7)))
        assert output.budget is not None
        assert output.gates is not None
        torch.testing.assert_close(
            output.budget, torch.full_like(output.budget, share), rtol=0, atol=1e-3
        )
        assert (output.gates.sum(-1) == heads).all()

    def test_a_fixed_controller_is_not_trained(self) -> None:
        controller = BudgetController(4, 3)
        controller.fix(0.4)
        assert not any(parameter.requires_grad for parameter in controller.parameters())


class TestForward:
    @pytest.mark.parametrize(("scope", "budgets"), [("input", 1), ("layer", 3)])
    @pytest.mark.parametrize("selection", ["input", "ranked"])
    def test_outputs_have_the_documented_shapes(
        self, scope: str, budgets: int, selection: str
    ) -> None:
        network = random_network(small_config(budget_scope=scope, head_selection=selection))
        with torch.no_grad():
            output = network(**pad(random_items([5, 7])))
            encoded = network.encoder(**pad(random_items([5, 7])))
        assert output.loss is None
        assert output.exit_logits is None
        assert output.logits.shape == (2, 3)
        assert output.budget.shape == (2, budgets)
        assert output.gates.shape == (2, 3, 4)
        assert (output.relevance is None) == (selection == "ranked")
        if output.relevance is not None:
            assert output.relevance.shape == (2, 3, 4)
        assert encoded.last_hidden_state.shape == (2, 7, 16)
        assert encoded.pooled.shape == (2, 16)

    @torch.no_grad()
    def test_mask_and_segments_default_to_ones_and_zeros(self) -> None:
        network = random_network(small_config())
        ids = torch.tensor([[3, 4, 5]])
        ones, zeros = torch.ones_like(ids), torch.zeros_like(ids)
        plain = network(ids, steps=2).logits
        assert torch.equal(plain, network(ids, ones, zeros, steps=2).logits)

    @torch.no_grad()
    def test_a_single_step_holds_for_every_item(self) -> None:
        network = random_network(small_config())
        batch = pad(random_items([3, 6]))
        each = network(**batch, steps=torch.tensor([2, 2])).logits
        assert torch.equal(network(**batch, steps=2).logits, each)

    @torch.no_grad()
    def test_given_gates_replace_the_decision(self) -> None:
        network = random_network(small_config())
        batch = pad(random_items([3, 6]))
        gates = torch.zeros(2, 3, 4)
        gates[:, :, :2] = 1
        output = network(**batch, gates=gates)
        assert torch.equal(output.gates, gates)
        assert torch.equal(output.logits, network(**batch, steps=2).logits)

    @pytest.mark.parametrize("pooling", ["mean", "cls"])
    @pytest.mark.parametrize("norm", ["post", "pre"])
    @torch.no_grad()
    def test_an_empty_item_has_a_finite_answer(self, pooling: str, norm: str) -> None:
        config = small_config(
            pooling=pooling, norm_position=norm, embedding_exit=True, exit_weight=0.5
        )
        output = random_network(config)(**pad([Item([], []), *random_items([4])]))
        for tensor in (output.logits, output.exit_logits, output.budget, output.gates):
            assert tensor.isfinite().all()

    @pytest.mark.parametrize("length", [POSITIONS + 1, 10 * POSITIONS])
    def test_items_longer_than_the_positions_are_refused(self, length: int) -> None:
        network = random_network(small_config())
        with pytest.raises(
            ValueError, match=f"{length} tokens, but the network has only {POSITIONS} positions"
        ):
            network(torch.ones(1, length, dtype=torch.long))

    @torch.no_grad()
    def test_an_item_may_fill_all_positions(self) -> None:
        network = random_network(small_config())
        assert network(torch.ones(1, POSITIONS, dtype=torch.long)).logits.isfinite().all()

    @pytest.mark.parametrize("scope", ["input", "layer"])
    @torch.no_grad()
    def test_padding_does_not_change_answers(self, scope: str) -> None:
        network = random_network(small_config(budget_scope=scope, head_selection="input"))
        short = random_items([4])
        alone = network(**pad(short))
        padded = network(**pad([*short, *random_items([11])]))
        assert_close(padded.logits[:1], alone.logits)
        assert torch.equal(padded.gates[:1], alone.gates)

    @torch.no_grad()
    def test_pooling_is_the_first_state_or_the_mean(self) -> None:
        batch = pad(random_items([5, 3]))
        for pooling in ("mean", "cls"):
            encoded = random_network(small_config(pooling=pooling)).encoder(**batch)
            states, mask = encoded.last_hidden_state, batch["attention_mask"]
            expected = states[:, 0] if pooling == "cls" else masked_mean(states, mask)
            assert torch.equal(encoded.pooled, expected)

    @torch.no_grad()
    def test_layers_without_heads_keep_the_embeddings(self) -> None:
        network = random_network(small_config(ladder=[[0, 0, 0], [4, 4, 4]]))
        batch = pad(random_items([5]))
        states = network.encoder(**batch, steps=1).last_hidden_state
        embedded = network.encoder.embed(batch["input_ids"], batch["token_type_ids"])
        assert torch.equal(states, embedded)

    @torch.no_grad()
    def test_gates_apply_to_neurons_only_if_coupled(self) -> None:
        for coupled in (True, False):
            network = random_network(small_config(budget_ffn=coupled, num_hidden_layers=1))
            gated, ungated = (
                PrefixWeights(network.encoder.layers[0], 4, None, torch.tensor([gates]))
                for gates in ([1.0, 0.0, 1.0, 1.0], [1.0] * 4)
            )
            neurons = ungated.up(torch.randn(1, 2, 16))
            assert torch.equal(gated.down(neurons), ungated.down(neurons)) != coupled


class TestStepZero:
    def network(self, **changes: Any) -> BudgetFormerForSequenceClassification:
        return random_network(small_config(embedding_exit=True, exit_weight=0.7, **changes))

    @torch.no_grad()
    def test_answers_with_the_exit_logits(self) -> None:
        output = self.network()(**pad(random_items([5, 2])), steps=0)
        assert torch.equal(output.logits, output.exit_logits)
        assert output.gates.sum().item() == 0

    @torch.no_grad()
    def test_items_of_one_batch_may_use_step_0_or_others(self) -> None:
        network, batch = self.network(), pad(random_items([5, 5, 5]))
        mixed = network(**batch, steps=torch.tensor([0, 3, 0]))
        assert torch.equal(mixed.logits[[0, 2]], mixed.exit_logits[[0, 2]])
        assert_close(mixed.logits[1], network(**batch, steps=3).logits[1])

    @torch.no_grad()
    def test_exit_logits_are_added_at_later_steps(self) -> None:
        network, batch = self.network(), pad(random_items([5, 2]))
        weighted = network(**batch, steps=2)
        network.config.exit_weight = 0.0
        unweighted = network(**batch, steps=2)
        assert_close(weighted.logits, unweighted.logits + 0.7 * unweighted.exit_logits)

    @torch.no_grad()
    def test_exit_weight_may_differ_by_step(self) -> None:
        network, batch = self.network(), pad(random_items([5, 2]))
        network.config.exit_weight = [0.1, 0.2, 0.3, 0.4]
        steps = torch.tensor([1, 3])
        weighted = network(**batch, steps=steps)
        network.config.exit_weight = 0.0
        unweighted = network(**batch, steps=steps)
        expected = unweighted.logits + torch.tensor([[0.1], [0.3]]) * unweighted.exit_logits
        assert_close(weighted.logits, expected)

    @torch.no_grad()
    def test_encoder_weight_applies_to_later_steps_only(self) -> None:
        network, batch = self.network(), pad(random_items([5, 2, 4]))
        steps = torch.tensor([0, 1, 3])
        network.config.exit_weight = 0.0
        unweighted = network(**batch, steps=steps)
        network.config.encoder_weight = [0.5, 1.0, 0.25, 1.0]
        weighted = network(**batch, steps=steps)
        assert_close(weighted.logits, unweighted.logits * torch.tensor([[1.0], [0.5], [0.25]]))

    @torch.no_grad()
    def test_is_the_sum_divided_by_the_root_of_the_tokens(self) -> None:
        network = self.network()
        head = network.exit_head
        assert head is not None
        ids = torch.tensor([[3, 4, 5, 9]])
        expected = head.weight.weight[[3, 4, 5]].sum(0) / 3**0.5 + head.bias
        actual = head(ids, torch.tensor([[1, 1, 1, 0]]))
        torch.testing.assert_close(actual[0], expected)

    @torch.no_grad()
    def test_pairs_of_neighbours_are_summed_like_tokens(self) -> None:
        network = random_network(small_config(embedding_exit=True, exit_buckets=11))
        head = network.exit_head
        assert head is not None
        rows = [
            3,
            4,
            5,
            40 + (3 * 1_000_003 + 4 * 7_919) % 11,
            40 + (4 * 1_000_003 + 5 * 7_919) % 11,
        ]
        expected = head.weight.weight[rows].sum(0) / 5**0.5 + head.bias
        actual = head(torch.tensor([[3, 4, 5, 9]]), torch.tensor([[1, 1, 1, 0]]))
        torch.testing.assert_close(actual[0], expected)

    @torch.no_grad()
    def test_low_rank_vectors_are_mapped_to_logits(self) -> None:
        network = random_network(small_config(embedding_exit=True, exit_rank=2))
        head = network.exit_head
        assert head is not None
        assert head.weight.weight.shape == (40, 2)
        expected = head.map(head.weight.weight[[3, 4]].sum(0) / 2**0.5) + head.bias
        actual = head(torch.tensor([[3, 4]]), torch.ones(1, 2, dtype=torch.long))
        torch.testing.assert_close(actual[0], expected)

    def test_word_order_matters_only_with_pairs_of_neighbours(self) -> None:
        mask = torch.ones(1, 3, dtype=torch.long)
        forwards, backwards = torch.tensor([[3, 4, 5]]), torch.tensor([[5, 4, 3]])
        for buckets, same in ((0, True), (101, False)):
            head = random_network(small_config(embedding_exit=True, exit_buckets=buckets)).exit_head
            assert head is not None
            assert torch.allclose(head(forwards, mask), head(backwards, mask)) == same

    @torch.no_grad()
    def test_without_tokens_is_the_bias(self) -> None:
        head = self.network().exit_head
        assert head is not None
        answer = head(torch.tensor([[3, 4]]), torch.zeros(1, 2, dtype=torch.long))
        assert torch.equal(answer[0], head.bias)

    def test_does_not_exist_by_default(self) -> None:
        assert random_network(small_config()).exit_head is None


class TestLoss:
    def test_single_label_is_cross_entropy(self) -> None:
        network = random_network(small_config())
        output = network(**pad(random_items([5, 2])), labels=torch.tensor([2, 0]))
        chosen = output.logits.log_softmax(-1)[torch.arange(2), torch.tensor([2, 0])]
        torch.testing.assert_close(output.loss, -chosen.mean())

    def test_multi_label_is_binary_cross_entropy(self) -> None:
        network = random_network(small_config(problem_type=MULTI_LABEL))
        labels = torch.tensor([[1, 0, 1], [0, 0, 0]])
        output = network(**pad(random_items([5, 2])), labels=labels)
        p = output.logits.sigmoid()
        expected = -torch.where(labels == 1, p, 1 - p).log().mean()
        torch.testing.assert_close(output.loss, expected)

    @pytest.mark.parametrize("norm", ["post", "pre"])
    @pytest.mark.parametrize("scope", ["input", "layer"])
    def test_every_weight_but_the_controllers_gets_a_gradient(self, norm: str, scope: str) -> None:
        config = small_config(
            norm_position=norm,
            budget_scope=scope,
            head_selection="input",
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        network = random_network(config).train()
        network(**pad(random_items([5, 7])), labels=torch.tensor([0, 2]), steps=4).loss.backward()
        without_gradient = {
            name
            for name, parameter in network.named_parameters()
            if parameter.grad is None or not parameter.grad.any()
        }
        # The steps were given, so f_o did not take part.
        assert {name for name in without_gradient if ".controller." not in name} == set()


class TestSaving:
    @PROPERTY
    @given(networks(), batches())
    @torch.no_grad()
    def test_a_network_with_the_same_state_gives_the_same_answers(
        self, network: BudgetFormerForSequenceClassification, items: list[Item]
    ) -> None:
        twin = BudgetFormerForSequenceClassification(copy.deepcopy(network.config)).eval()
        twin.load_state_dict(network.state_dict())
        assert torch.equal(network(**pad(items)).logits, twin(**pad(items)).logits)

    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"head_selection": "input", "embedding_exit": True, "exit_weight": 0.5},
            {"budget_scope": "layer", "norm_position": "pre", "budget_ffn": False},
            {"problem_type": MULTI_LABEL, "pooling": "cls", "ladder": [[0, 1, 0], [4, 4, 4]]},
        ],
    )
    @torch.no_grad()
    def test_a_saved_classifier_is_loaded_unchanged(
        self, tmp_path: Path, changes: dict[str, Any]
    ) -> None:
        network = random_network(small_config(**changes))
        network.save_pretrained(tmp_path)
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
        assert isinstance(loaded, BudgetFormerForSequenceClassification)
        assert not loaded.training
        batch = pad(random_items([5, 9]))
        assert torch.equal(loaded(**batch).logits, network(**batch).logits)
        assert (tmp_path / "model.safetensors").is_file()

    @torch.no_grad()
    def test_the_encoder_loads_from_the_folder_of_a_classifier(self, tmp_path: Path) -> None:
        network = random_network(small_config())
        network.save_pretrained(tmp_path)
        encoder = AutoModel.from_pretrained(tmp_path)
        assert isinstance(encoder, BudgetFormerModel)
        batch = pad(random_items([5, 9]))
        assert torch.equal(encoder(**batch).pooled, network.encoder(**batch).pooled)

    def test_a_saved_encoder_is_loaded_unchanged(self, tmp_path: Path) -> None:
        encoder = random_network(small_config()).encoder
        encoder.save_pretrained(tmp_path)
        loaded = AutoModel.from_pretrained(tmp_path)
        for name, tensor in encoder.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor)

    def test_label_names_are_saved(self, tmp_path: Path) -> None:
        names = {0: "World", 1: "Sports"}
        config = small_config(
            num_labels=2, id2label=names, label2id={v: k for k, v in names.items()}
        )
        random_network(config).save_pretrained(tmp_path)
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
        assert loaded.config.id2label == names

    def test_auto_classes_build_networks_from_a_configuration(self) -> None:
        config = small_config()
        assert isinstance(AutoModel.from_config(config), BudgetFormerModel)
        built = AutoModelForSequenceClassification.from_config(config)
        assert isinstance(built, BudgetFormerForSequenceClassification)

    def test_initial_weights_depend_on_the_seed_only(self) -> None:
        built: list[dict[str, Tensor]] = []
        for _ in range(2):
            torch.manual_seed(5)
            built.append(BudgetFormerForSequenceClassification(small_config()).state_dict())
        assert all(torch.equal(built[0][name], built[1][name]) for name in built[0])

    def test_initial_weights_have_the_configured_range(self) -> None:
        torch.manual_seed(0)
        config = small_config(hidden_size=64, intermediate_size=64, initializer_range=0.3)
        layer = BudgetFormerForSequenceClassification(config).encoder.layers[0]
        assert layer.attention.query.weight.std().item() == pytest.approx(0.3, rel=0.1)
        assert not layer.attention.query.bias.any()
        assert (layer.attention_norm.weight == 1).all()

    def test_word_embeddings_can_be_read_and_replaced(self) -> None:
        network = random_network(small_config())
        assert network.get_input_embeddings() is network.encoder.embeddings.word
        other = torch.nn.Embedding(50, 16)
        network.set_input_embeddings(other)
        assert network.encoder.embeddings.word is other


class TestPackage:
    @pytest.mark.parametrize(
        ("name", "cls"),
        [
            ("BudgetFormerConfig", BudgetFormerConfig),
            ("BudgetFormerModel", BudgetFormerModel),
            ("BudgetFormerForSequenceClassification", BudgetFormerForSequenceClassification),
        ],
    )
    def test_exports_the_model_classes(self, name: str, cls: type) -> None:
        assert getattr(budgetformer, name) is cls
        assert name in budgetformer.__all__

    def test_an_unknown_name_is_an_attribute_error(self) -> None:
        with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
            _ = budgetformer.Nothing
