"""`import` makes a checkpoint with the answers of the encoder, or refuses it before any work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
)

from budgetformer.checkpoint.store import read_checkpoint
from budgetformer.classifier import Classifier
from budgetformer.errors import BudgetFormerError, DataError, TrainingError
from budgetformer.model.modeling import silence_transformers
from budgetformer.training.pipeline import train_checkpoint
from budgetformer.training.recipe import Recipe
from tests.support.stores import sentences, single_label_rows, write_jsonl
from tests.support.texts import tokenizer_for

QUICK: dict[str, Any] = {
    "dense_epochs": 0,
    "budget_epochs": 1,
    "learning_rate": 1e-8,
    "exit_folds": 2,
    "exit_weights": 300,
    "hold_out": 0.3,
    "max_length": 64,
}
PAIR_ROWS = [
    {"text": a, "text_pair": b, "label": label}
    for a, same, other in zip(*map(sentences, ("animals", "animals", "music")), strict=True)
    for b, label in ((same, "same"), (other, "other"))
]


def tokenizer() -> Tokenizer:
    made = tokenizer_for(sentences("animals") + sentences("music") + sentences("weather"))
    made.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return made


def save_bert(folder: Path, **changes: Any) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 16, "max_position_embeddings": 64}
    sizes |= {"vocab_size": tokenizer().get_vocab_size()}
    with silence_transformers():
        BertForSequenceClassification(BertConfig(**sizes | changes)).save_pretrained(folder)
    tokenizer().save(str(folder / "tokenizer.json"))


def save_distilbert(folder: Path) -> None:
    torch.manual_seed(0)
    sizes = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 16}
    sizes |= {"vocab_size": tokenizer().get_vocab_size(), "max_position_embeddings": 16}
    with silence_transformers():
        DistilBertForSequenceClassification(DistilBertConfig(**sizes)).save_pretrained(folder)
    tokenizer().save(str(folder / "tokenizer.json"))


def import_encoder(
    tmp_path: Path, rows: list[dict[str, Any]], work_dir: Path | None = None, **recipe: Any
) -> tuple[Path, list[str]]:
    """Import `tmp_path/encoder`, and return the checkpoint and the log."""
    lines: list[str] = []
    output = tmp_path / "store" / "made" / "1"
    train_checkpoint(
        data=write_jsonl(tmp_path / "train.jsonl", rows),
        output=output,
        start=str(tmp_path / "encoder"),
        recipe=Recipe(**QUICK | recipe),
        work_dir=work_dir or tmp_path / "work",
        threads=1,
        log=lines.append,
    )
    return output, lines


def test_long_pairs_work_with_an_encoder_without_token_types(tmp_path: Path) -> None:
    save_distilbert(tmp_path / "encoder")
    output, lines = import_encoder(tmp_path, PAIR_ROWS)
    assert "texts are truncated to the encoder's 16 positions" in lines
    manifest = read_checkpoint(output).manifest
    assert manifest.max_tokens == 16
    assert manifest.metrics["conversion_difference"] < 1e-4
    long = ("otter " * 50, "cellist " * 50)
    assert Classifier(output)([long])[0].label in ("same", "other")


def test_a_classifier_keeps_its_answers_if_its_labels_are_in_another_order(tmp_path: Path) -> None:
    """The learning rate is so small that training changes nothing."""
    names = ["weather", "animals", "music"]
    labels = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    save_bert(tmp_path / "encoder", initializer_range=0.5, **labels)
    output, _ = import_encoder(tmp_path, single_label_rows(), embedding_exit=False)
    source = BertForSequenceClassification.from_pretrained(tmp_path / "encoder").eval()
    texts = [str(row["text"]) for row in single_label_rows()]
    classifier = Classifier(output)
    answers = [p.label for p in classifier(texts, heads=2)]
    encode = tokenizer().encode
    with torch.no_grad():
        rows = [source(torch.tensor([encode(t).ids])).logits.argmax().item() for t in texts]
    assert np.mean([a == names[int(r)] for a, r in zip(answers, rows, strict=True)]) > 0.95
    assert len(set(answers)) > 1


def add_token(folder: Path) -> None:
    made = tokenizer()
    made.add_tokens(["extraordinary"])
    made.save(str(folder / "tokenizer.json"))


def use_third_token_type(folder: Path) -> None:
    made = tokenizer()
    made.post_processor = TemplateProcessing(single="$A", pair="$A $B:2", special_tokens=[])
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


def set_weight_to_nan(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


ONE_LABEL = [row | {"label": "same"} for row in single_label_rows()]


@pytest.mark.parametrize(
    ("damage", "rows", "message"),
    [
        (add_token, None, "token ids up to"),
        (use_third_token_type, None, "token types up to 2"),
        (lambda f: (f / "tokenizer.json").unlink(), None, "no tokenizer files"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), None, "cannot load its tokenizer"),
        (set_weight_to_nan, None, "not finite"),
        (Path.exists, ONE_LABEL, "training requires at least two labels"),
    ],
)
def test_unusable_input_is_refused_before_any_file_is_written(
    tmp_path: Path,
    damage: Callable[[Path], object],
    rows: list[dict[str, Any]] | None,
    message: str,
) -> None:
    save_bert(tmp_path / "encoder")
    damage(tmp_path / "encoder")
    with pytest.raises(BudgetFormerError, match=message) as caught:
        import_encoder(tmp_path, rows or single_label_rows())
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "work").exists()
    assert not (tmp_path / "store").exists()


class TestWorkFolder:
    @pytest.fixture
    def interrupted(self, tmp_path: Path) -> Path:
        """Return the folder of a run that ended after its first stage."""
        save_bert(tmp_path / "encoder")
        # A file in place of the store's folder makes writing the checkpoint fail.
        (tmp_path / "store").touch()
        with pytest.raises(BudgetFormerError):
            import_encoder(tmp_path, single_label_rows())
        (tmp_path / "store").unlink()
        assert (tmp_path / "work" / "state.pt").is_file()
        return tmp_path

    def test_the_same_run_resumes_and_cleans_up(self, interrupted: Path) -> None:
        (interrupted / "work" / "mine.txt").write_text("not the run's")
        output, _ = import_encoder(interrupted, single_label_rows())
        assert output.is_dir()
        assert [p.name for p in (interrupted / "work").iterdir()] == ["mine.txt"]

    @pytest.mark.parametrize("change", ["recipe", "data", "labels", "encoder"])
    def test_another_run_is_refused(self, interrupted: Path, change: str) -> None:
        rows, recipe = single_label_rows(), {}
        if change == "recipe":
            recipe = {"learning_rate": 1e-7}
        elif change == "data":
            rows = [row | {"text": f"again {row['text']}"} for row in rows]
        elif change == "labels":
            other = {"animals": "music", "music": "animals", "weather": "weather"}
            rows = [row | {"label": other[row["label"]]} for row in rows]
        else:
            save_bert(interrupted / "encoder", initializer_range=0.1)
        with pytest.raises(TrainingError, match="another recipe, data or encoder"):
            import_encoder(interrupted, rows, **recipe)

    def test_a_damaged_state_is_refused(self, interrupted: Path) -> None:
        (interrupted / "work" / "state.pt").write_bytes(b"half")
        with pytest.raises(TrainingError, match=r"state\.pt: damaged"):
            import_encoder(interrupted, single_label_rows())


def test_a_loss_of_nan_ends_the_run(tmp_path: Path) -> None:
    save_bert(tmp_path / "encoder")
    with pytest.raises(TrainingError, match="learning_rate"):
        import_encoder(tmp_path, single_label_rows(), learning_rate=1e30, budget_epochs=4)
    assert not (tmp_path / "store").exists()


def test_a_max_length_too_small_for_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="max_length"):
        import_encoder(tmp_path, single_label_rows(), max_length=2)


def test_too_few_rows_are_refused(tmp_path: Path) -> None:
    save_bert(tmp_path / "encoder")
    with pytest.raises(DataError, match="requires at least . rows per label"):
        import_encoder(tmp_path, single_label_rows()[:3])
