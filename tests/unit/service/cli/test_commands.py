"""Commands of the command line: their results, files and one-line errors."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import budgetformer
from budgetformer.checkpoint.store import read_checkpoint
from budgetformer.classifier import Classifier
from budgetformer.cost.table import CostTable, StepCost
from budgetformer.experiments import baselines
from tests.support.command_line import CommandLine, Outcome
from tests.support.processes import clean_environment
from tests.support.stores import (
    CHAIN,
    CHAINED,
    LABELS,
    PAIRS,
    TOPICS,
    labelled_sentences,
    sentences,
    single_label_rows,
    train,
    write_jsonl,
)

TEXTS = [sentences(label)[3] for label in LABELS]


def lines(outcome: Outcome) -> list[dict[str, Any]]:
    assert outcome.code == 0, outcome
    return [json.loads(line) for line in outcome.out.splitlines()]


@pytest.fixture
def copied_store(model_store: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_store, tmp_path / "store"))


def test_version_prints_the_version(command: CommandLine) -> None:
    assert command("version").out == f"{budgetformer.__version__}\n"


def test_without_a_command_the_commands_are_listed(command: CommandLine) -> None:
    outcome = command()
    for name in ("serve", "classify", "train", "evaluate", "models", "version"):
        assert name in outcome.out + outcome.err


@pytest.mark.parametrize("arguments", [["nonsense"], ["models", "nonsense"], ["version", "--x"]])
def test_unknown_commands_and_options_end_with_code_2(
    command: CommandLine, arguments: list[str]
) -> None:
    assert command(*arguments).code == 2


class TestModels:
    def test_list_shows_every_version(self, command: CommandLine, model_store: Path) -> None:
        outcome = command("models", "list", "--model-store", model_store)
        assert outcome.code == 0
        for word in ("topics", "tags", "pairs", "picky", "balanced", "2 x 4"):
            assert word in outcome.out

    def test_list_as_json(self, command: CommandLine, model_store: Path) -> None:
        outcome = command("models", "list", "--json", "--model-store", model_store)
        assert json.loads(outcome.out) == {
            "chained": [1],
            "pairs": [1],
            "picky": [1],
            "tags": [1],
            "topics": [1, 2],
        }

    def test_list_of_an_empty_store(self, command: CommandLine, tmp_path: Path) -> None:
        assert json.loads(command("models", "list", "--json", "--model-store", tmp_path).out) == {}

    def test_list_reports_broken_models_and_lists_the_others(
        self, command: CommandLine, copied_store: Path
    ) -> None:
        broken = copied_store / TOPICS / "2" / "manifest.json"
        broken.write_text("{")
        outcome = command("models", "list", "--json", "--model-store", copied_store)
        assert outcome.code == 1
        assert json.loads(outcome.out)["topics"] == [1]
        (complaint,) = outcome.err.splitlines()
        assert complaint.startswith(f"{broken}: ")

    @pytest.mark.parametrize(("name", "version"), [("topics", 2), ("topics:1", 1), ("tags", 1)])
    def test_show_prints_the_manifest(
        self, command: CommandLine, model_store: Path, name: str, version: int
    ) -> None:
        manifest = json.loads(command("models", "show", name, "--model-store", model_store).out)
        assert manifest["name"] == name.partition(":")[0]
        assert manifest["version"] == version
        assert manifest["policy"] or manifest["operating_points"]

    def test_show_prints_the_policy_of_a_chain(
        self, command: CommandLine, model_store: Path
    ) -> None:
        manifest = json.loads(command("models", "show", CHAINED, "--model-store", model_store).out)
        policy = manifest["policy"]
        assert (policy["measure"], policy["chain"]) == ("agreement", list(CHAIN))
        for level in policy["levels"]:
            assert {"threshold", "agreement", "agreement_interval", "macs_interval"} <= set(level)
            assert sum(level["budgets"].values()) == pytest.approx(1)

    @pytest.mark.parametrize("name", ["nothing", "topics:9"])
    def test_show_of_a_missing_model_is_one_line(
        self, command: CommandLine, model_store: Path, name: str
    ) -> None:
        line = command("models", "show", name, "--model-store", model_store).complaint()
        assert name.partition(":")[0] in line

    def test_verify_checks_every_version(self, command: CommandLine, model_store: Path) -> None:
        outcome = command("models", "verify", "--model-store", model_store)
        assert outcome.code == 0
        assert [line.partition(": ")[0] for line in outcome.out.splitlines()] == [
            "chained:1",
            "pairs:1",
            "picky:1",
            "tags:1",
            "topics:1",
            "topics:2",
        ]

    def test_verify_checks_one_version(self, command: CommandLine, model_store: Path) -> None:
        outcome = command("models", "verify", "topics:1", "--model-store", model_store)
        assert outcome.out.startswith("topics:1: ")

    def test_verify_checks_a_folder(self, command: CommandLine, model_store: Path) -> None:
        assert command("models", "verify", model_store / TOPICS / "1").code == 0

    def test_verify_names_the_damaged_file(self, command: CommandLine, copied_store: Path) -> None:
        damaged = copied_store / TOPICS / "1" / "model.safetensors"
        damaged.write_bytes(damaged.read_bytes()[:-1])
        outcome = command("models", "verify", "topics:1", "--model-store", copied_store)
        assert str(damaged) in outcome.complaint()

    def test_verify_continues_after_a_damaged_model(
        self, command: CommandLine, copied_store: Path
    ) -> None:
        (copied_store / PAIRS / "1" / "tokenizer.json").unlink()
        outcome = command("models", "verify", "--model-store", copied_store)
        assert outcome.code != 0
        assert "tokenizer.json: missing" in outcome.err
        assert "topics:2" in outcome.out


class TestClassify:
    def test_texts_may_be_arguments(self, command: CommandLine, model_store: Path) -> None:
        outcome = command("classify", *TEXTS, "--model", TOPICS, "--model-store", model_store)
        answers = lines(outcome)
        assert [answer["text"] for answer in answers] == TEXTS
        for answer in answers:
            assert answer["label"] in LABELS
            assert answer["score"] == max(answer["probs"])
            assert sum(answer["probs"]) == pytest.approx(1)

    def test_texts_may_be_lines_of_stdin(self, command: CommandLine, model_store: Path) -> None:
        stdin = "\n".join(TEXTS) + "\n"
        outcome = command("classify", "--model", TOPICS, "--model-store", model_store, stdin=stdin)
        assert [answer["text"] for answer in lines(outcome)] == TEXTS

    @pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
    def test_texts_may_be_in_a_file(
        self, command: CommandLine, model_store: Path, tmp_path: Path, kind: str
    ) -> None:
        path = tmp_path / f"texts.{kind}"
        if kind == "csv":
            path.write_text("".join(f'"{text}"\n' for text in ["text", *TEXTS]))
        elif kind == "jsonl":
            write_jsonl(path, [{"text": text} for text in TEXTS])
        else:
            pyarrow = pytest.importorskip("pyarrow")
            parquet = pytest.importorskip("pyarrow.parquet")
            parquet.write_table(pyarrow.table({"text": TEXTS}), path)
        outcome = command(
            "classify", "--file", path, "--model", TOPICS, "--model-store", model_store
        )
        assert [answer["text"] for answer in lines(outcome)] == TEXTS

    def test_a_file_may_have_pairs(
        self, command: CommandLine, model_store: Path, tmp_path: Path
    ) -> None:
        rows = [{"text": TEXTS[0], "text_pair": TEXTS[1]}]
        path = write_jsonl(tmp_path / "pairs.jsonl", rows)
        outcome = command(
            "classify", "--file", path, "--model", PAIRS, "--model-store", model_store
        )
        (answer,) = lines(outcome)
        assert answer["label"] in ("same", "other")

    def test_empty_stdin_gives_no_answers(self, command: CommandLine, model_store: Path) -> None:
        assert lines(command("classify", "--model", TOPICS, "--model-store", model_store)) == []

    def test_the_highest_version_is_the_default(
        self, command: CommandLine, model_store: Path
    ) -> None:
        probs = {
            name: lines(
                command("classify", TEXTS[0], "--model", name, "--model-store", model_store)
            )[0]["probs"]
            for name in ("topics", "topics:1", "topics:2")
        }
        assert probs["topics"] == probs["topics:2"] != probs["topics:1"]

    @pytest.mark.parametrize("quality", ["fast", "balanced", "best", "1.5"])
    def test_answers_equal_those_of_the_library(
        self, command: CommandLine, model_store: Path, quality: str
    ) -> None:
        level = 1.5 if quality == "1.5" else quality
        expected = Classifier(model_store / TOPICS)(TEXTS, quality=level)
        outcome = command(
            "classify",
            *TEXTS,
            "--model",
            TOPICS,
            "--quality",
            quality,
            "--model-store",
            model_store,
        )
        assert [(a["label"], a["budget"], a["macs"]) for a in lines(outcome)] == [
            (p.label, p.budget, p.macs) for p in expected
        ]

    @pytest.mark.parametrize("heads", [0, 1, 4])
    def test_heads_sets_a_fixed_budget(
        self, command: CommandLine, model_store: Path, heads: int
    ) -> None:
        outcome = command(
            "classify", TEXTS[0], "--model", TOPICS, "--heads", heads, "--model-store", model_store
        )
        assert [answer["budget"] for answer in lines(outcome)] == [heads]

    @pytest.mark.parametrize(
        ("arguments", "code", "word"),
        [
            (["text", "--quality", "superb"], 2, "superb"),
            (["text", "--heads", "5"], 2, "heads"),
            (["text", "--heads", "-1"], 2, "heads"),
            (["text", "--model", "nothing"], 1, "nothing"),
            (["--file", "nowhere.csv"], 1, "nowhere.csv"),
            (["text", "--output", "answers.xlsx"], 1, "answers.xlsx"),
            (["text", "--output", "nowhere/answers.csv"], 1, "nowhere"),
        ],
    )
    def test_an_invalid_request_is_one_line(
        self, command: CommandLine, model_store: Path, arguments: list[str], code: int, word: str
    ) -> None:
        outcome = command("classify", *arguments, "--model-store", model_store)
        assert word in outcome.complaint(code)

    def test_an_empty_store_is_one_line(self, command: CommandLine, tmp_path: Path) -> None:
        command("classify", "text", "--model-store", tmp_path).complaint()


class TestClassifyToAFile:
    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        return write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])

    def classify(
        self, command: CommandLine, store: Path, source: Path, output: Path, *more: str
    ) -> Outcome:
        return command(
            "classify", "--file", source, "--output", output, "--model", TOPICS,
            "--model-store", store, *more,
        )  # fmt: skip

    def test_a_summary_is_printed(
        self, command: CommandLine, model_store: Path, source: Path, tmp_path: Path
    ) -> None:
        outcome = self.classify(command, model_store, source, tmp_path / "a.jsonl", "--json")
        assert (outcome.code, outcome.err) == (0, "")
        summary = json.loads(outcome.out)
        assert (summary["rows"], summary["rows_resumed"]) == (len(TEXTS), 0)
        assert summary["labels"] == dict.fromkeys(LABELS, 1)
        written = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
        assert [row["text"] for row in written] == TEXTS
        assert summary["mean_heads"] == pytest.approx(sum(r["heads"] for r in written) / len(TEXTS))
        shown = self.classify(command, model_store, source, tmp_path / "b.csv")
        assert "rows" in shown.out
        assert (tmp_path / "b.csv").is_file()
        assert "\x1b" not in shown.out

    def test_an_existing_output_is_an_error_or_with_resume_kept(
        self, command: CommandLine, model_store: Path, source: Path, tmp_path: Path
    ) -> None:
        output = tmp_path / "a.csv"
        assert self.classify(command, model_store, source, output).code == 0
        before = output.read_bytes()
        assert "exists" in self.classify(command, model_store, source, output).complaint()
        outcome = self.classify(command, model_store, source, output, "--resume")
        assert (outcome.code, outcome.out) == (0, "")
        assert "nothing is left" in outcome.err
        assert output.read_bytes() == before

    def test_a_run_resumes_after_a_bad_row_was_corrected(
        self, command: CommandLine, model_store: Path, source: Path, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        monkeypatch.setattr("budgetformer.bulk.run.CHUNK_ROWS", 1)
        valid = source.read_text()
        source.write_text(valid.replace(TEXTS[2], 'now" "what'))
        output = tmp_path / "a.jsonl"
        more = ("--workers", "1", "--json", "--resume")
        line = self.classify(command, model_store, source, output, *more).complaint()
        assert "row 3" in line
        assert not output.exists()
        source.write_text(valid)
        summary = json.loads(self.classify(command, model_store, source, output, *more).out)
        assert summary["rows"] == len(TEXTS)
        assert summary["rows_resumed"] > 0
        written = [json.loads(line) for line in output.read_text().splitlines()]
        assert [row["text"] for row in written] == TEXTS

    def test_an_empty_file_gives_a_header_alone(
        self, command: CommandLine, model_store: Path, tmp_path: Path
    ) -> None:
        source = write_jsonl(tmp_path / "none.jsonl", [])
        outcome = self.classify(command, model_store, source, tmp_path / "a.csv", "--json")
        assert json.loads(outcome.out)["rows"] == 0
        assert (tmp_path / "a.csv").read_text().startswith("text,label,score,")

    @pytest.mark.parametrize("options", [["--resume"], ["text", "--file", "x.csv"]])
    def test_conflicting_options_are_refused(
        self, command: CommandLine, options: list[str]
    ) -> None:
        assert command("classify", *options).code == 2


class TestAdd:
    def test_adding_a_folder_twice_makes_two_versions(
        self, command: CommandLine, model_store: Path, tmp_path: Path
    ) -> None:
        add = ("models", "add", model_store / TOPICS / "1", "--model-store", tmp_path / "new")
        assert "topics:1" in command(*add).out
        added = json.loads(command(*add, "--json").out)
        assert (added["name"], added["version"]) == (TOPICS, 2)
        listed = command("models", "list", "--json", "--model-store", tmp_path / "new")
        assert json.loads(listed.out) == {TOPICS: [1, 2]}

    def test_a_missing_source_is_one_line(self, command: CommandLine, tmp_path: Path) -> None:
        line = command(
            "models", "add", tmp_path / "none.zip", "--model-store", tmp_path
        ).complaint()
        assert "none.zip" in line


def complete(line: str, cwd: Path) -> list[str]:
    """Return the completions that bash is offered for a line."""
    words = line.split(" ")
    done = subprocess.run(
        [sys.executable, "-c", "import sys; sys.argv[0] = 'budgetformer'; "
         "from service.cli import main; main()"],
        env=clean_environment() | {
            "_BUDGETFORMER_COMPLETE": "complete_bash",
            "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1),
        },
        capture_output=True, text=True, cwd=cwd, check=False, timeout=60,
    )  # fmt: skip
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("budgetformer ev", ["evaluate"]),
        ("budgetformer models v", ["verify"]),
        ("budgetformer serve --engi", ["--engines"]),
        ("budgetformer doctor --js", ["--json"]),
        ("budgetformer classify --model to", ["topics", "topics:1", "topics:2"]),
        ("budgetformer models show pa", ["pairs", "pairs:1"]),
    ],
)
def test_bash_completes_commands_options_and_models(
    model_store: Path, line: str, offered: list[str]
) -> None:
    assert model_store.name == "store"
    (model_store.parent / "model_store").is_symlink() or (
        model_store.parent / "model_store"
    ).symlink_to(model_store)
    assert complete(line, model_store.parent) == offered


class TestEvaluate:
    def test_reports_every_level_and_the_full_budget(
        self, command: CommandLine, model_store: Path, tmp_path: Path
    ) -> None:
        data = write_jsonl(tmp_path / "test.jsonl", single_label_rows())
        outcome = command(
            "evaluate",
            "--data",
            data,
            "--model",
            "topics:1",
            "--json",
            "--model-store",
            model_store,
        )
        assert outcome.code == 0
        rows = json.loads(outcome.out)
        assert [row["quality"] for row in rows] == ["fast", "balanced", "best", "full budget"]
        for row in rows:
            assert row["rows"] == len(labelled_sentences())
            assert 0 <= row["low"] <= row["accuracy"] <= row["high"] + 1e-9 <= 1 + 1e-9
            assert sum(row["budgets"].values()) == pytest.approx(1)
        assert rows[0]["budgets"] == {"0": 1.0}
        assert rows[-1]["budgets"] == {"4": 1.0}
        assert rows[-1]["accuracy"] > 0.9
        assert rows[0]["macs_share"] < rows[1]["macs_share"] < rows[-1]["macs_share"]

    def test_a_report_compares_with_dense_networks_trained_on_the_same_texts(
        self, command: CommandLine, tmp_path: Path
    ) -> None:
        data = write_jsonl(tmp_path / "rows.jsonl", single_label_rows())
        recipe = tmp_path / "recipe.toml"
        recipe.write_text(
            "hidden_size = 16\nnum_heads = 2\nintermediate_size = 16\nvocab_size = 200\n"
            'max_length = 12\ntruncation_side = "left"\nbudget_epochs = 1\n'
            'exit_weights = 300\nladder = "importance"\nlevel_costs = [0.3, 0.6]\n'
        )
        made, dense = tmp_path / "store" / "mine" / "1", tmp_path / "dense"
        outcome = command(
            "train", "--data", data, "--recipe", recipe, "--out", made, "--threads", 1
        )
        assert outcome.code == 0, outcome.err
        manifest = read_checkpoint(made).manifest
        assert (manifest.max_tokens, manifest.truncation_side) == (12, "left")
        named = {name: level.macs_share for name, level in manifest.named_levels.items()}
        assert named["fast"] <= 0.3
        assert named["balanced"] <= 0.6
        arguments = ["--data", data, "--recipe", recipe, "--out", dense]
        assert baselines.main([str(word) for word in arguments]) == 0
        assert not list(tmp_path.glob(".dense*"))
        report = tmp_path / "report"
        outcome = command(
            "evaluate", "--data", data, "--model", made, "--report", report, "--baseline", dense,
            "--limit", 60,
        )  # fmt: skip
        assert outcome.code == 0, outcome.err
        assert "60 test texts" in outcome.out
        written = json.loads((report / "report.json").read_text())
        assert {way["rows"] for way in written["ways"]} == {60}
        assert {c["baseline"] for c in written["comparisons"]} <= {
            "fixed step", "early exit", "confidence cascade", "step 0, then dense", "smaller dense",
            "step 0, then smaller dense",
        }  # fmt: skip
        assert "dense" in {way["name"] for way in written["ways"]}
        curves = {curve["name"]: curve for curve in written["curves"]}
        assert {"early exit", "step 0, then dense"} <= curves.keys()
        costs = curves["step 0, then dense"]["cost"]
        assert (min(costs), max(costs) <= 1) == (0, True)
        # The baseline was trained without step 0, unlike the dense network of the checkpoint.
        assert not baselines.read_baseline(dense).model.config.embedding_exit
        assert not [path for path in made.parent.iterdir() if path != made]

    def test_labels_unknown_to_the_model_are_one_line(
        self, command: CommandLine, model_store: Path, tmp_path: Path
    ) -> None:
        data = write_jsonl(tmp_path / "test.jsonl", [{"text": "a", "label": "cooking"}])
        outcome = command(
            "evaluate", "--data", data, "--model", TOPICS, "--model-store", model_store
        )
        assert "cooking" in outcome.complaint()

    def test_missing_data_is_one_line(
        self, command: CommandLine, model_store: Path, tmp_path: Path
    ) -> None:
        outcome = command(
            "evaluate", "--data", tmp_path / "none.csv", "--model", TOPICS,
            "--model-store", model_store,
        )  # fmt: skip
        assert "none.csv" in outcome.complaint()

    def test_an_unreachable_server_is_one_line(
        self, command: CommandLine, model_store: Path, tmp_path: Path
    ) -> None:
        data = write_jsonl(tmp_path / "test.jsonl", single_label_rows()[:3])
        outcome = command(
            "evaluate", "--data", data, "--model", TOPICS, "--url", "http://127.0.0.1:9",
            "--model-store", model_store,
        )  # fmt: skip
        assert "127.0.0.1:9" in outcome.complaint()


class TestTables:
    """Every command refuses an invalid table with the same line."""

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("rows.csv", "text,label\na,music\nb\n", ", row 2 (line 3): 1 field, the header has 2"),
            ("rows.csv", "text,text,label\na,b,music\n", ": more than one column 'text'"),
            ("rows.jsonl", '{"text": 1, "label": "a"}',
             ", row 1 (line 1): column 'text' holds an integer, not a string"),
        ],
    )  # fmt: skip
    def test_every_command_refuses_an_invalid_table(
        self,
        command: CommandLine,
        model_store: Path,
        tmp_path: Path,
        name: str,
        content: str,
        message: str,
    ) -> None:
        path = tmp_path / name
        path.write_text(content)
        model = ("--model", TOPICS, "--model-store", model_store)
        out = ("--out", tmp_path / "store" / "new" / "1")
        encoder = tmp_path / "encoder"
        encoder.mkdir()
        for arguments in (
            ("classify", "--file", path, *model),
            ("evaluate", "--data", path, *model),
            ("calibrate", "--data", path, *out, *model),
            ("train", "--data", path, *out),
            ("import", encoder, "--data", path, *out),
            ("bench", "agreement", "--data", path, *model),
        ):
            assert f"{name}{message}" in command(*arguments).complaint()
        assert not (tmp_path / "store").exists()

    def test_evaluate_accepts_a_folder_with_a_test_file(
        self, command: CommandLine, model_store: Path, tmp_path: Path
    ) -> None:
        model = ("--model", TOPICS, "--model-store", model_store)
        outcome = command("classify", "--file", tmp_path, *model)
        assert f"{tmp_path}: a folder; name a" in outcome.complaint()
        assert (
            "the folder has no test.parquet"
            in command("evaluate", "--data", tmp_path, *model).complaint()
        )
        write_jsonl(tmp_path / "test.jsonl", single_label_rows()[:4])
        outcome = command("evaluate", "--data", tmp_path, "--json", *model)
        assert {row["rows"] for row in json.loads(outcome.out)} == {4}


class TestCalibrate:
    def test_calibrate_makes_new_levels_with_the_same_weights(
        self, command: CommandLine, model_store: Path, tmp_path: Path
    ) -> None:
        data = write_jsonl(tmp_path / "mine.jsonl", single_label_rows())
        made = tmp_path / "store" / "mine" / "3"
        source = ("--model", "topics:1", "--model-store", model_store)
        outcome = command("calibrate", "--data", data, "--out", made, *source)
        assert outcome.code == 0
        before, after = read_checkpoint(model_store / "topics" / "1"), read_checkpoint(made)
        after.verify()
        assert after.label == "mine:3"
        assert len(after.manifest.ranges) == after.num_layers
        assert after.manifest.metrics["calibration_rows"] == len(labelled_sentences())
        assert list(after.manifest.named_levels) == ["fast", "balanced", "best"]
        for level in after.manifest.levels:
            accuracy, (low, high) = level.reached("accuracy")
            assert low - 1e-9 <= accuracy <= high + 1e-9
        weights = "model.safetensors"
        assert after.manifest.files[weights] == before.manifest.files[weights]

    def test_calibrating_for_agreement_needs_no_labels(
        self, command: CommandLine, model_store: Path, tmp_path: Path
    ) -> None:
        texts = [{"text": row["text"]} for row in single_label_rows()]
        data = write_jsonl(tmp_path / "mine.jsonl", texts)
        made = tmp_path / "store" / "mine" / "3"
        source = ("--model", "topics:1", "--model-store", model_store)
        outcome = command("calibrate", "--data", data, "--out", made, *source)
        assert "no column 'label'" in outcome.complaint()
        outcome = command(
            "calibrate", "--data", data, "--out", made, "--measure", "agreement", *source
        )
        assert outcome.code == 0, outcome.err
        checkpoint = read_checkpoint(made)
        assert checkpoint.manifest.measure == "agreement"
        assert all(level.accuracy is None for level in checkpoint.manifest.levels)
        assert checkpoint.manifest.frontier[-1].agreement == 1.0
        card = (made / "README.md").read_text()
        assert "Calibrated for agreement" in card
        assert "answers that equal those of the full network" in card
        labelled = write_jsonl(tmp_path / "test.jsonl", single_label_rows())
        outcome = command("evaluate", "--data", labelled, "--model", made, "--json")
        rows = {row["quality"]: row for row in json.loads(outcome.out)}
        assert rows["full budget"]["agreement"] == 1.0
        assert rows["balanced"]["agreement"] >= 0.95
        assert sum(row["cheaper"] for row in rows.values()) == 0

    def test_networks_whose_layers_decide_cannot_be_calibrated_for_agreement(
        self, command: CommandLine, tmp_path: Path
    ) -> None:
        made = tmp_path / "store" / "layers" / "1"
        train(made, single_label_rows(), budget_scope="layer", embedding_exit=False)
        data = write_jsonl(tmp_path / "mine.jsonl", single_label_rows())
        outcome = command(
            "calibrate", "--data", data, "--out", tmp_path / "layers" / "2", "--model", made,
            "--measure", "agreement",
        )  # fmt: skip
        assert "cannot be calibrated for agreement" in outcome.complaint()

    def test_a_cost_table_of_another_model_is_refused(
        self, command: CommandLine, model_store: Path, tmp_path: Path
    ) -> None:
        data = write_jsonl(tmp_path / "mine.jsonl", single_label_rows())
        source = ("--model", "topics:1", "--model-store", model_store)
        made = ("--data", data, "--out", tmp_path / "store" / "mine" / "3")
        steps = (StepCost(0.0, 1e-6, 1e-5),) * 3
        for label, complaint in (("other:1", "no table of topics:1"), ("topics:1", "steps")):
            table = tmp_path / "costs.json"
            table.write_text(CostTable(label, "cpu", "float32", steps).dump())
            outcome = command("calibrate", *made, *source, "--cost-tables", table)
            assert complaint in outcome.complaint()

    def test_a_cost_table_replaces_multiply_adds_by_seconds(
        self, command: CommandLine, model_store: Path, tmp_path: Path
    ) -> None:
        data = write_jsonl(tmp_path / "mine.jsonl", single_label_rows())
        source = ("--model", "topics:1", "--model-store", model_store)
        made = tmp_path / "store" / "mine" / "3"
        steps = (StepCost(0.0, 0.0, 1e-6), *(StepCost(0.0, 0.0, 1e-3),) * 4)
        table = tmp_path / "costs.json"
        table.write_text(CostTable("topics:1", "cpu", "float32", steps).dump())
        outcome = command(
            "calibrate", "--data", data, "--out", made, *source, "--cost-tables", table
        )
        assert outcome.code == 0, outcome.err
        policy = read_checkpoint(made).manifest.policy
        assert policy is not None
        assert len(policy.chain) <= 2  # all passes take equally long, so a second never pays

    def test_an_existing_version_is_not_overwritten(
        self, command: CommandLine, model_store: Path, tmp_path: Path
    ) -> None:
        data = write_jsonl(tmp_path / "mine.jsonl", single_label_rows())
        source = ("--model", "topics:1", "--model-store", model_store)
        existing = model_store / "topics" / "2"
        outcome = command("calibrate", "--data", data, "--out", existing, *source)
        assert "exists" in outcome.complaint()

    @pytest.mark.parametrize(
        ("rows", "version", "word"), [(3, "3", "3 rows"), (None, "next", "version number")]
    )
    def test_too_few_rows_or_an_invalid_version_are_one_line(
        self,
        command: CommandLine,
        model_store: Path,
        tmp_path: Path,
        rows: int | None,
        version: str,
        word: str,
    ) -> None:
        data = write_jsonl(tmp_path / "mine.jsonl", single_label_rows()[:rows])
        source = ("--model", "topics:1", "--model-store", model_store)
        made = tmp_path / "store" / "mine" / version
        assert word in command("calibrate", "--data", data, "--out", made, *source).complaint()
        assert not made.exists()
