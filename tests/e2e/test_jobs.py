"""Jobs on a real server: killed processes, interrupted uploads, and the command line."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.support.command_line import CommandLine
from tests.support.processes import Server, server
from tests.support.stores import TOPICS, labelled_sentences
from tests.support.waiting import wait_until

pytestmark = pytest.mark.timeout(300)

TEXTS = [f"{text} {i}" for i, (text, _) in enumerate(labelled_sentences() * 200)]
FILE = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEXTS)
PATIENCE = 120.0


def serving(store: Path, folder: Path, **options: Any) -> AbstractContextManager[Server]:
    defaults = {"engines": 1, "models": f'["{TOPICS}"]', "state_dir": str(folder / "state")}
    defaults |= {"quality_floor": "balanced"}
    return server(store, folder, **defaults | options)  # type: ignore[arg-type]


@pytest.fixture
def running(model_store: Path, tmp_path: Path) -> Iterator[Server]:
    with serving(model_store, tmp_path, fronts=2) as running:
        yield running


def submit(running: Server, content: bytes = FILE, **options: Any) -> str:
    response = httpx.post(
        f"{running.url}/jobs", content=content, params=options, timeout=60,
        headers={"content-type": "application/x-ndjson"},
    )  # fmt: skip
    assert response.status_code == 202, response.text
    return str(response.json()["id"])


def show(running: Server, job: str) -> dict[str, Any]:
    response = httpx.get(f"{running.url}/jobs/{job}", timeout=60)
    assert response.status_code == 200, response.text
    return dict(response.json())


def wait_until_begun(running: Server, job: str) -> None:
    """Wait until some rows are answered, and check that most are not."""
    wait_until(lambda: show(running, job)["rows"] > 100, "the first rows", PATIENCE)
    assert show(running, job)["rows"] < len(TEXTS) / 2


def result_of(running: Server, job: str) -> list[dict[str, Any]]:
    """Wait until the job has finished, and return the rows of its result."""
    unfinished = ("queued", "running")
    wait_until(
        lambda: show(running, job)["status"] not in unfinished, "the end of the job", PATIENCE
    )
    assert show(running, job)["status"] == "finished", show(running, job)
    content = httpx.get(f"{running.url}/jobs/{job}/result", timeout=60).content
    return [json.loads(line) for line in content.splitlines()]


def check(running: Server, rows: list[dict[str, Any]]) -> None:
    """Check that each row is there once, in order, with the answer of POST /classify."""
    assert [row["text"] for row in rows] == TEXTS
    for begin in range(0, len(TEXTS), 2000):
        texts = TEXTS[begin : begin + 2000]
        answer = httpx.post(
            f"{running.url}/classify", json={"input": texts, "quality": "balanced"}, timeout=60
        ).json()
        part = rows[begin : begin + 2000]
        assert [row["label"] for row in part] == [item["label"] for item in answer["data"]]
        assert [row["macs"] for row in part] == [item["macs"] for item in answer["data"]]


def job_processes(running: Server) -> list[psutil.Process]:
    return [child for child in running.children if "service.jobs" in " ".join(child.cmdline())]


def test_the_job_process_starts_with_the_first_job_and_without_torch(running: Server) -> None:
    assert job_processes(running) == []
    job = submit(running, b'{"text": "A choir rehearsed."}\n')
    assert len(result_of(running, job)) == 1
    (process,) = job_processes(running)
    modules = {Path(file.path).name for file in process.memory_maps()}
    assert not any(name.startswith("libtorch") for name in modules)
    wait_until(lambda: running.scrape().total("jobs", status="finished") == 1, "the count of jobs")


def test_after_a_killed_job_process_each_row_is_answered_once(running: Server) -> None:
    job = submit(running)
    wait_until_begun(running, job)
    (process,) = job_processes(running)
    process.send_signal(signal.SIGKILL)
    check(running, result_of(running, job))
    assert job_processes(running) != [process]


def test_a_job_continues_after_its_engine_was_killed(running: Server) -> None:
    job = submit(running, heads=1)
    wait_until_begun(running, job)
    os.kill(running.engines()[0], signal.SIGKILL)
    assert [row["text"] for row in result_of(running, job)] == TEXTS
    assert show(running, job)["failed_rows"] == 0


def test_a_job_continues_after_the_server_was_killed(model_store: Path, tmp_path: Path) -> None:
    with serving(model_store, tmp_path) as before:
        job = submit(before)
        wait_until_begun(before, job)
        family = before.children
        for process in (psutil.Process(before.process.pid), *family):
            process.send_signal(signal.SIGKILL)
        before.process.wait()
        psutil.wait_procs(family, 30)
    with serving(model_store, tmp_path) as after:
        check(after, result_of(after, job))


def test_only_one_of_two_servers_on_one_folder_runs_jobs(
    running: Server, model_store: Path, tmp_path: Path
) -> None:
    first = submit(running, b'{"text": "A choir rehearsed."}\n')
    result_of(running, first)
    folder = tmp_path / "second"
    folder.mkdir()
    with serving(model_store, folder, state_dir=str(tmp_path / "state")) as second:

        def errors() -> list[str]:
            return list(httpx.get(f"{second.url}/health", timeout=30).json()["errors"])

        wait_until(lambda: bool(errors()), "the error in /health")
        assert "another server runs the jobs in it" in errors()[0]
        assert second.ready()
        # It accepts jobs, and the first server runs them.
        assert len(result_of(second, submit(second, b'{"text": "Thick fog."}\n'))) == 1
        assert job_processes(second) == []
        running.terminate()
        assert len(result_of(second, submit(second, b'{"text": "A choir."}\n'))) == 1
        wait_until(lambda: errors() == [], "the end of the error")


class TestUploads:
    def connect(self, running: Server) -> socket.socket:
        port = httpx.URL(running.url).port
        assert port is not None
        return socket.create_connection(("127.0.0.1", port), timeout=30)

    HEAD = (
        b"POST /jobs HTTP/1.1\r\nHost: here\r\nContent-Type: text/csv\r\nContent-Length: %d\r\n\r\n"
    )

    def test_an_interrupted_upload_leaves_no_files(self, running: Server, tmp_path: Path) -> None:
        jobs = tmp_path / "state" / "jobs"
        with self.connect(running) as client:
            client.sendall(self.HEAD % 10_000_000 + b"text\n" + b"x" * 5_000_000)
            wait_until(lambda: any(jobs.glob(".*/input.csv")), "the upload")
        wait_until(lambda: not any(jobs.glob(".*/")), "the end of the upload")
        assert httpx.get(f"{running.url}/jobs").json()["data"] == []

    def test_the_upload_of_a_killed_frontend_is_not_a_job(
        self, running: Server, tmp_path: Path
    ) -> None:
        jobs = tmp_path / "state" / "jobs"
        fronts = [c for c in running.children if "service.frontend" in " ".join(c.cmdline())]
        with self.connect(running) as client:
            client.sendall(self.HEAD % 10_000_000 + b"text\n" + b"x" * 5_000_000)
            wait_until(lambda: any(jobs.glob(".*/input.csv")), "the upload")
            for frontend in fronts:
                frontend.send_signal(signal.SIGKILL)
            psutil.wait_procs(fronts, 30)
        running.wait_ready(1)
        assert httpx.get(f"{running.url}/jobs").json()["data"] == []
        assert len(result_of(running, submit(running, b'{"text": "Thick fog."}\n'))) == 1

    def test_a_slow_upload_times_out(self, model_store: Path, tmp_path: Path) -> None:
        with (
            serving(model_store, tmp_path, receive_seconds="1") as running,
            self.connect(running) as client,
        ):
            client.sendall(self.HEAD % 10_000_000 + b"text\n")
            answer = client.recv(65536)
            assert answer.startswith(b"HTTP/1.1 408 ")
            assert b"request_timeout" in answer
            assert not any((tmp_path / "state" / "jobs").glob(".*/"))

    def test_large_uploads_are_accepted_in_little_memory(self, running: Server) -> None:
        frontends = [c for c in running.children if "service.frontend" in " ".join(c.cmdline())]
        before = sum(frontend.memory_info().rss for frontend in frontends)
        row = json.dumps({"text": "x" * 999_000}).encode() + b"\n"
        job = submit(running, row * 200)
        assert sum(frontend.memory_info().rss for frontend in frontends) - before < 50 * 2**20
        rows = result_of(running, job)
        assert len(rows) == 200
        assert all("characters" in row["error"] for row in rows)


def test_the_command_line_submits_follows_and_downloads(
    running: Server, tmp_path: Path, command: CommandLine
) -> None:
    address = ("--address", running.url)
    file = tmp_path / "texts.jsonl"
    file.write_bytes(FILE)
    submitted = command("jobs", "submit", file, "--quality", "balanced", "--json", *address)
    assert submitted.code == 0, submitted
    job = json.loads(submitted.out)["id"]
    output = tmp_path / "answers.jsonl"
    followed = command("jobs", "follow", job, "--output", output, *address)
    assert followed.code == 0, followed
    check(running, [json.loads(line) for line in output.read_bytes().splitlines()])
    listed = command("jobs", "list", "--json", *address)
    assert [one["id"] for one in json.loads(listed.out)] == [job]
    assert json.loads(command("jobs", "show", job, *address).out)["rows"] == len(TEXTS)
    again = tmp_path / "again.jsonl"
    assert command("jobs", "result", job, "--output", again, *address).code == 0
    assert again.read_bytes() == output.read_bytes()
    assert command("jobs", "cancel", job, *address).code == 0
    assert "no such job" in command("jobs", "show", job, *address).complaint()
    broken = tmp_path / "broken.csv"
    broken.write_text("no\nheader\n")
    failed = command("jobs", "submit", broken, "--follow", *address)
    assert failed.code == 1
    assert "no column 'text'" in failed.err
