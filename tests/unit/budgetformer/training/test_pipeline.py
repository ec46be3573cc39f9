from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from budgetformer.checkpoint import read_checkpoint
from budgetformer.classifier import Classifier
from budgetformer.errors import DataError
from budgetformer.modeling import BudgetFormerForSequenceClassification, load_model
from budgetformer.training.pipeline import build_model, find_start, kept_tokenizer
from budgetformer.training.recipe import Recipe
from tests.support.stores import train
from tests.support.texts import topic_examples

PAPER = {
    "gating": "soft",
    "dense_epochs": 0,
    "distillation": 0.0,
    "head_selection": "input",
    "budget_scope": "layer",
    "budget_ffn": False,
    "embedding_exit": False,
}


def built(**recipe: Any) -> BudgetFormerForSequenceClassification:
    sizes = {"hidden_size": 16, "num_heads": 4, "intermediate_size": 16}
    return build_model(find_start(None), topic_examples(), Recipe(**sizes | recipe), 50)


def rows() -> list[dict[str, Any]]:
    examples = topic_examples()
    return [
        {"text": text, "label": examples.names[label]}
        for text, label in zip(examples.texts, examples.labels, strict=True)
    ]


def test_a_network_takes_the_bounds_of_its_recipe() -> None:
    assert built(budget_bounds=(0.1, 0.3)).config.budget_bounds == [0.1, 0.3]


@pytest.mark.parametrize("scope", ["input", "layer"])
def test_a_network_takes_the_fixed_share_of_its_recipe(scope: str) -> None:
    model = built(fixed_share=0.3, budget_scope=scope).eval()
    budget = model(torch.randint(1, 50, (5, 8))).budget
    torch.testing.assert_close(budget, torch.full_like(budget, 0.3))


@pytest.mark.parametrize("gating", ["soft", "hard"])
def test_a_fixed_share_is_served(tmp_path: Path, gating: str) -> None:
    # with hard gates f_o would be fitted after the training
    changes = {"fixed_share": 1.0, "gating": gating}
    train(tmp_path / "store/fixed/1", rows(), **PAPER | changes)
    classifier = Classifier(tmp_path / "store/fixed/1")
    heads = classifier.checkpoint.num_heads
    assert {p.budget for p in classifier(topic_examples().texts)} == {heads}
    tokens = torch.randint(1, 50, (5, 8))
    assert (load_model(classifier.checkpoint.path)(tokens).budget > 0.999).all()


def test_rows_are_limited(tmp_path: Path) -> None:
    train(tmp_path / "store/few/1", rows(), **PAPER | {"max_train_rows": 60, "hold_out": 0.5})
    assert read_checkpoint(tmp_path / "store/few/1").manifest.metrics["train_rows"] == 30


def test_no_checkpoint_draws_heads_at_random(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="random_heads"):
        train(tmp_path / "store/random/1", rows(), **PAPER | {"random_heads": True})


def test_a_run_that_goes_on_reads_its_own_tokenizer(tmp_path: Path) -> None:
    first = kept_tokenizer(topic_examples(), 150, tmp_path / "work")
    again = kept_tokenizer(topic_examples(), 150, tmp_path / "work")
    assert again.get_vocab() == first.get_vocab()
    kept = Tokenizer.from_file(str(tmp_path / "work" / "tokenizer.json"))
    assert kept.encode("The crew painted a tug.").ids == first.encode("The crew painted a tug.").ids
