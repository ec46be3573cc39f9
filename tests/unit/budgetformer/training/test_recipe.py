from __future__ import annotations

from pathlib import Path

import pytest

from budgetformer.errors import DataError
from budgetformer.training.recipe import Recipe, packaged_recipes

PAPER = ["paper", "paper-small"]


def test_without_a_file_the_defaults_hold() -> None:
    assert Recipe.read(None) == Recipe()


def test_a_file_sets_what_it_names(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('seed = 7\nhead_selection = "input"\nlearning_rate = 1e-4\n')
    assert Recipe.read(path) == Recipe(seed=7, head_selection="input", learning_rate=1e-4)


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text("seed = 7\nbatch_size = 8\n")
    assert Recipe.read(path, seed=1, batch_size=None) == Recipe(seed=1, batch_size=8)


def test_unknown_keys_are_named(tmp_path: Path) -> None:
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
def test_a_value_that_a_key_cannot_have_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(line)
    with pytest.raises(DataError, match=f"recipe key {line.split()[0]} is "):
        Recipe.read(path)


@pytest.mark.parametrize("content", ["seed = ", "[", "seed 3"])
def test_broken_file(tmp_path: Path, content: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(content)
    with pytest.raises(DataError, match=r"recipe\.toml"):
        Recipe.read(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.toml"):
        Recipe.read(tmp_path / "nowhere.toml")


def test_plain_values_make_the_recipe_again() -> None:
    recipe = Recipe(seed=5, precision="bf16", budget_ffn=False)
    assert Recipe(**recipe.as_dict()) == recipe


def test_lists_of_a_file_become_the_tuples_they_mean(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text("temperature = [3.0, 1.0]\n")
    assert Recipe.read(path) == Recipe(temperature=(3.0, 1.0))


def test_the_paper_is_packaged_at_both_sizes() -> None:
    assert packaged_recipes() == ["hours", "minutes", *PAPER]


@pytest.mark.parametrize("name", PAPER)
def test_a_packaged_recipe_is_the_papers_form(name: str) -> None:
    recipe = Recipe.read(name, seed=4)
    assert (recipe.seed, recipe.gating, recipe.budget_scope) == (4, "soft", "layer")
    assert (recipe.head_selection, recipe.budget_ffn, recipe.embedding_exit) == (
        "input",
        False,
        False,
    )
    assert (recipe.dense_epochs, recipe.distillation) == (0, 0.0)
    assert (recipe.num_layers, recipe.num_heads) == (4, 8)


def test_the_paper_has_its_own_size() -> None:
    recipe = Recipe.read("paper")
    assert (recipe.hidden_size, recipe.batch_size, recipe.budget_epochs) == (768, 16, 10)
    assert recipe.learning_rate == 2e-5


def test_the_small_paper_differs_in_size_and_schedule_only() -> None:
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


def test_neither_file_nor_packaged() -> None:
    with pytest.raises(
        DataError, match=r"papyrus.*packaged recipes: hours, minutes, paper, paper-small"
    ):
        Recipe.read("papyrus")
