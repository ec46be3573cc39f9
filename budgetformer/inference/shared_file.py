"""An anonymous in-memory file (memfd) that several processes map."""

from __future__ import annotations

import fcntl
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_files: dict[Path, int] = {}
"""Descriptors of the files that this process created, by link."""
_users: Counter[Path] = Counter()
"""Number of `SharedFile` objects in this process that use such a file."""


class SharedFile:
    """An in-memory file that all processes with the same link map.

    The first process creates the file. The others find it by the link until every user in the first
    process has called `forget`, or that process ends; then the next process creates a new one. An
    existing mapping stays valid.

    Args:
        link: path of the symbolic link, in a folder that no other user can write to.
    """

    def __init__(self, link: Path) -> None:
        self._link = link
        self._holds = False

    @contextmanager
    def opened(self, write: Callable[[BinaryIO], object], size: int | None = None) -> Iterator[int]:
        """Yield a descriptor of the file, which is open in this block.

        Args:
            write: writes the content to an open file, if there is no shared file yet.
            size: required size in bytes; a file of another size is replaced.

        Raises:
            OSError: the file cannot be created.
        """
        with (self._link.parent / "weights.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            file = self._open(size)
            if file is None:
                file = self._make(write)
            if self._link in _files and not self._holds:
                _users[self._link] += 1
                self._holds = True
        try:
            yield file
        finally:
            if file != _files.get(self._link):
                os.close(file)

    def forget(self) -> None:
        """Release the file; after the last release in this process, no other process can find it.

        The memory is freed when the last process unmaps it.
        """
        if self._holds:
            self._holds = False
            _users[self._link] -= 1
            if not _users[self._link]:
                self._drop()

    def _drop(self) -> None:
        file = _files.pop(self._link, None)
        if file is not None:
            self._link.unlink(missing_ok=True)
            os.close(file)

    def _open(self, size: int | None) -> int | None:
        """Open the link's target; None if it is gone or has another size."""
        try:
            file = os.open(self._link, os.O_RDONLY | os.O_NONBLOCK)
        except OSError:
            return None
        found = os.fstat(file)
        if stat.S_ISREG(found.st_mode) and size in (None, found.st_size):
            return file
        os.close(file)
        return None

    def _make(self, write: Callable[[BinaryIO], object]) -> int:
        if not hasattr(os, "memfd_create"):
            raise OSError("this system has no in-memory files (memfd_create)")
        self._drop()  # an earlier file whose link is gone
        file = os.memfd_create(self._link.name)
        try:
            with os.fdopen(file, "wb", closefd=False) as writer:
                write(writer)
            self._link.unlink(missing_ok=True)
            self._link.symlink_to(f"/proc/{os.getpid()}/fd/{file}")
        except BaseException:
            os.close(file)
            raise
        _files[self._link] = file
        return file
