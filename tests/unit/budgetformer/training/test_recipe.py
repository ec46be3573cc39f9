from __future__ import annotations

from pathlib import Path

import pytest

from budgetformer.errors import DataError
from budgetformer.training.recipe import Recipe


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
