"""The paper's experiment: its variants, its statistics, and the study as a whole."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from budgetformer.errors import DataError
from budgetformer.experiments import paper
from budgetformer.model.configuration import BudgetFormerConfig
from budgetformer.training.pipeline import build_model, find_start
from budgetformer.training.recipe import Recipe
from budgetformer.training.trainer import inputs
from tests.support.texts import topic_examples

TINY = """
max_train_rows = 48
max_length = 16
batch_size = 12
learning_rate = 5e-3
dense_epochs = 0
budget_epochs = 1
distillation = 0.0
gating = "soft"
head_selection = "input"
budget_scope = "layer"
budget_ffn = false
embedding_exit = false
hidden_size = 16
num_layers = 2
num_heads = 4
intermediate_size = 16
vocab_size = 150
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder of synthetic sentences to train and to test on."""
    folder = tmp_path / "topics"
    folder.mkdir()
    examples = topic_examples()
    lines = [
        json.dumps({"text": text, "label": int(label)})
        for text, label in zip(examples.texts, examples.labels, strict=True)
    ]
    (folder / "train.jsonl").write_text("\n".join(lines[:96]))
    (folder / "test.jsonl").write_text("\n".join(lines[96:]))
    (folder / "labels.json").write_text(json.dumps(examples.names))
    return folder


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


class TestVariants:
    def test_the_full_network_trains_as_long_and_selects_no_heads(self) -> None:
        base = Recipe.read("paper-small")
        full = paper.variant_recipe(base, paper.FULL)
        assert (full.dense_epochs, full.budget_epochs) == (base.budget_epochs, 0)
        assert full.head_selection == "ranked"

    def test_the_recipe_variant_is_the_recipe(self) -> None:
        base = Recipe.read("paper-small", seed=3)
        assert paper.variant_recipe(base, paper.RECIPE) == base


class TestAuc:
    def test_of_perfect_reversed_and_constant_scores(self) -> None:
        positive = np.array([False, False, True, True])
        assert paper.auc(np.array([0.1, 0.2, 0.3, 0.4]), positive) == 1
        assert paper.auc(np.array([0.4, 0.3, 0.2, 0.1]), positive) == 0
        assert paper.auc(np.ones(4), positive) == 0.5

    def test_is_the_share_of_ordered_pairs(self) -> None:
        positive = np.array([True, False, True, False, False])
        # of six pairs, the positive score is higher in two and equal in one
        assert paper.auc(np.array([2, 1, 3, 3, 4]), positive) == pytest.approx(2.5 / 6)

    def test_without_negatives_is_one_half(self) -> None:
        assert paper.auc(np.array([1.0, 2.0]), np.array([True, True])) == 0.5


class TestExplainedVariance:
    GROUPS = np.array([0, 0, 1, 1])

    def test_of_groups_that_explain_all_nothing_and_half(self) -> None:
        assert paper.explained_variance(np.array([1.0, 1.0, 3.0, 3.0]), self.GROUPS) == 1
        assert paper.explained_variance(np.array([1.0, 3.0, 1.0, 3.0]), self.GROUPS) == 0
        assert paper.explained_variance(
            np.array([0.0, 2.0, 2.0, 4.0]), self.GROUPS
        ) == pytest.approx(0.5)

    @pytest.mark.parametrize("value", [1.0, 0.1])
    def test_of_a_constant_is_zero(self, value: float) -> None:
        values, groups = np.full(1001, value), np.arange(1001) % 7
        assert paper.explained_variance(values, groups) == 0


class TestSavedShares:
    CONFIG = BudgetFormerConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=32,
        budget_ffn=False,
        budget_scope="layer",
        head_selection="input",
        controller_hidden_size=4,
    )

    def test_match_a_hand_calculation(self) -> None:
        attention, compact = paper.saved_shares(self.CONFIG, np.array([[1, 3]]), np.array([10]))
        # one layer of 10 tokens: projections 4*10*16*16, attention 2*10*10*16, neurons 2*10*16*32
        dense = 2 * (10_240 + 3_200 + 10_240) + 16 * 2
        assert attention == pytest.approx((0.75 + 0.25) * 3_200 / dense)
        decisions = 2 * (16 + 1) * 4 + 16 * 2 * 4
        assert compact == pytest.approx(((0.75 + 0.25) * 13_440 - decisions) / dense)

    def test_all_heads_save_nothing_and_cost_the_decision(self) -> None:
        attention, compact = paper.saved_shares(
            self.CONFIG, np.array([[4, 4], [4, 4]]), np.array([3, 9])
        )
        assert attention == 0
        assert compact < 0


class TestStudy:
    def test_reports_every_variant_and_resumes(
        self, folder: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        work = tmp_path / "work"
        arguments = ["--recipe", str(recipe), "--work-dir", str(work), "--data", str(folder)]
        first, second = tmp_path / "first.md", tmp_path / "second.md"
        paper.main([*arguments, "--out", str(first)])
        assert capsys.readouterr().err.count("topics: ") == len(paper.VARIANTS)
        text = first.read_text()
        assert "48 training texts, 48 test texts" in text
        for name in paper.VARIANTS:
            assert text.count(f"| {name} |") == 2

        (work / "topics" / "random-heads.json").unlink()
        paper.main([*arguments, "--out", str(second)])
        assert capsys.readouterr().err.count("topics: ") == 1
        assert second.read_text() == text

        results = {
            path.stem: json.loads(path.read_text())
            for path in (work / "topics").glob("*.json")
            if path.stem != "tokenizer"
        }
        assert len(results) == len(paper.VARIANTS)
        assert np.array(results["fixed-s-0-1"]["heads"]).tolist() == [[1, 1]] * 48
        assert np.array(results["fixed-s-1-0"]["heads"]).tolist() == [[4, 4]] * 48
        assert np.array(results["full-multi-head"]["heads"]).tolist() == [[4, 4]] * 48

        recipe.write_text(TINY.replace("budget_epochs = 1", "budget_epochs = 2"))
        with pytest.raises(DataError, match="another recipe"):
            paper.main([*arguments, "--out", str(second)])

    @pytest.mark.parametrize("random_heads", [True, False])
    def test_heads_are_random_in_scoring_only_if_they_were_in_training(
        self, folder: Path, recipe: Path, tmp_path: Path, random_heads: bool
    ) -> None:
        made = Recipe.read(recipe, random_heads=random_heads)
        data = paper.DataSet.read(folder, made, tmp_path)
        model = build_model(find_start(None), data.train, made, data.vocab_size)
        paper.score(model, data, made)
        batch = inputs(data.test_tokens.batch(np.zeros(32, dtype=np.int64)))
        choices = model(**batch, steps=2).gates.flatten(1)
        assert (len(choices.unique(dim=0)) > 1) == random_heads

    def test_refuses_data_without_a_test_file(
        self, folder: Path, recipe: Path, tmp_path: Path
    ) -> None:
        (folder / "test.jsonl").unlink()
        with pytest.raises(DataError, match="has no test file"):
            paper.main(
                ["--recipe", str(recipe), "--work-dir", str(tmp_path), "--data", str(folder)]
            )
