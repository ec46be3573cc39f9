"""`budgetformer classify` resumes after it was killed or interrupted."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.processes import clean_environment
from tests.support.stores import TOPICS, labelled_sentences, write_jsonl
from tests.support.waiting import wait_until

pytestmark = pytest.mark.timeout(300)

ROWS = 15_000
"""Enough for a run to continue for seconds after its first answers."""
COMMAND = (sys.executable, "-P", "-c", "from service.cli import main; main()", "classify")


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Restore the default handling of SIGINT, which child processes inherit."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    texts = [text for text, _ in labelled_sentences()]
    rows = [{"text": f"{texts[i % len(texts)]} {i}"} for i in range(ROWS)]
    return write_jsonl(tmp_path / "texts.jsonl", rows)


def start(source: Path, output: Path, store: Path, *more: str) -> subprocess.Popen[str]:
    arguments = (
        "--file", source, "--output", output, "--model", TOPICS, "--model-store", store,
        "--workers", "2", "--json", "--resume", *more,
    )  # fmt: skip
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean_environment(),
    )  # fmt: skip


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_a_stopped_run_resumes(
    model_store: Path, source: Path, tmp_path: Path, number: int, code: int
) -> None:
    output, part = tmp_path / "answers.jsonl", tmp_path / "answers.jsonl.part"
    first = start(source, output, model_store)
    try:
        wait_until(lambda: part.exists() and part.stat().st_size > 100_000, "some answers")
        workers = psutil.Process(first.pid).children()
        assert len(workers) == 2
        first.send_signal(number)
        out, err = first.communicate(timeout=60)
    finally:
        first.kill()
    assert (first.returncode, out) == (code, "")
    assert "Traceback" not in err
    wait_until(lambda: not any(worker.is_running() for worker in workers), "the end of the workers")
    assert not output.exists()

    second = start(source, output, model_store)
    out, err = second.communicate(timeout=200)
    assert (second.returncode, err) == (0, "")
    summary = json.loads(out)
    assert summary["rows"] == ROWS
    assert 0 < summary["rows_resumed"] < ROWS
    texts = [json.loads(line)["text"] for line in source.read_text().splitlines()]
    assert [json.loads(line)["text"] for line in output.read_text().splitlines()] == texts
    assert not part.exists()
