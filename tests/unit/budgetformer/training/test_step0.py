"""Training of step 0: it generalizes, uses word order, and its held-out logits are honest."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from budgetformer.model.answers import confidence
from budgetformer.model.architecture import MULTI_LABEL, Architecture
from budgetformer.model.step0 import TfidfHead
from budgetformer.training.data import Examples, TokenizedTexts
from budgetformer.training.recipe import Recipe
from budgetformer.training.step0 import fit_step0
from tests.support.networks import small_config
from tests.support.texts import topic_examples

RECIPE = Recipe(exit_folds=3)


def fit(
    tokenizer: Tokenizer, examples: Examples, buckets: int = 512
) -> tuple[TfidfHead, torch.Tensor]:
    tokens = TokenizedTexts(tokenizer, examples.texts, examples.pairs, 32)
    return fit_step0(config_for(examples, buckets), tokens, examples, RECIPE)


def config_for(examples: Examples, buckets: int = 512) -> Architecture:
    return small_config(
        vocab_size=200,
        embedding_exit=True,
        exit_tfidf=True,
        exit_buckets=buckets,
        num_labels=len(examples.names),
        problem_type=MULTI_LABEL if examples.multi_label else "single_label_classification",
    )


def answers(head: TfidfHead, tokenizer: Tokenizer, texts: list[str]) -> torch.Tensor:
    batch = TokenizedTexts(tokenizer, texts, None, 32).batch(np.arange(len(texts)))
    return head(batch.input_ids, batch.attention_mask, batch.token_type_ids)


def test_is_right_on_unseen_texts(tokenizer: Tokenizer) -> None:
    examples = topic_examples()
    kept, held = np.arange(96), np.arange(96, len(examples))
    head, _ = fit(tokenizer, examples.subset(kept))
    unseen = examples.subset(held)
    assert (answers(head, tokenizer, unseen.texts).argmax(-1).numpy() == unseen.labels).all()


def test_word_order_is_learned_from_pairs_of_neighbours(tokenizer: Tokenizer) -> None:
    texts = ["The cook painted a tug.", "a tug painted The cook."] * 20
    examples = Examples(texts, None, np.arange(40) % 2, ["forwards", "backwards"])
    with_pairs, _ = fit(tokenizer, examples)
    without_pairs, _ = fit(tokenizer, examples, buckets=0)

    def accuracy(head: TfidfHead) -> float:
        predicted = answers(head, tokenizer, texts).argmax(-1).numpy()
        return float((predicted == examples.labels).mean())

    assert accuracy(with_pairs) == 1
    assert accuracy(without_pairs) == 0.5


def test_out_of_fold_logits_do_not_depend_on_their_own_label(tokenizer: Tokenizer) -> None:
    """With random labels, out-of-fold answers are right by chance only."""
    random = np.random.default_rng(0)
    examples = topic_examples()
    shuffled = replace(examples, labels=random.integers(0, 3, len(examples)))
    head, unseen = fit(tokenizer, shuffled)
    labels = torch.from_numpy(shuffled.labels)
    seen = answers(head, tokenizer, shuffled.texts)
    assert (seen.argmax(-1) == labels).double().mean() > 0.6
    assert (unseen.argmax(-1) == labels).double().mean() < 0.5
    assert confidence(unseen, None).mean() < 0.55  # and not confident


def test_each_label_of_a_multi_label_problem_has_a_column(tokenizer: Tokenizer) -> None:
    examples = topic_examples()
    several = np.stack([examples.labels == 0, examples.labels != 1], -1).astype(np.int64)
    head, unseen = fit(tokenizer, Examples(examples.texts, None, several, ["a", "b"]))
    assert head.table.shape[1] == 2
    assert ((unseen > 0).numpy() == several).mean() > 0.95


@pytest.mark.parametrize("missing", [0, 2])
def test_a_label_without_texts_is_never_predicted(tokenizer: Tokenizer, missing: int) -> None:
    examples = topic_examples()
    two = replace(examples, labels=np.where(examples.labels == missing, 1, examples.labels))
    head, _ = fit(tokenizer, two)
    assert (answers(head, tokenizer, two.texts).argmax(-1) != missing).all()


def test_training_is_repeatable(tokenizer: Tokenizer) -> None:
    (first, unseen), (second, again) = (fit(tokenizer, topic_examples()) for _ in range(2))
    assert torch.equal(unseen, again)
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, second.state_dict()[name]), name
