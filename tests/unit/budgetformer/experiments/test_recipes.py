"""The comparison of recipes: variants of one recipe, each trained once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from budgetformer.checkpoint.loading import load_network
from budgetformer.checkpoint.store import read_checkpoint
from budgetformer.errors import DataError
from budgetformer.experiments.recipes import BASE, COSTS, main, read_study, teacher_logits
from budgetformer.training.calibration import AnswerTable, run_every_step
from budgetformer.training.data import TokenizedTexts
from tests.support.stores import (
    CHAINED,
    labelled_examples,
    model_store,
    single_label_rows,
    write_jsonl,
)

__all__ = ["model_store"]

STUDY = """
hidden_size = 16
num_heads = 2
intermediate_size = 16
vocab_size = 200
max_length = 12
budget_epochs = 2
exit_weights = 300

[variants."random steps only"]
sandwich = false

[variants."another network as teacher"]
teacher = "{store}/variant-1/1"
"""


@pytest.fixture
def study(tmp_path: Path) -> Path:
    path = tmp_path / "study.toml"
    path.write_text(STUDY.format(store=tmp_path / "store"))
    return path


def test_variants_change_keys_of_the_recipe(study: Path) -> None:
    base, random_steps, taught = read_study(study)
    assert (base.name, base.recipe.sandwich, base.teacher) == (BASE, True, None)
    assert (random_steps.recipe.sandwich, random_steps.recipe.hidden_size) == (False, 16)
    assert taught.recipe == base.recipe
    assert taught.teacher is not None


def test_a_teacher_gives_the_answers_of_its_full_budget(model_store: Path) -> None:
    """The encoder's own logits may be mere corrections of step 0's."""
    checkpoint = read_checkpoint(model_store / CHAINED / "1")
    examples = labelled_examples(list(checkpoint.manifest.labels))
    tokens = TokenizedTexts.of(checkpoint, examples)
    network = load_network(checkpoint)
    fused = AnswerTable(network.config, run_every_step(network, tokens)).logits[-1]
    given = teacher_logits(checkpoint.path)(examples)
    assert torch.allclose(given, fused, atol=1e-5)


@pytest.mark.parametrize(
    "text", ["sandwich = 1", "[variants.a]\nsandwitch = true", "= 1", "variants = 1", "teacher = 1"]
)
def test_an_invalid_study_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "study.toml"
    path.write_text(text)
    with pytest.raises(DataError):
        read_study(path)


def test_every_variant_is_trained_once_and_compared(study: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in ("train", "test"):
        write_jsonl(tmp_path / "data" / f"{name}.jsonl", single_label_rows())
    paths = ["--data", tmp_path / "data", "--store", tmp_path / "store", "--out", tmp_path / "out"]
    arguments = [str(word) for word in (study, *paths, "--threads", 1)]
    assert main(arguments) == 0
    results = json.loads((tmp_path / "out" / "recipes.json").read_text())
    assert [result["name"] for result in results] == [
        BASE, "random steps only", "another network as teacher"
    ]  # fmt: skip
    for result in results:
        assert result["minutes"] > 0
        assert result["full"] > 0.9
        assert len(result["accuracies"]) == len(COSTS)
    assert results[0]["gains"][-1] == [0, 0, 0]
    assert "| random steps only |" in (tmp_path / "out" / "README.md").read_text()

    made = [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("store/*/1/manifest.json"))]
    assert main(arguments) == 0
    again = [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("store/*/1/manifest.json"))]
    assert (again, len(made)) == (made, 3)

    study.write_text(study.read_text().replace("sandwich = false", "distillation = 0.0"))
    assert main(arguments) == 1  # the second checkpoint is of another recipe


def test_data_without_a_test_file_is_refused_before_training(study: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", single_label_rows())
    paths = ["--data", data, "--store", tmp_path / "store", "--out", tmp_path / "out"]
    assert main([str(word) for word in (study, *paths)]) == 1
    assert not (tmp_path / "store").exists()
