"""Classification of many rows: in order, by several processes, and resumed from a journal."""

from __future__ import annotations

import csv
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from budgetformer.bulk import Asked, Journal, classify_rows, finish
from budgetformer.bulk import run as run_module
from budgetformer.checkpoint.store import read_checkpoint
from budgetformer.classifier import Classifier
from budgetformer.errors import CheckpointError, DataError, PolicyError, WorkerError
from budgetformer.tables import Row
from tests.support.stores import PAIRS, TOPICS, labelled_sentences

ROWS: list[Row] = [(f"{text} {i}", None) for i, (text, _) in enumerate(labelled_sentences())]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "CHUNK_ROWS", 10)


@pytest.fixture
def topics(model_store: Path) -> Path:
    return model_store / TOPICS / "2"


def asked(path: Path, **how: Any) -> Asked:
    return Asked(str(path), **{"quality": "balanced", "precision": "float32"} | how)


def decoded(lines: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines.splitlines()]


@pytest.mark.parametrize("workers", [1, 2])
def test_answers_equal_the_library_in_the_order_of_the_rows(topics: Path, workers: int) -> None:
    answers = list(classify_rows(asked(topics), iter(ROWS), workers))
    rows = [row for answered in answers for row in decoded(answered.lines)]
    assert [row["text"] for row in rows] == [text for text, _ in ROWS]
    expected = Classifier(topics, precision="float32")([text for text, _ in ROWS])
    for row, answer in zip(rows, expected, strict=True):
        actual = (row["label"], row["budget"], row["macs"])
        assert actual == (answer.label, answer.budget, answer.macs)
        assert row["probs"] == pytest.approx(answer.probs, rel=1e-4, abs=1e-6)
    assert sum(answered.rows for answered in answers) == len(ROWS)
    assert sum(answered.macs for answered in answers) == sum(row["macs"] for row in rows)


def test_pairs_are_classified(model_store: Path) -> None:
    rows: list[Row] = [(a, b) for (a, _), (b, _) in zip(ROWS, ROWS[1:], strict=False)]
    answers = classify_rows(asked(model_store / PAIRS / "1"), iter(rows), 2)
    found = [row for answered in answers for row in decoded(answered.lines)]
    assert [(row["text"], row["text_pair"]) for row in found] == rows


def test_rows_are_read_as_needed_and_workers_end_with_the_iterator(topics: Path) -> None:
    drawn = 0

    def endless() -> Iterator[Row]:
        nonlocal drawn
        while True:
            drawn += 1
            yield f"The otter slept {drawn}.", None

    answers = classify_rows(asked(topics), endless(), 2)
    for _ in range(4):
        next(answers)
    assert drawn <= 10 * (4 + 6 + 2)
    assert len(psutil.Process().children()) == 2
    answers.close()
    assert psutil.Process().children() == []


def test_without_rows_no_checkpoint_is_loaded(tmp_path: Path) -> None:
    assert list(classify_rows(asked(tmp_path / "nothing"), iter(()), 2)) == []


def test_errors_of_a_worker_are_raised_in_the_caller(topics: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="manifest"):
        next(classify_rows(asked(tmp_path), iter(ROWS), 2))
    with pytest.raises(PolicyError, match="superb"):
        next(classify_rows(asked(topics, quality="superb"), iter(ROWS), 2))
    assert psutil.Process().children() == []


def test_a_worker_that_dies_is_an_error(topics: Path) -> None:
    rows = (row for _ in range(1000) for row in ROWS)
    answers = classify_rows(asked(topics), rows, 2)
    next(answers)
    os.kill(psutil.Process().children()[0].pid, signal.SIGKILL)
    with pytest.raises(WorkerError, match="-9"):
        list(answers)
    assert psutil.Process().children() == []


class TestJournal:
    @pytest.fixture
    def output(self, tmp_path: Path) -> Path:
        return tmp_path / "answers.jsonl"

    def journal(self, output: Path, path: Path, resume: bool = True, **how: Any) -> Journal:
        budget: dict[str, Any] = {"quality": "balanced", "heads": None} | how
        return Journal(output, read_checkpoint(path), resume=resume, **budget)

    def begin(self, output: Path, path: Path, chunks: int) -> Path:
        """Return the journal of a run that was stopped after a number of chunks."""
        with self.journal(output, path) as journal:
            answers = classify_rows(asked(path), iter(ROWS), 1)
            for _ in range(chunks):
                journal.append(next(answers))
        assert not output.exists()
        return journal.path

    def complete(self, output: Path, path: Path) -> list[dict[str, Any]]:
        with self.journal(output, path) as journal:
            rows = journal.remaining(iter(ROWS))
            for answered in classify_rows(asked(path, precision=journal.precision), rows, 1):
                journal.append(answered)
            finish(journal, output)
        return decoded(output.read_bytes())

    @pytest.mark.parametrize("cut", [0, 1, 30, -1])
    def test_a_run_resumes_after_an_incomplete_last_line(
        self, output: Path, topics: Path, tmp_path: Path, cut: int
    ) -> None:
        whole = self.complete(tmp_path / "whole.jsonl", topics)
        part = self.begin(output, topics, 3)
        lines = part.read_bytes().splitlines(keepends=True)
        part.write_bytes(b"".join(lines[:-1]) + lines[-1][:cut])
        found = self.complete(output, topics)
        assert [row["text"] for row in found] == [text for text, _ in ROWS]
        assert [row["label"] for row in found] == [row["label"] for row in whole]
        assert not part.exists()

    def test_invalid_lines_at_the_end_are_dropped(self, output: Path, topics: Path) -> None:
        part = self.begin(output, topics, 2)
        with part.open("ab") as file:
            file.write(b"\0" * 100 + b"\n" + b"\0" * 50)
        assert [row["text"] for row in self.complete(output, topics)] == [t for t, _ in ROWS]

    def test_an_incomplete_first_line_is_an_empty_journal(self, output: Path, topics: Path) -> None:
        part = self.begin(output, topics, 1)
        part.write_bytes(part.read_bytes()[:20])
        with self.journal(output, topics) as journal:
            assert journal.rows == 0

    def test_a_journal_left_beside_its_output_gives_the_same_output(
        self, output: Path, topics: Path
    ) -> None:
        part = self.begin(output, topics, 100 // 10)
        kept = part.read_bytes()
        first = self.complete(output, topics)
        part.write_bytes(kept)
        assert self.complete(output, topics) == first

    @pytest.mark.parametrize("how", [{"quality": "fast"}, {"heads": 2}, {"quality": 1.5}])
    def test_a_journal_with_other_options_is_refused(
        self, output: Path, topics: Path, how: dict[str, Any]
    ) -> None:
        self.begin(output, topics, 1)
        with pytest.raises(DataError, match=next(iter(how))):
            self.journal(output, topics, **how)

    def test_a_journal_of_another_model_is_refused(self, output: Path, topics: Path) -> None:
        self.begin(output, topics, 1)
        with pytest.raises(DataError, match="topics:1"):
            self.journal(output, topics.parent / "1")

    def test_a_journal_of_other_rows_is_refused(self, output: Path, topics: Path) -> None:
        self.begin(output, topics, 1)
        with (
            self.journal(output, topics) as journal,
            pytest.raises(DataError, match="row 3 is the answer to another text"),
        ):
            list(journal.remaining(iter([*ROWS[:2], *ROWS[3:]])))

    def test_another_kind_of_file_is_kept(self, output: Path, topics: Path) -> None:
        part = output.with_name("answers.jsonl.part")
        part.write_text("my notes\nmore of them\n")
        with pytest.raises(DataError, match="no unfinished run"):
            self.journal(output, topics)
        assert part.read_text() == "my notes\nmore of them\n"

    def test_without_resume_existing_files_are_an_error(self, output: Path, topics: Path) -> None:
        self.begin(output, topics, 1)
        with pytest.raises(DataError, match="--resume"):
            self.journal(output, topics, resume=False)
        output.write_text("mine")
        with pytest.raises(DataError, match="exists"):
            self.journal(output, topics, resume=False)

    def test_two_runs_may_not_write_one_file(self, output: Path, topics: Path) -> None:
        with (
            self.journal(output, topics),
            pytest.raises(DataError, match="another run"),
        ):
            self.journal(output, topics)

    def test_a_run_without_answers_leaves_no_file(self, output: Path, topics: Path) -> None:
        with self.journal(output, topics):
            pass
        assert list(output.parent.iterdir()) == []


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("count", [0, 25])
def test_every_output_format_has_the_same_rows(
    topics: Path, tmp_path: Path, kind: str, count: int
) -> None:
    rows: list[Row] = [(f'{text}, "{i}"\n🦊', None) for i, (text, _) in enumerate(ROWS[:count])]
    output = tmp_path / f"answers.{kind}"
    with Journal(output, read_checkpoint(topics), "balanced", None, False) as journal:
        for answered in classify_rows(asked(topics), iter(rows), 1):
            journal.append(answered)
        expected = list(journal.answers())
        finish(journal, output)
    assert list(tmp_path.iterdir()) == [output]
    if kind == "jsonl":
        found = decoded(output.read_bytes())
    elif kind == "csv":
        with output.open(newline="", encoding="utf-8") as file:
            table = list(csv.DictReader(file))
        found = [
            row
            | {name: int(row[name]) for name in ("budget", "heads", "macs", "dense_macs", "tokens")}
            | {"score": float(row["score"]), "probs": json.loads(row["probs"])}
            | {"predicted": int(row["predicted"]), "steps": json.loads(row["steps"])}
            | {"truncated": row["truncated"] == "True"}
            for row in table
        ]
    else:
        parquet = pytest.importorskip("pyarrow.parquet")
        found = parquet.read_table(output).to_pylist()
    assert found == expected
    assert len(found) == count
