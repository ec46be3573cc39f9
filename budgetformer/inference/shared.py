"""Weights that several processes hold once, in memory that has no name on any disk."""

from __future__ import annotations

import fcntl
import os
import stat
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from budgetformer.errors import one_line

ALIGNMENT = 64
"""Bytes that a tensor begins at a multiple of, as torch's own do."""


_files: dict[Path, int] = {}
"""Files that this process has made, by their links."""
_users: Counter[Path] = Counter()
"""How many hold such a file in this process."""


class SharedTensors:
    """Tensors that every process maps from one file in memory which names the same link.

    The first one makes the file. The others find it by the link, until all in that process have
    forgotten it, or it ends; then the next one makes another. Who has mapped it keeps it.

    Args:
        link: in a folder that no other user can write to.
    """

    def __init__(self, link: Path) -> None:
        self._link = link
        self._holds = False

    def hold(self, tensors: Sequence[Tensor]) -> None:
        """Let tensors lie there. Views that were taken before keep the memory as it was.

        Nobody may write to them afterwards: only its own process would see it.

        Args:
            tensors: on a CPU, contiguous.

        Raises:
            OSError: it cannot be made or mapped, and the tensors stay as they are.
        """
        sizes = [-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors]
        *starts, total = accumulate(sizes, initial=0)
        with (self._link.parent / "weights.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            file = self._open(total)
            if file is None:
                file = self._make(tensors, sizes)
            if self._link in _files and not self._holds:
                _users[self._link] += 1
                self._holds = True
        try:
            held = torch.from_file(
                f"/proc/self/fd/{file}", shared=False, size=total, dtype=torch.uint8
            )
        except RuntimeError as error:
            raise OSError(one_line(error)) from error
        finally:
            if file != _files.get(self._link):
                os.close(file)
        for tensor, start in zip(tensors, starts, strict=True):
            there = held[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            if torch.equal(there, tensor):
                tensor.data = there

    def forget(self) -> None:
        """Do without it: when all have forgotten what this process has made, nobody finds it.

        Its memory comes back when nobody has mapped it any more.
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

    def _open(self, total: int) -> int | None:
        """Open what the link leads to, unless that is gone, or something else by now."""
        try:
            file = os.open(self._link, os.O_RDONLY | os.O_NONBLOCK)
        except OSError:
            return None
        found = os.fstat(file)
        if stat.S_ISREG(found.st_mode) and found.st_size == total:
            return file
        os.close(file)
        return None

    def _make(self, tensors: Sequence[Tensor], sizes: Sequence[int]) -> int:
        if not hasattr(os, "memfd_create"):
            raise OSError("this system has no files in memory")
        self._drop()  # one that somebody has unlinked
        file = os.memfd_create(self._link.name)
        try:
            with os.fdopen(file, "wb", closefd=False) as writer:
                for tensor, size in zip(tensors, sizes, strict=True):
                    writer.write(tensor.detach().view(-1).view(torch.uint8).numpy().tobytes())
                    writer.write(bytes(size - tensor.nbytes))
            self._link.unlink(missing_ok=True)
            self._link.symlink_to(f"/proc/{os.getpid()}/fd/{file}")
        except BaseException:
            os.close(file)
            raise
        _files[self._link] = file
        return file
