"""Jobs as files: what appears, what goes, and what is left by who was interrupted."""

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


def described(**changes: Any) -> JobDescription:
    given: dict[str, Any] = {
        "id": new_id(), "owner": "web", "created": time.time(), "model": "topics:2",
        "quality": "balanced", "heads": None, "kind": "csv", "result_kind": "jsonl",
    }  # fmt: skip
    return JobDescription(**given | changes)


def added(store: JobStore, content: bytes = b"text\nhello\n", **changes: Any) -> StoredJob:
    description = described(**changes)
    upload = store.receive(description.id, description.kind)
    upload.write(content)
    return upload.accept(description)


def test_there_is_nothing_before_the_first_job(store: JobStore) -> None:
    assert store.jobs() == []
    assert store.next() is None
    store.check_room(1, 1)
    assert not store.folder.exists()


def test_a_job_appears_as_a_whole(store: JobStore) -> None:
    description = described()
    upload = store.receive(description.id, "csv")
    upload.write(b"text\n")
    upload.write(b"hello\n")
    assert store.jobs() == []
    job = upload.accept(description)
    assert store.jobs() == [job]
    assert store.get(description.id) == job
    assert job.input.read_bytes() == b"text\nhello\n"
    assert job.progress() == JobProgress()


def test_nobody_else_on_this_machine_can_read_it(store: JobStore) -> None:
    job = added(store)
    job.write_progress(JobProgress(status="running"))
    for folder in (store.folder.parent, store.folder, job.folder):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for file in job.folder.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_an_upload_that_is_not_accepted_leaves_nothing(store: JobStore) -> None:
    upload = store.receive(new_id(), "csv")
    upload.write(b"text\n")
    upload.close()
    upload.close()
    assert list(store.folder.iterdir()) == []


def test_a_job_with_a_source_has_no_input_yet(store: JobStore) -> None:
    assert not added(store, b"", source="s3://bucket/a.csv").input.exists()


def test_newest_first_and_oldest_next(store: JobStore) -> None:
    jobs = [added(store, created=created) for created in (5.0, 7.0, 6.0)]
    assert [job.description.created for job in store.jobs()] == [7.0, 6.0, 5.0]
    assert store.next() == jobs[0]
    jobs[0].write_progress(JobProgress(status="finished"))
    assert store.next() == jobs[2]
    jobs[2].write_progress(JobProgress(status="running"))
    assert store.next() == jobs[2]
    assert store.count() == {"finished": 1, "running": 1, "queued": 1}


def test_the_files_of_a_job_that_has_ended_are_read_once(store: JobStore) -> None:
    ended, removed, running = added(store), added(store), added(store)
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
    added(store)
    (store.folder.parent / "job.json").write_text("{}")
    assert store.get(name) is None


def test_a_folder_that_is_no_job_is_none(store: JobStore) -> None:
    job = added(store)
    (store.folder / ("0" * 32)).mkdir()
    (store.folder / "notes").mkdir()
    damaged = added(store)
    (damaged.folder / "job.json").write_bytes(b'{"id"')
    assert store.jobs() == [job]


def test_progress_that_was_torn_is_none(store: JobStore) -> None:
    job = added(store)
    (job.folder / "progress.json").write_bytes(b'{"status":"run')
    assert job.progress() == JobProgress()


def test_progress_of_a_removed_job_cannot_be_written(store: JobStore) -> None:
    job = added(store)
    store.remove(job)
    store.remove(job)
    assert not job.exists
    assert list(store.folder.iterdir()) == []
    with pytest.raises(FileNotFoundError):
        job.write_progress(JobProgress())


def test_room_for_jobs_and_for_bytes(store: JobStore) -> None:
    job = added(store, b"x" * 1000)
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
    old, fresh, unfinished = (added(store) for _ in range(3))
    old.write_progress(JobProgress(status="failed", ended=now - 100))
    fresh.write_progress(JobProgress(status="finished", ended=now - 10))
    unfinished.write_progress(JobProgress(status="running", started=now - 1000))
    store.tidy(50)
    assert set(store.jobs()) == {fresh, unfinished}


def test_what_a_killed_frontend_left_is_removed_and_an_upload_under_way_is_not(
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
    description = described(id=arriving)
    assert upload.accept(description).exists


def test_one_server_holds_the_lock(store: JobStore) -> None:
    with pytest.raises(OSError, match=r"\.lock"):
        store.lock()
    added(store)
    held = store.lock()
    assert held is not None
    assert JobStore(store.folder.parent).lock() is None
    os.close(held)
    again = store.lock()
    assert again is not None
    os.close(again)
