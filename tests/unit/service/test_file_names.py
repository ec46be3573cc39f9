"""Names of files, folders and variables that are not UTF-8 work, or are refused in one line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from budgetformer.errors import CheckpointError, readable
from budgetformer.subprocesses import python_command
from service.settings import Settings
from tests.support.command_line import CommandLine
from tests.support.stores import TOPICS, sentences

BAD = os.fsdecode(b"caf\xe9-\xff")
SHOWN = r"caf\udce9-\udcff"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder whose name is not UTF-8."""
    path = tmp_path / BAD
    path.mkdir()
    return path


@pytest.fixture
def store(model_store: Path, folder: Path) -> Path:
    """Return a store in this folder, with a valid model and one whose name is not UTF-8."""
    shutil.copytree(model_store / TOPICS, folder / "store" / TOPICS)
    shutil.copytree(model_store / TOPICS / "2", folder / "store" / BAD / "2")
    return folder / "store"


def test_error_messages_escape_invalid_names() -> None:
    assert str(CheckpointError(f"{BAD}: no such folder")) == f"{SHOWN}: no such folder"
    assert readable("é 中 \U0001f600") == "é 中 \U0001f600"


def test_commands_read_and_write_such_paths(
    command: CommandLine, store: Path, folder: Path
) -> None:
    rows, output = folder / f"{BAD}.csv", folder / f"out-{BAD}.jsonl"
    rows.write_text(f"text\n{sentences('music')[0]}\n")
    in_store = f"--model-store={store}"
    done = command("classify", "--file", rows, "--model", TOPICS, in_store, "--json")
    assert (done.code, json.loads(done.out)["label"]) == (0, "music")
    done = command("classify", "--file", rows, "--output", output, "--model", TOPICS, in_store)
    assert (done.code, len(output.read_text().splitlines())) == (0, 1)
    assert command("models", "show", store / TOPICS / "2").code == 0
    listed = command("models", "list", in_store)
    assert (listed.code, TOPICS in listed.out, SHOWN in listed.err) == (1, True, True)


@pytest.mark.parametrize(
    "arguments",
    [
        ("serve", "--print-config", f"--model-store={BAD}"),
        ("serve", "--print-config", f"--default-model={BAD}"),
        ("serve", "--print-config", f"--models={BAD}"),
        ("serve", "--print-config", "--config", BAD),
        ("doctor", f"--keys-file={BAD}"),
        ("models", "verify", f"--model-store={BAD}"),
        ("models", "show", BAD),
        ("evaluate", "--data", f"{BAD}.csv"),
        ("evaluate", "--data", f"{BAD}.parquet"),
        ("classify", "--file", f"{BAD}.csv"),
        ("classify", "--file", f"{BAD}.parquet"),
        ("classify", "text", "--model", BAD),
        ("train", "--data", BAD, "--out", BAD),
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_an_invalid_name_in_an_option_is_one_line(
    command: CommandLine, model_store: Path, arguments: tuple[str, ...]
) -> None:
    if arguments[0] in ("evaluate", "classify"):
        arguments = (*arguments, f"--model-store={model_store}")
    outcome = command(*arguments)
    assert outcome.code in (1, 2)
    line = outcome.complaint(outcome.code)
    assert SHOWN in line
    line.encode()


def test_a_secret_with_such_bytes_is_not_repeated(
    command: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BUDGETFORMER_ADMIN_KEY", f"open-{BAD}")
    complaint = command("serve", "--print-config").complaint(2)
    assert "admin_key" in complaint
    assert "open-" not in complaint


def test_a_variable_with_such_a_name_is_refused(
    command: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"BUDGETFORMER_{BAD}", "1")
    assert SHOWN in command("serve", "--print-config").complaint(2)


def test_output_escapes_invalid_names(model_store: Path, folder: Path) -> None:
    source = str(model_store / TOPICS / "2")
    done = subprocess.run(
        python_command("-m", "budgetformer", "models", "add", source, "--model-store", folder),
        env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"},
        capture_output=True, check=True, timeout=100,
    )  # fmt: skip
    assert SHOWN in done.stdout.decode()


def test_settings_with_unicode_are_sent_unchanged(tmp_path: Path) -> None:
    settings = Settings(model_store=tmp_path / "é 中", default_model="ü")
    assert Settings(**json.loads(json.dumps(settings.model_dump(mode="json")))) == settings
