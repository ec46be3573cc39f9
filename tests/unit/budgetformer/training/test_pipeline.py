"""Training from data to checkpoint: the recipe's effects, and checks before training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from budgetformer.checkpoint.store import read_checkpoint
from budgetformer.classifier import Classifier
from budgetformer.errors import DataError
from budgetformer.model.modeling import BudgetFormerForSequenceClassification, load_model
from budgetformer.training.pipeline import (
    build_model,
    find_start,
    label_names_of,
    saved_tokenizer,
    train_checkpoint,
)
from budgetformer.training.recipe import Recipe
from tests.support.stores import train, write_jsonl
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


def test_the_network_has_the_budget_bounds_of_the_recipe() -> None:
    assert built(budget_bounds=(0.1, 0.3)).config.budget_bounds == [0.1, 0.3]


@pytest.mark.parametrize("scope", ["input", "layer"])
def test_the_network_has_the_fixed_share_of_the_recipe(scope: str) -> None:
    model = built(fixed_share=0.3, budget_scope=scope).eval()
    budget = model(torch.randint(1, 50, (5, 8))).budget
    torch.testing.assert_close(budget, torch.full_like(budget, 0.3))


@pytest.mark.parametrize("gating", ["soft", "hard"])
def test_a_checkpoint_answers_with_its_fixed_share(tmp_path: Path, gating: str) -> None:
    # with hard gates, f_o is usually fitted after the training
    changes = {"fixed_share": 1.0, "gating": gating}
    train(tmp_path / "store/fixed/1", rows(), **PAPER | changes)
    classifier = Classifier(tmp_path / "store/fixed/1")
    heads = classifier.checkpoint.num_heads
    assert {p.budget for p in classifier(topic_examples().texts)} == {heads}
    tokens = torch.randint(1, 50, (5, 8))
    assert (load_model(classifier.checkpoint.path)(tokens).budget > 0.999).all()


def test_max_train_rows_limits_the_rows(tmp_path: Path) -> None:
    train(tmp_path / "store/few/1", rows(), **PAPER | {"max_train_rows": 60, "hold_out": 0.5})
    assert read_checkpoint(tmp_path / "store/few/1").manifest.metrics["train_rows"] == 30


def test_random_heads_are_refused_for_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="random_heads"):
        train(tmp_path / "store/random/1", rows(), **PAPER | {"random_heads": True})


def test_a_resumed_run_reads_its_saved_tokenizer(tmp_path: Path) -> None:
    first = saved_tokenizer(topic_examples(), 150, tmp_path / "work")
    second = saved_tokenizer(topic_examples(), 150, tmp_path / "work")
    assert second.get_vocab() == first.get_vocab()
    kept = Tokenizer.from_file(str(tmp_path / "work" / "tokenizer.json"))
    assert kept.encode("The crew painted a tug.").ids == first.encode("The crew painted a tug.").ids


class TestData:
    """Checks of the data before training."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        folder = tmp_path / "data"
        folder.mkdir()
        write_jsonl(folder / "train.jsonl", rows())
        return folder

    def refusal(self, data: Path) -> str:
        """Return the error, and check that training has not started."""
        lines: list[str] = []
        output, work = data.parent / "store/mine/1", data.parent / "work"
        with pytest.raises(DataError) as caught:
            train_checkpoint(
                data=data, output=output, start=None, recipe=Recipe(), work_dir=work,
                threads=1, log=lines.append,
            )  # fmt: skip
        assert not [line for line in lines if "texts to train on" in line]
        assert not output.exists()
        assert not work.exists()
        return str(caught.value)

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("test.csv", "text,label\na,garden\nb\n", "test.csv, row 2 (line 3): 1 field"),
            ("test.csv", "text,label\na,sailing\n", "test.csv, row 1: unknown label 'sailing'"),
            ("test.csv", "text,label\n", "test.csv: no rows"),
            ("test.csv", "text,topic\na,garden\n", "test.csv: no column 'label'"),
            ("test.csv", "text,text_pair,label\na,b,garden\n", "test.csv: has pairs"),
            ("test.jsonl", '{"text": "a", "label": ["garden"]}', "test.jsonl, row 1 (line 1)"),
            ("test.parquet", "PAR1", "test.parquet"),
            ("train.csv", "text,label\n", "both train.csv and train.jsonl"),
            ("labels.json", "{}", "labels.json"),
            ("labels.json", '["garden"]', "train.jsonl, row "),
        ],
    )
    def test_an_invalid_file_is_refused_before_training(
        self, folder: Path, name: str, content: str, message: str
    ) -> None:
        (folder / name).write_text(content)
        assert message in self.refusal(folder)

    @pytest.mark.parametrize(
        ("labels", "message"),
        [
            (["same"] * 60, "every row has the label 'same'"),
            ([f"id-{i}" for i in range(60)], "60 different labels in 60 rows"),
            ([*[0, 1] * 30, 10_000_000], "row 61: class id 10000000"),
            ([*["a", "b"] * 30, ""], "row 61 (line 61): the label is empty"),
            ([True, False] * 30, "row 1 (line 1): the label is a boolean"),
        ],
    )
    def test_unusable_labels_are_refused_before_training(
        self, folder: Path, labels: list[Any], message: str
    ) -> None:
        path = folder / "mine.jsonl"
        write_jsonl(path, [{"text": f"text {i}", "label": label} for i, label in enumerate(labels)])
        assert message in self.refusal(path)

    def test_a_folder_without_a_training_file_is_refused(self, tmp_path: Path) -> None:
        assert "not a file, nor a folder with train" in self.refusal(tmp_path / "data")


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({"id2label": {"1": "pos", "0": "neg"}}, ["neg", "pos"]),
        ({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}, None),
        ({"id2label": {"1": "pos", "2": "neg"}}, None),
        ({}, None),
        ([], None),
    ],
)
def test_label_names_of_a_fine_tuned_classifier(tmp_path: Path, config: Any, names: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert label_names_of(find_start(str(tmp_path))) == names
