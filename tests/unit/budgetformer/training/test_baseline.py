from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from budgetformer.errors import DataError
from budgetformer.training.baseline import Baseline, read_baseline, write_baseline
from budgetformer.training.data import TokenizedTexts
from budgetformer.training.recipe import Recipe
from budgetformer.training.trainer import Trainer
from tests.support.texts import topic_examples
from tests.unit.budgetformer.training.test_trainer import new_network

RECIPE = Recipe(max_length=16, batch_size=12, learning_rate=5e-3, dense_epochs=4, budget_epochs=0)


@pytest.fixture
def kept(tmp_path: Path, tokenizer: Tokenizer) -> tuple[Baseline, TokenizedTexts]:
    """Return a baseline kept while training, and the texts of that run."""
    examples = topic_examples()
    tokens = TokenizedTexts(tokenizer, examples.texts, examples.pairs, 16)
    model = new_network()
    folder = tmp_path / "dense"

    def keep() -> None:
        write_baseline(model, tokens, examples, folder, seed=0)

    Trainer(model, tokens, examples, RECIPE, tmp_path / "work", lambda _: None).train(keep)
    return read_baseline(folder), tokens


class TestBaseline:
    def test_the_last_layer_is_the_network(self, kept: tuple[Baseline, TokenizedTexts]) -> None:
        baseline, tokens = kept
        logits = baseline.layer_logits(tokens)
        batch = tokens.batch(torch.arange(5).numpy())
        with torch.no_grad():
            expected = baseline.model(batch.input_ids, batch.attention_mask, steps=4).logits
        torch.testing.assert_close(logits[-1, :5], expected, rtol=1e-4, atol=1e-5)

    def test_exits_answer_like_trained_classifiers(
        self, kept: tuple[Baseline, TokenizedTexts]
    ) -> None:
        baseline, tokens = kept
        right = baseline.layer_logits(tokens).argmax(-1) == torch.from_numpy(
            topic_examples().labels
        )
        assert (right.float().mean(1) > 0.9).all()  # three topics with words of their own

    def test_a_folder_without_one(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="no dense network"):
            read_baseline(tmp_path)
