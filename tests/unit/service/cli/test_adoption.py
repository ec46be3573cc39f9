"""Commands for a Transformers classifier: models add, import --texts, evaluate, recalibrate."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from budgetformer.adoption.budgets import add_budgets
from budgetformer.checkpoint.store import read_checkpoint, read_store
from budgetformer.training.recipe import Recipe
from tests.support.classifiers import save_classifier
from tests.support.command_line import CommandLine
from tests.support.stores import labelled_sentences, write_jsonl

RECIPE = """
hold_out = 0.4
max_length = 16
exit_weights = 1024
dense_epochs = 0
budget_epochs = 0
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_classifier(tmp_path_factory.mktemp("source") / "mine", num_hidden_layers=2)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = ({"text": text} for text, _ in labelled_sentences())
    return write_jsonl(tmp_path_factory.mktemp("texts") / "log.jsonl", rows)


@pytest.fixture(scope="module")
def imported(folder: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a store with a model made from a classifier and unlabelled texts."""
    root = tmp_path_factory.mktemp("imported")
    (root / "recipe.toml").write_text(RECIPE)
    add_budgets(
        classifier=folder,
        texts=texts,
        output=root / "store" / "mine" / "1",
        recipe=Recipe.read(root / "recipe.toml", ladder="importance"),
        work_dir=root / "work",
        threads=1,
        log=lambda _: None,
    )
    return root / "store"


class TestAdd:
    def test_a_classifier_is_added_once_under_the_name_of_its_folder(
        self, command: CommandLine, folder: Path, tmp_path: Path
    ) -> None:
        store = ("--model-store", tmp_path / "store", "--json")
        outcome = command("models", "add", folder, *store)
        assert outcome.code == 0, outcome.err
        added = json.loads(outcome.out)
        assert (added["name"], added["version"]) == ("mine", 1)
        assert read_checkpoint(Path(added["path"])).label == "mine:1"
        repeated = command("models", "add", folder, *store)
        assert json.loads(repeated.out) == added

    def test_name_and_texts_set_the_name_and_the_int8_ranges(
        self, command: CommandLine, folder: Path, texts: Path, tmp_path: Path
    ) -> None:
        outcome = command(
            *("models", "add", folder, "--name", "other", "--texts", texts),
            *("--model-store", tmp_path / "store"),
        )
        assert outcome.code == 0, outcome.err
        assert read_store(tmp_path / "store").latest("other").manifest.ranges

    def test_options_for_classifiers_are_refused_for_checkpoints(
        self, command: CommandLine, model_store: Path, tmp_path: Path
    ) -> None:
        source = model_store / "topics" / "1"
        outcome = command(
            *("models", "add", source, "--name", "x", "--model-store", tmp_path / "store")
        )
        assert "this is a checkpoint" in outcome.err
        assert outcome.code == 2


class TestImport:
    def test_unlabelled_texts_are_enough_for_budgets(
        self, command: CommandLine, folder: Path, texts: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "recipe.toml").write_text(RECIPE)
        out = tmp_path / "store" / "mine" / "1"
        outcome = command(
            *("import", folder, "--texts", texts, "--out", out, "--core-hour-price", 0.1),
            *("--recipe", tmp_path / "recipe.toml"),
        )
        assert outcome.code == 0, outcome.err
        for word in ("agreement", "ms/text", "a million", "All heads:", "balanced"):
            assert word in outcome.out
        timing = read_checkpoint(out).manifest.timing
        assert timing is not None
        assert timing.core_hour_price == 0.1

    def test_the_report_needs_no_labels(
        self, command: CommandLine, texts: Path, imported: Path, tmp_path: Path
    ) -> None:
        source = ("--model", "mine", "--model-store", imported)
        outcome = command("evaluate", "--data", texts, "--json", *source)
        rows = json.loads(outcome.out)
        assert [row["accuracy"] for row in rows] == [None] * 4
        assert rows[-1]["agreement"] == 1
        outcome = command("evaluate", "--data", texts, "--report", tmp_path / "report", *source)
        assert outcome.code == 0, outcome.err
        page = (tmp_path / "report" / "levels.md").read_text()
        assert "cost of a million" in page
        assert (tmp_path / "report" / "levels.png").read_bytes().startswith(b"\x89PNG")

    def test_recalibrate_makes_the_next_version_with_the_same_weights(
        self, command: CommandLine, texts: Path, imported: Path, tmp_path: Path
    ) -> None:
        store = shutil.copytree(imported, tmp_path / "store")
        outcome = command("recalibrate", "mine", "--texts", texts, "--model-store", store)
        assert outcome.code == 0, outcome.err
        before, after = (read_checkpoint(store / "mine" / version) for version in ("1", "2"))
        assert after.manifest.measure == "agreement"
        weights = "model.safetensors"
        assert after.manifest.files[weights] == before.manifest.files[weights]
        assert before.manifest.timing is not None
        assert after.manifest.timing is not None
        assert (
            after.manifest.timing.milliseconds.keys() == before.manifest.timing.milliseconds.keys()
        )
        assert after.manifest.timing.milliseconds != before.manifest.timing.milliseconds
        after.verify()

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            ((), "give either --data (labelled texts) or --texts"),
            (("--texts", "a.jsonl", "--data", "b.jsonl"), "give either --data (labelled texts) or"),
            (("--texts", "a.jsonl", "--effort", "days"), "'days' is not one of"),
        ],
    )
    def test_conflicting_options_are_refused(
        self,
        command: CommandLine,
        folder: Path,
        tmp_path: Path,
        more: tuple[str, ...],
        message: str,
    ) -> None:
        outcome = command("import", folder, "--out", tmp_path / "store" / "mine" / "1", *more)
        assert outcome.code == 2
        assert message in " ".join(outcome.err.replace("│", " ").split())
