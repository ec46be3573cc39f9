"""Step 0 in NumPy: features of tokens and pairs, TF-IDF, logits and the evidence for f_o."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from budgetformer.model import tfidf as step0
from budgetformer.model.answers import confidence
from budgetformer.model.architecture import EVIDENCE_FEATURES, MULTI_LABEL
from budgetformer.model.modeling import BudgetFormerForSequenceClassification as Network
from budgetformer.model.tfidf import MAX_ODDS, StepZero, evidence, features, tfidf
from tests.support.networks import (
    PROPERTY,
    VOCABULARY,
    Item,
    batches,
    networks,
    pack,
    pad,
    random_items,
    random_network,
    small_config,
)

BUCKETS = 997
"""A number of buckets with which the few features of these tests do not collide."""


def features_of(items: list[list[int]], segments: list[list[int]] | None = None) -> step0.Features:
    flat = np.array([token for text in items for token in text])
    kinds = None if segments is None else np.array([kind for text in segments for kind in text])
    return features(flat, kinds, [len(text) for text in items], VOCABULARY, BUCKETS)


def rows_of(items: list[list[int]], segments: list[list[int]] | None = None) -> list[set[int]]:
    found = features_of(items, segments)
    return [set(found.row[found.owner == text].tolist()) for text in range(len(items))]


def numpy_step0(network: Network) -> StepZero:
    step = network.step0_with_numpy()
    assert step is not None
    return step


class TestFeatures:
    def test_tokens_have_rows_and_pairs_have_hashed_rows(self) -> None:
        (rows,) = rows_of([[3, 4, 5]])
        assert {3, 4, 5} < rows
        assert len(rows) == 5
        assert all(VOCABULARY <= row < VOCABULARY + BUCKETS for row in rows - {3, 4, 5})

    def test_pairs_depend_on_the_order_of_tokens(self) -> None:
        forwards, backwards = rows_of([[3, 4], [4, 3]])
        assert forwards != backwards

    def test_no_pair_spans_two_texts(self) -> None:
        two_texts, one_text = rows_of([[3], [4]]), rows_of([[3, 4]])
        assert two_texts == [{3}, {4}]
        assert len(one_text[0]) == 3

    def test_repeated_tokens_are_counted(self) -> None:
        found = features_of([[3, 3, 3, 4]])
        assert found.count[found.row == 3] == [3]

    def test_tokens_of_a_second_text_depend_on_whether_the_first_has_them(self) -> None:
        pair = [0, 0, 1]
        shared, new, elsewhere = rows_of([[3, 4, 4], [3, 5, 4], [4, 3, 4]], [pair] * 3)
        assert shared & elsewhere > set()  # token 4 of the second text, which both first texts have
        assert not shared & new - {3}
        assert 4 not in new

    @PROPERTY
    @given(batches())
    def test_a_text_has_the_same_features_in_any_batch(self, items: list[Item]) -> None:
        texts, kinds = [i.ids for i in items], [i.segments for i in items]
        together = rows_of(texts, kinds)
        alone = [rows_of([ids], [segments])[0] for ids, segments in zip(texts, kinds, strict=True)]
        assert together == alone


class TestTfidf:
    idf = np.full(VOCABULARY + BUCKETS, 32, np.uint8)

    def test_vectors_have_length_1(self) -> None:
        found = features_of([[3, 4, 3], [7]])
        weight = tfidf(found, self.idf, 1.0)
        assert np.bincount(found.owner, weight**2) == pytest.approx([1, 1])

    def test_a_rare_token_weighs_more(self) -> None:
        idf = self.idf.copy()
        idf[4] = 64
        found = features_of([[3, 4]])
        weight = dict(zip(found.row.tolist(), tfidf(found, idf, 0.0).tolist(), strict=True))
        assert weight[4] == pytest.approx(2 * weight[3])

    @pytest.mark.parametrize(("repeats", "factor"), [(0.0, 1.0), (1.0, 1 + math.log(3))])
    def test_a_repeated_token_weighs_by_the_logarithm_of_its_count(
        self, repeats: float, factor: float
    ) -> None:
        found = features_of([[3, 9, 3, 9, 3]])
        assert Counter(found.count.tolist())[3] == 1
        values = tfidf(found, self.idf, repeats).tolist()
        weight = dict(zip(found.row.tolist(), values, strict=True))
        twice = 1 + repeats * math.log(2)
        assert weight[3] / weight[9] == pytest.approx(factor / twice)


class TestStepZero:
    @PROPERTY
    @given(networks(budget_scope="input", embedding_exit=True, exit_tfidf=True), batches())
    def test_equals_the_reference_network(self, network: Network, items: list[Item]) -> None:
        tokens = pack(items)
        logits, s = numpy_step0(network).decide(
            tokens.input_ids.numpy(), tokens.token_type_ids.numpy(), tokens.lengths
        )
        with torch.no_grad():
            expected = network(**pad(items), steps=1)
        assert torch.from_numpy(logits).allclose(expected.exit_logits, rtol=1e-4, atol=1e-5)
        assert torch.from_numpy(s).allclose(expected.budget[:, 0], rtol=1e-4, atol=1e-5)
        assert logits.dtype == s.dtype == np.float32

    def test_without_tokens_the_logits_are_the_bias(self) -> None:
        network = random_network(small_config(embedding_exit=True, exit_tfidf=True))
        step = numpy_step0(network)
        empty = np.empty(0, np.int64)
        assert np.array_equal(step.logits(empty, empty, [0, 0]), np.tile(step.bias, (2, 1)))

    def test_two_labels_need_one_column(self) -> None:
        config = small_config(embedding_exit=True, exit_tfidf=True, num_labels=2)
        step = numpy_step0(random_network(config))
        assert step.table.shape == (VOCABULARY, 1)
        tokens = pack(random_items([5, 3]))
        logits = step.logits(tokens.input_ids.numpy(), None, tokens.lengths)
        assert np.array_equal(logits[:, 0], -logits[:, 1])

    @torch.no_grad()
    def test_the_reference_runs_in_half_precision(self) -> None:
        network = random_network(small_config(embedding_exit=True, exit_tfidf=True))
        items = pad(random_items([5, 3]))
        expected = network(**items)
        halved = network.half()(**items)
        assert halved.exit_logits.float().allclose(expected.exit_logits, atol=0.05)
        assert halved.budget.float().allclose(expected.budget, atol=0.05)

    def test_does_not_exist_if_f_o_reads_embeddings(self) -> None:
        assert random_network(small_config(embedding_exit=True)).step0_with_numpy() is None
        assert random_network(small_config()).step0_with_numpy() is None


def logit_rows(labels: int) -> st.SearchStrategy[list[list[float]]]:
    row = st.lists(st.floats(-2000, 2000), min_size=labels, max_size=labels)
    return st.lists(row, min_size=1, max_size=4)


class TestEvidence:
    @PROPERTY
    @given(st.integers(1, 5).flatmap(logit_rows), st.sampled_from([None, MULTI_LABEL]))
    def test_is_finite_and_has_the_odds_of_the_confidence(
        self, rows: list[list[float]], problem_type: str | None
    ) -> None:
        logits = np.array(rows)
        read = evidence(logits, np.arange(len(rows)), problem_type)
        assert read.shape == (len(rows), EVIDENCE_FEATURES)
        assert np.isfinite(read).all()
        if logits.shape[1] == 1 and problem_type is None:
            return
        confident = confidence(torch.from_numpy(logits), problem_type)
        odds = torch.logit(confident, eps=1e-12).clamp(max=MAX_ODDS).numpy()
        clear = odds < MAX_ODDS - 1
        assert read[clear, 0] == pytest.approx(odds[clear], abs=1e-3)

    def test_entropy_is_a_share_of_the_largest_possible(self) -> None:
        read = evidence(np.array([[1.0, 1.0, 1.0], [20.0, 0.0, 0.0]]), [3, 3], None)
        assert read[:, 1] == pytest.approx([1, 0], abs=1e-6)
