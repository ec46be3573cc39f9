"""Jobs as files: how they appear, are listed, removed, and cleaned up after interruptions."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path
from typing import Any

import pytest

from service.job_store import (
    STALE_SECONDS,
    JobDescription,
    JobProgress,
    JobStore,
    StoredJob,
    StoreFullError,
    new_id,
)


@pytest.fixture
def store(tmp_path: Path) -> JobStore:
    return JobStore(tmp_path / "state")


def new_description(**changes: Any) -> JobDescription:
    fields: dict[str, Any] = {
        "id": new_id(), "owner": "web", "created": time.time(), "model": "topics:2",
        "quality": "balanced", "heads": None, "kind": "csv", "result_kind": "jsonl",
    }  # fmt: skip
    return JobDescription(**fields | changes)


def add_job(store: JobStore, content: bytes = b"text\nhello\n", **changes: Any) -> StoredJob:
    description = new_description(**changes)
    upload = store.receive(description.id, description.kind)
    upload.write(content)
    return upload.accept(description)


def test_a_new_store_has_no_jobs_and_no_folder(store: JobStore) -> None:
    assert store.jobs() == []
    assert store.next() is None
    store.check_room(1, 1)
    assert not store.folder.exists()


def test_a_job_appears_only_when_its_upload_is_complete(store: JobStore) -> None:
    description = new_description()
    upload = store.receive(description.id, "csv")
    upload.write(b"text\n")
    upload.write(b"hello\n")
    assert store.jobs() == []
    job = upload.accept(description)
    assert store.jobs() == [job]
    assert store.get(description.id) == job
    assert job.input.read_bytes() == b"text\nhello\n"
    assert job.progress() == JobProgress()


def test_only_the_owner_of_the_process_can_read_jobs(store: JobStore) -> None:
    job = add_job(store)
    job.write_progress(JobProgress(status="running"))
    for folder in (store.folder.parent, store.folder, job.folder):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for file in job.folder.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_an_abandoned_upload_leaves_no_files(store: JobStore) -> None:
    upload = store.receive(new_id(), "csv")
    upload.write(b"text\n")
    upload.close()
    upload.close()
    assert list(store.folder.iterdir()) == []


def test_a_job_with_a_source_has_no_input_yet(store: JobStore) -> None:
    assert not add_job(store, b"", source="s3://bucket/a.csv").input.exists()


def test_jobs_are_listed_newest_first_and_run_oldest_first(store: JobStore) -> None:
    jobs = [add_job(store, created=created) for created in (5.0, 7.0, 6.0)]
    assert [job.description.created for job in store.jobs()] == [7.0, 6.0, 5.0]
    assert store.next() == jobs[0]
    jobs[0].write_progress(JobProgress(status="finished"))
    assert store.next() == jobs[2]
    jobs[2].write_progress(JobProgress(status="running"))
    assert store.next() == jobs[2]
    assert store.count() == {"finished": 1, "running": 1, "queued": 1}


def test_the_files_of_a_job_that_has_ended_are_read_once(store: JobStore) -> None:
    ended, removed, running = (add_job(store) for _ in range(3))
    for job, status in ((ended, "finished"), (removed, "failed"), (running, "running")):
        job.write_progress(JobProgress(status=status))
    assert store.count() == {"finished": 1, "failed": 1, "running": 1}
    (ended.folder / "progress.json").unlink()
    store.remove(removed)
    assert store.count() == {"finished": 1, "running": 1}
    running.write_progress(JobProgress(status="finished"))
    assert store.count() == {"finished": 2}
    assert store.next() is None


@pytest.mark.parametrize(
    "name",
    ["..", ".", "", "../jobs", "a/b", "%2e%2e", "0" * 31, "0" * 33, "G" * 32, "0" * 31 + "\n"],
)
def test_an_id_is_never_a_path(store: JobStore, name: str) -> None:
    add_job(store)
    (store.folder.parent / "job.json").write_text("{}")
    assert store.get(name) is None


def test_folders_without_a_valid_job_are_ignored(store: JobStore) -> None:
    job = add_job(store)
    (store.folder / ("0" * 32)).mkdir()
    (store.folder / "notes").mkdir()
    damaged = add_job(store)
    (damaged.folder / "job.json").write_bytes(b'{"id"')
    assert store.jobs() == [job]


def test_incomplete_progress_counts_as_none(store: JobStore) -> None:
    job = add_job(store)
    (job.folder / "progress.json").write_bytes(b'{"status":"run')
    assert job.progress() == JobProgress()


def test_progress_of_a_removed_job_cannot_be_written(store: JobStore) -> None:
    job = add_job(store)
    store.remove(job)
    store.remove(job)
    assert not job.exists
    assert list(store.folder.iterdir()) == []
    with pytest.raises(FileNotFoundError):
        job.write_progress(JobProgress())


def test_jobs_and_bytes_are_limited(store: JobStore) -> None:
    job = add_job(store, b"x" * 1000)
    store.check_room(2, 2000, 500)
    with pytest.raises(StoreFullError, match="keeps at most 1 jobs"):
        store.check_room(1, 2000)
    with pytest.raises(StoreFullError, match="exceed 1400 bytes"):
        store.check_room(2, 1400, 500)
    arriving = store.receive(new_id(), "csv")
    with pytest.raises(StoreFullError, match="keeps at most 2 jobs"):
        store.check_room(2, 2000)
    arriving.write(b"x" * 1000)
    with pytest.raises(StoreFullError):
        store.check_bytes(2000)
    arriving.close()
    store.remove(job)
    store.check_room(1, 500, 500)


def test_jobs_that_ended_long_ago_are_removed(store: JobStore) -> None:
    now = time.time()
    old, fresh, unfinished = (add_job(store) for _ in range(3))
    old.write_progress(JobProgress(status="failed", ended=now - 100))
    fresh.write_progress(JobProgress(status="finished", ended=now - 10))
    unfinished.write_progress(JobProgress(status="running", started=now - 1000))
    store.tidy(50)
    assert set(store.jobs()) == {fresh, unfinished}


def test_stale_uploads_are_removed_and_running_ones_kept(
    store: JobStore,
) -> None:
    arriving = new_id()
    upload = store.receive(arriving, "csv")
    left = store.folder / f".{new_id()}"
    left.mkdir()
    (left / "input.csv").write_text("text\n")
    new = store.folder / f".{new_id()}"
    new.mkdir()
    long_ago = time.time() - 2 * STALE_SECONDS
    for folder in (left, store.folder / f".{arriving}"):
        os.utime(folder, (long_ago, long_ago))
    store.tidy(1000)
    assert not left.exists()
    assert new.exists()
    description = new_description(id=arriving)
    assert upload.accept(description).exists


def test_only_one_server_holds_the_lock(store: JobStore) -> None:
    with pytest.raises(OSError, match=r"\.lock"):
        store.lock()
    add_job(store)
    held = store.lock()
    assert held is not None
    assert JobStore(store.folder.parent).lock() is None
    os.close(held)
    regained = store.lock()
    assert regained is not None
    os.close(regained)
