"""Jobs as files: `state_dir`/jobs/<id>/ holds everything of one job, and there is nothing else.

    job.json          what was asked for; written once, before the job appears
    input.<kind>      the rows; where they come from a URL, once they are fetched
    result.<kind>     the answers, once all of them are there; before, `result.<kind>.part`
    progress.json     how far the job is; the process that runs it replaces it

Frontends add and remove folders, and each folder appears and goes as a whole. A folder whose name
begins with a dot is arriving or leaving.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args
from uuid import uuid4

import msgspec

from budgetformer.errors import BudgetFormerError
from service.state_files import replace_file

Kind = Literal["csv", "jsonl", "parquet"]
Status = Literal["queued", "running", "finished", "failed", "cancelled"]
STORED: tuple[Status, ...] = get_args(Status)[:-1]
"""What a stored job can be: one that is cancelled is removed."""
STALE_SECONDS = 60.0
"""A folder that is arriving and held by nobody is left alone for so long after its last change."""
_ID = re.compile(r"[0-9a-f]{32}")
_LOCK = ".lock"


class StoreFullError(BudgetFormerError):
    """There are as many jobs, or bytes of jobs, as there may be."""


class JobDescription(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked for.

    Attributes:
        id: 32 hexadecimal digits.
        owner: name of the key that asked.
        created: seconds since 1970.
        model: `name:version`.
        quality: level or points given up; None: the model has no levels.
        heads: heads per layer, in place of f_o.
        kind, result_kind: of the input and of the result.
        source: URL of the input; None: it was uploaded.
    """

    id: str
    owner: str
    created: float
    model: str
    quality: str | float | None
    heads: int | None
    kind: Kind
    result_kind: Kind
    source: str | None = None


class JobProgress(msgspec.Struct, frozen=True, kw_only=True):
    """How far a job is.

    Attributes:
        status: of the job.
        started, ended: seconds since 1970.
        rows, failed_rows: that are answered, and those of them that failed alone.
        read_share: share of the input that was read, 0..1.
        rows_per_second: since the job was begun or resumed.
        seconds_left: at this rate; None: it is not known.
        labels: rows by label.
        mean_heads: heads computed for a row, summed over layers.
        macs_share: multiply-adds spent, as a share of the dense network's.
        waiting_for: what keeps the job from going on.
        error: why it failed.
        starts: how often it was begun since a row was answered.
    """

    status: Status = "queued"
    started: float | None = None
    ended: float | None = None
    rows: int = 0
    failed_rows: int = 0
    read_share: float = 0.0
    rows_per_second: float = 0.0
    seconds_left: float | None = None
    labels: dict[str, int] = {}
    mean_heads: float = 0.0
    macs_share: float = 0.0
    waiting_for: str | None = None
    error: str | None = None
    starts: int = 0

    @property
    def unfinished(self) -> bool:
        """Whether there is something left to do."""
        return self.status in ("queued", "running")


@dataclass(frozen=True)
class StoredJob:
    """A job and its folder."""

    folder: Path
    description: JobDescription

    @property
    def input(self) -> Path:
        """The rows."""
        return self.folder / f"input.{self.description.kind}"

    @property
    def result(self) -> Path:
        """The answers, if the job has finished."""
        return self.folder / f"result.{self.description.result_kind}"

    @property
    def exists(self) -> bool:
        """Whether it was not removed."""
        return self.folder.is_dir()

    def progress(self) -> JobProgress:
        """Read how far the job is."""
        try:
            content = (self.folder / "progress.json").read_bytes()
            return msgspec.json.decode(content, type=JobProgress)
        except (FileNotFoundError, msgspec.DecodeError):
            return JobProgress()

    def write_progress(self, progress: JobProgress) -> None:
        """Replace what is known of how far the job is.

        Raises:
            FileNotFoundError: the job was removed.
            OSError: it cannot be written.
        """
        replace_file(self.folder / "progress.json", msgspec.json.encode(progress))


class JobStore:
    """The jobs of a server.

    Args:
        state_dir: the folder in which `jobs` is; both are made when the first job comes.
    """

    def __init__(self, state_dir: Path) -> None:
        self.folder = state_dir / "jobs"

    def jobs(self) -> list[StoredJob]:
        """Return all jobs, newest first."""
        found = [job for name in self._names() if (job := self.get(name)) is not None]
        return sorted(found, key=lambda job: (job.description.created, job.folder), reverse=True)

    def get(self, job_id: str) -> StoredJob | None:
        """Return a job; None: there is none with this id."""
        if not _ID.fullmatch(job_id):
            return None
        folder = self.folder / job_id
        try:
            content = (folder / "job.json").read_bytes()
            return StoredJob(folder, msgspec.json.decode(content, type=JobDescription))
        except (OSError, msgspec.DecodeError):
            return None

    def count(self) -> Counter[Status]:
        """Count the jobs by status."""
        return Counter(job.progress().status for job in self.jobs())

    def next(self) -> StoredJob | None:
        """Return the oldest job that has not ended."""
        unfinished = (job for job in reversed(self.jobs()) if job.progress().unfinished)
        return next(unfinished, None)

    def check_room(self, max_jobs: int, max_bytes: int, more: int = 0) -> None:
        """Check that there is room for one more job, of so many bytes.

        Raises:
            StoreFullError: there is none.
        """
        if len(self._names(arriving=True)) >= max_jobs:
            raise StoreFullError(
                f"the server keeps {max_jobs} jobs, as many as it may; delete one that has ended"
            )
        self.check_bytes(max_bytes, more)

    def check_bytes(self, max_bytes: int, more: int = 0) -> None:
        """Check that the files of all jobs, and so many bytes more, are not too large.

        Raises:
            StoreFullError: they are.
        """
        if self._bytes() + more > max_bytes:
            raise StoreFullError(
                f"the files of all jobs would take more than {max_bytes} bytes; "
                "delete a job that has ended"
            )

    def receive(self, job_id: str, kind: Kind) -> Upload:
        """Return where a job's input can be written.

        Raises:
            OSError: the folder cannot be written.
        """
        for folder in (self.folder.parent, self.folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return Upload(self.folder, job_id, kind)

    def remove(self, job: StoredJob) -> None:
        """Remove a job with all of its files; one that runs is thereby cancelled.

        Raises:
            OSError: it cannot be removed.
        """
        leaving = self.folder / f".{uuid4().hex}"
        with suppress(FileNotFoundError):  # somebody else was faster
            job.folder.rename(leaving)
        shutil.rmtree(leaving, ignore_errors=True)

    def tidy(self, retention: float) -> None:
        """Remove jobs that ended so many seconds ago, and what is left of uploads and removals."""
        now = time.time()
        for job in self.jobs():
            ended = job.progress().ended
            if ended is not None and now - ended > retention:
                self.remove(job)
        for folder in self.folder.glob(".*/"):
            with suppress(OSError):
                if now - folder.stat().st_mtime > STALE_SECONDS and not _is_held(folder):
                    shutil.rmtree(folder)

    def lock(self) -> int | None:
        """Lock the folder and return the descriptor that holds the lock; None: another server does.

        Raises:
            OSError: the folder is not there, or cannot be written.
        """
        descriptor = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        return descriptor

    def _names(self, arriving: bool = False) -> list[str]:
        """Return the names of the jobs' folders, those of uploads among them if asked for."""
        mark = "." if arriving else ""
        try:
            found = os.listdir(self.folder)
            return [name for name in found if _ID.fullmatch(name.removeprefix(mark))]
        except (FileNotFoundError, NotADirectoryError):
            return []

    def _bytes(self) -> int:
        return sum(_sizes(self.folder))


class Upload:
    """A job's input while it arrives; as a whole the folder becomes a job."""

    def __init__(self, jobs: Path, job_id: str, kind: Kind) -> None:
        self._jobs, self._id = jobs, job_id
        self._folder = jobs / f".{job_id}"
        self._folder.mkdir(mode=0o700)
        self._held = os.open(self._folder, os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(self._held, fcntl.LOCK_EX)
        self._path = self._folder / f"input.{kind}"
        self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._open = True

    def write(self, part: bytes) -> None:
        """Add a part of the input.

        Raises:
            OSError: there is no room for it.
        """
        view = memoryview(part)
        while view:
            view = view[os.write(self._file, view) :]

    def accept(self, description: JobDescription) -> StoredJob:
        """Make a job of what has arrived; from here on it survives a restart of the machine.

        Raises:
            OSError: it cannot be written.
        """
        os.fsync(self._file)
        if description.source is not None:
            self._path.unlink()
        replace_file(self._folder / "job.json", msgspec.json.encode(description))
        folder = self._jobs / self._id
        self._folder.rename(folder)
        _sync(self._jobs)
        self.close()
        return StoredJob(folder, description)

    def close(self) -> None:
        """Let go of the input, and remove it unless it became a job."""
        if self._open:
            self._open = False
            os.close(self._file)
            shutil.rmtree(self._folder, ignore_errors=True)
            os.close(self._held)


def new_id() -> str:
    """Return the id of a new job, which nobody can guess."""
    return uuid4().hex


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_held(folder: Path) -> bool:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _sizes(folder: Path) -> Iterator[int]:
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _sizes(Path(entry.path))
            else:
                with suppress(FileNotFoundError):
                    yield entry.stat(follow_symlinks=False).st_size
