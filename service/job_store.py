"""Jobs as files: the folder `state_dir`/jobs/<id>/ holds everything about one job.

    job.json          description of the job; written once, before the job appears
    input.<kind>      the rows; if they come from a URL, only once they are fetched
    result.<kind>     the answers, once they are complete; before that, `result.<kind>.part`
    progress.json     progress of the job; replaced by the process that runs jobs

Frontends add and remove folders; each folder appears and disappears as a whole. A folder whose name
begins with a dot is being uploaded or removed.
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
"""Statuses of stored jobs; a cancelled job is removed."""
STALE_SECONDS = 60.0
"""Time after its last change for which an unlocked upload or removal is kept."""
_ID = re.compile(r"[0-9a-f]{32}")
_LOCK = ".lock"


class StoreFullError(BudgetFormerError):
    """The limit of jobs, or of the bytes of their files, is reached."""


class JobDescription(msgspec.Struct, frozen=True, kw_only=True):
    """Description of a job, as its caller requested it.

    Attributes:
        id: 32 hexadecimal digits.
        owner: name of the caller's key.
        created: time of the request, in seconds since 1970.
        model: model version, as `name:version`.
        quality: quality level or accepted accuracy drop (percentage points); None: the model has no
            levels.
        heads: heads per layer, instead of the decision of f_o.
        kind: file type of the input.
        result_kind: file type of the result.
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
    """Progress of a job.

    Attributes:
        status: status of the job.
        started, ended: seconds since 1970.
        rows: number of answered rows.
        failed_rows: number of answered rows that failed individually.
        read_share: share of the input that was read, 0..1.
        rows_per_second: answered rows per second since the job was started or resumed.
        seconds_left: expected time to the end; None: unknown.
        labels: number of rows by label.
        mean_heads: mean number of heads computed for a row, summed over layers.
        macs_share: computed multiply-adds as a share of the dense network's.
        waiting_for: reason why the job does not proceed at present; None: it proceeds.
        error: reason why the job failed.
        starts: number of starts since the last answered row.
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
        """Whether the job has not ended."""
        return self.status in ("queued", "running")


@dataclass(frozen=True)
class StoredJob:
    """A job and its folder."""

    folder: Path
    description: JobDescription

    @property
    def input(self) -> Path:
        """File of the rows."""
        return self.folder / f"input.{self.description.kind}"

    @property
    def result(self) -> Path:
        """File of the answers; it exists once the job has finished."""
        return self.folder / f"result.{self.description.result_kind}"

    @property
    def exists(self) -> bool:
        """Whether the job still exists."""
        return self.folder.is_dir()

    def progress(self) -> JobProgress:
        """Read the progress of the job."""
        try:
            content = (self.folder / "progress.json").read_bytes()
            return msgspec.json.decode(content, type=JobProgress)
        except (FileNotFoundError, msgspec.DecodeError):
            return JobProgress()

    def write_progress(self, progress: JobProgress) -> None:
        """Replace the progress of the job.

        Raises:
            FileNotFoundError: the job was removed.
            OSError: the file cannot be written.
        """
        replace_file(self.folder / "progress.json", msgspec.json.encode(progress))


class JobStore:
    """The jobs of a server.

    Args:
        state_dir: parent of the folder `jobs`; both are created with the first job.
    """

    def __init__(self, state_dir: Path) -> None:
        self.folder = state_dir / "jobs"
        self._ended: dict[str, Status] = {}
        """Status by id of each job that is known to have ended; it does not change again."""

    def jobs(self) -> list[StoredJob]:
        """Return all jobs, newest first."""
        jobs = [job for name in self._names() if (job := self.get(name)) is not None]
        return sorted(jobs, key=lambda job: (job.description.created, job.folder), reverse=True)

    def get(self, job_id: str) -> StoredJob | None:
        """Return a job; None: no job has this id."""
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
        unfinished = [status for _, status in self._unfinished()]
        return Counter([*unfinished, *self._ended.values()])

    def next(self) -> StoredJob | None:
        """Return the oldest job that has not ended."""
        jobs = (job for job, _ in self._unfinished())
        return min(jobs, key=lambda job: (job.description.created, job.folder), default=None)

    def check_room(self, max_jobs: int, max_bytes: int, more: int = 0) -> None:
        """Check that there is room for another job.

        Args:
            max_jobs: most jobs.
            max_bytes: largest total size of the files of all jobs.
            more: size of the new job, in bytes.

        Raises:
            StoreFullError: there is no room.
        """
        if len(self._names(uploads=True)) >= max_jobs:
            raise StoreFullError(
                f"the server keeps at most {max_jobs} jobs (max_jobs); delete one that has ended"
            )
        self.check_bytes(max_bytes, more)

    def check_bytes(self, max_bytes: int, more: int = 0) -> None:
        """Check that the files of all jobs, and `more` bytes, take no more than `max_bytes`.

        Raises:
            StoreFullError: they take more.
        """
        if self._bytes() + more > max_bytes:
            raise StoreFullError(
                f"the files of all jobs would exceed {max_bytes} bytes (max_jobs_bytes); "
                "delete a job that has ended"
            )

    def receive(self, job_id: str, kind: Kind) -> Upload:
        """Create the upload of a job's input.

        Raises:
            OSError: the folder cannot be written.
        """
        for folder in (self.folder.parent, self.folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return Upload(self.folder, job_id, kind)

    def remove(self, job: StoredJob) -> None:
        """Remove a job with all its files; a running job is thereby cancelled.

        Raises:
            OSError: the job cannot be removed.
        """
        removed = self.folder / f".{uuid4().hex}"
        with suppress(FileNotFoundError):  # another process has removed it
            job.folder.rename(removed)
        shutil.rmtree(removed, ignore_errors=True)

    def tidy(self, retention: float) -> None:
        """Remove old jobs, and the remains of interrupted uploads and removals.

        Args:
            retention: seconds after its end for which a job is kept.
        """
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
        """Lock the folder, and return the descriptor that holds the lock.

        Returns:
            None if another server holds the lock.

        Raises:
            OSError: the folder does not exist, or cannot be written.
        """
        descriptor = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        return descriptor

    def _unfinished(self) -> list[tuple[StoredJob, Status]]:
        """Return the jobs that have not ended; the files of the others are read only once."""
        names = self._names()
        self._ended = {name: self._ended[name] for name in names if name in self._ended}
        unfinished: list[tuple[StoredJob, Status]] = []
        for job in filter(None, map(self.get, [n for n in names if n not in self._ended])):
            progress = job.progress()
            if progress.unfinished:
                unfinished.append((job, progress.status))
            else:
                self._ended[job.description.id] = progress.status
        return unfinished

    def _names(self, uploads: bool = False) -> list[str]:
        """Return the names of the jobs' folders, and of uploads if `uploads` is set."""
        prefix = "." if uploads else ""
        try:
            names = os.listdir(self.folder)
            return [name for name in names if _ID.fullmatch(name.removeprefix(prefix))]
        except (FileNotFoundError, NotADirectoryError):
            return []

    def _bytes(self) -> int:
        return sum(_sizes(self.folder))


class Upload:
    """Upload of a job's input; once it is complete, its folder becomes a job."""

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
        """Append a part of the input.

        Raises:
            OSError: the disk is full, or the file cannot be written.
        """
        view = memoryview(part)
        while view:
            view = view[os.write(self._file, view) :]

    def accept(self, description: JobDescription) -> StoredJob:
        """Turn the complete upload into a job, which then survives a restart of the machine.

        Raises:
            OSError: the job cannot be written.
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
        """Close the upload, and remove its files unless it became a job."""
        if self._open:
            self._open = False
            os.close(self._file)
            shutil.rmtree(self._folder, ignore_errors=True)
            os.close(self._held)


def new_id() -> str:
    """Return an id for a new job, which cannot be guessed."""
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
