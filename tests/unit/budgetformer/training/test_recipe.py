"""Recipes: files, overrides, checks, and the packaged recipes."""

from __future__ import annotations

from pathlib import Path

import pytest

from budgetformer.errors import DataError
from budgetformer.training.recipe import Recipe, packaged_recipes

PAPER = ["paper", "paper-small"]


def test_without_a_file_all_values_are_defaults() -> None:
    assert Recipe.read(None) == Recipe()


def test_a_file_sets_its_keys(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('seed = 7\nhead_selection = "input"\nlearning_rate = 1e-4\n')
    assert Recipe.read(path) == Recipe(seed=7, head_selection="input", learning_rate=1e-4)


def test_overrides_replace_values_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text("seed = 7\nbatch_size = 8\n")
    assert Recipe.read(path, seed=1, batch_size=None) == Recipe(seed=1, batch_size=8)


def test_unknown_keys_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text("zeal = 11\nhaste = 2\n")
    with pytest.raises(DataError, match="unknown recipe key: haste, zeal"):
        Recipe.read(path)


@pytest.mark.parametrize(
    "line",
    [
        'precision = "bfloat16"',
        'ladder = "importence"',
        "distillation = 1.7",
        "level_costs = [0.1]",
        "batch_size = true",
        "batch_size = 0",
        'learning_rate = "1e-4"',
        "learning_rate = nan",
        "seed = -1",
        "hold_out = 0.0",
        "temperature = 2.0",
    ],
)
def test_an_invalid_value_is_refused_with_its_key(tmp_path: Path, line: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(line)
    with pytest.raises(DataError, match=f"recipe key {line.split()[0]} is "):
        Recipe.read(path)


@pytest.mark.parametrize("content", ["seed = ", "[", "seed 3"])
def test_an_invalid_file_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(content)
    with pytest.raises(DataError, match=r"recipe\.toml"):
        Recipe.read(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.toml"):
        Recipe.read(tmp_path / "nowhere.toml")


def test_as_dict_makes_an_equal_recipe() -> None:
    recipe = Recipe(seed=5, precision="bf16", budget_ffn=False)
    assert Recipe(**recipe.as_dict()) == recipe


def test_lists_of_a_file_become_tuples(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text("temperature = [3.0, 1.0]\n")
    assert Recipe.read(path) == Recipe(temperature=(3.0, 1.0))


def test_the_packaged_recipes_are_listed() -> None:
    assert packaged_recipes() == ["hours", "minutes", *PAPER]


@pytest.mark.parametrize("name", PAPER)
def test_the_paper_recipes_have_the_architecture_of_the_paper(name: str) -> None:
    recipe = Recipe.read(name, seed=4)
    assert (recipe.seed, recipe.gating, recipe.budget_scope) == (4, "soft", "layer")
    assert (recipe.head_selection, recipe.budget_ffn, recipe.embedding_exit) == (
        "input",
        False,
        False,
    )
    assert (recipe.dense_epochs, recipe.distillation) == (0, 0.0)
    assert (recipe.num_layers, recipe.num_heads) == (4, 8)


def test_the_paper_recipe_has_the_sizes_of_the_paper() -> None:
    recipe = Recipe.read("paper")
    assert (recipe.hidden_size, recipe.batch_size, recipe.budget_epochs) == (768, 16, 10)
    assert recipe.learning_rate == 2e-5


def test_paper_small_differs_in_size_and_schedule_only() -> None:
    paper, small = Recipe.read("paper").as_dict(), Recipe.read("paper-small").as_dict()
    assert {name for name in paper if paper[name] != small[name]} == {
        "max_train_rows",
        "max_length",
        "hidden_size",
        "intermediate_size",
        "vocab_size",
        "budget_epochs",
        "learning_rate",
    }


def test_an_unknown_recipe_is_refused_with_the_packaged_ones() -> None:
    with pytest.raises(
        DataError, match=r"papyrus.*packaged recipes: hours, minutes, paper, paper-small"
    ):
        Recipe.read("papyrus")
