"""A file in memory, with no name on any disk, that several processes map once."""

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
"""Files that this process has made, by their links."""
_users: Counter[Path] = Counter()
"""How many users of such a file this process has."""


class SharedFile:
    """A file in memory that every process maps which names the same link.

    The first process makes the file. The others find it by the link until all users in the first
    process have forgotten the file, or that process ends; the next process then makes another one.
    A process keeps what it has mapped.

    Args:
        link: in a folder that no other user can write to.
    """

    def __init__(self, link: Path) -> None:
        self._link = link
        self._holds = False

    @contextmanager
    def opened(self, write: Callable[[BinaryIO], object], size: int | None = None) -> Iterator[int]:
        """Yield a descriptor of the file, to be mapped in this block.

        Args:
            write: writes the content to an open file, if there is none yet.
            size: bytes that the file must have; a file of another size is made anew.

        Raises:
            OSError: it cannot be made.
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
        """Use the file no longer: no process finds it once all users here have forgotten it.

        Its memory is freed when no process has it mapped any more.
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
        """Open what the link leads to; None: it is gone, or it is another file by now."""
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
            raise OSError("this system has no files in memory")
        self._drop()  # one whose link is gone
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
