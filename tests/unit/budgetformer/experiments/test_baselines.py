"""Baselines: the dense network's exits at each layer, and smaller dense networks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from budgetformer.errors import DataError
from budgetformer.experiments.baselines import (
    Baseline,
    keep_layers,
    main,
    read_baseline,
    train_baselines,
)
from budgetformer.training.data import TokenizedTexts
from budgetformer.training.recipe import Recipe
from tests.support.networks import new_network
from tests.support.stores import single_label_rows, write_jsonl
from tests.support.texts import topic_examples

RECIPE = Recipe(max_length=16, batch_size=12, learning_rate=5e-3, dense_epochs=1, budget_epochs=3)


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, _tokenizer_text: str
) -> tuple[Baseline, TokenizedTexts]:
    """Return trained baselines and their training texts."""
    tmp_path = tmp_path_factory.mktemp("baseline")
    examples, tokenizer = topic_examples(), Tokenizer.from_str(_tokenizer_text)
    tokens = TokenizedTexts(tokenizer, examples.texts, examples.pairs, 16)
    model, folder = new_network(), tmp_path / "dense"
    train_baselines(model, tokens, examples, RECIPE, tmp_path / "work", folder, lambda _: None)
    return read_baseline(folder), tokens


class TestBaseline:
    def test_the_exit_of_the_last_layer_is_the_network(
        self, trained: tuple[Baseline, TokenizedTexts]
    ) -> None:
        baseline, tokens = trained
        logits = baseline.layer_logits(tokens)
        batch = tokens.batch(torch.arange(5).numpy())
        with torch.no_grad():
            expected = baseline.model(batch.input_ids, batch.attention_mask, steps=4).logits
        torch.testing.assert_close(logits[-1, :5], expected, rtol=1e-4, atol=1e-5)

    def test_exits_learn_the_labels(self, trained: tuple[Baseline, TokenizedTexts]) -> None:
        baseline, tokens = trained
        right = baseline.layer_logits(tokens).argmax(-1) == torch.from_numpy(
            topic_examples().labels
        )
        assert (right.float().mean(1) > 0.9).all()  # three topics with words of their own

    def test_smaller_networks_answer_with_fewer_layers_and_heads(
        self, trained: tuple[Baseline, TokenizedTexts]
    ) -> None:
        baseline, tokens = trained
        plans = [model.config.ladder for model in baseline.smaller]
        assert plans == [[[1]], [[2]], [[4]]]  # of 2 layers with 4 heads
        labels = torch.from_numpy(topic_examples().labels)
        for logits in baseline.smaller_logits(tokens):
            assert (logits.argmax(-1) == labels).float().mean() > 0.9

    def test_kept_layers_are_evenly_spaced(self) -> None:
        model = new_network(num_hidden_layers=5)
        small = keep_layers(model, 2)
        for ours, theirs in zip(small.encoder.encoder_layers, (0, 2), strict=True):
            weight = model.encoder.encoder_layers[theirs].feed_forward.up.weight
            assert torch.equal(ours.feed_forward.up.weight, weight)
        assert small.config.num_hidden_layers == 2
        assert model.config.num_hidden_layers == 5

    def test_a_folder_without_baselines_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="no dense network"):
            read_baseline(tmp_path)


def test_the_command_needs_no_test_texts(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", single_label_rows())
    (tmp_path / "test.jsonl").write_text("no JSON\n")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        "hidden_size = 16\nnum_heads = 2\nintermediate_size = 16\nvocab_size = 200\n"
        "max_length = 12\nbudget_epochs = 1\n"
    )
    chosen = ["--data", tmp_path, "--recipe", recipe, "--out", tmp_path / "out", "--threads", 1]
    assert main([str(word) for word in chosen]) == 0
    assert read_baseline(tmp_path / "out").smaller
