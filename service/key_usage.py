"""The file in memory in which all frontends of a server count the use of each key."""

from __future__ import annotations

import fcntl
import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import structlog

from service.scheduling.rate import Numbers, SharedUsage

log = structlog.get_logger()

MAX_NAMES = 4096
"""Most names of keys in the lifetime of a server; removed keys keep their place in the file."""
NAME_BYTES = 64
NUMBERS = 3
"""Numbers for each key and frontend; see `SharedUsage`."""


def make_usage_file(frontends: int) -> int:
    """Create a file for this number of frontends, and return its descriptor.

    The file has no name and disappears with the last process that has it open. Memory is allocated
    only for keys that exist.

    Raises:
        OSError: the file cannot be created.
    """
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("key-usage")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.truncate(descriptor, _size(frontends))
    return descriptor


def _size(frontends: int) -> int:
    return NAME_BYTES * (1 + MAX_NAMES) + 8 * NUMBERS * MAX_NAMES * frontends


class KeyUsage:
    """Use of each key, counted by all frontends together.

    Each frontend holds a lock on the byte of its row for as long as it runs. The kernel releases
    the lock when the process ends, in whatever way. A process that then gets the lock knows that
    the requests of this row have ended, and may reset their number. The spent part of a rate stays.

    The file holds the number of names, the names, and `NUMBERS` arrays for each name, with one
    number for each frontend.

    Args:
        descriptor: descriptor from `make_usage_file`, which stays open; None: this frontend counts
            alone.
        frontends: number of frontends that share the file.
        row: index of this frontend.
    """

    def __init__(self, descriptor: int | None = None, frontends: int = 1, row: int = 0) -> None:
        self._descriptor = descriptor
        self._frontends = frontends
        self._row = row
        memory = memoryview(mmap.mmap(-1 if descriptor is None else descriptor, _size(frontends)))
        self._names = memory[: NAME_BYTES * (1 + MAX_NAMES)]
        self._count = self._names[:8].cast("q")
        self._numbers = memory[len(self._names) :].cast("d")
        self._slots: dict[str, int] = {}
        self._claim()

    def of(self, name: str) -> SharedUsage:
        """Return the usage of the key with this name."""
        if name not in self._slots:
            # Happens once for each name and frontend, and takes microseconds.
            with self._locked(self._frontends):
                self._read_names()
                if name not in self._slots and len(self._slots) < MAX_NAMES:
                    self._add(name)
        slot = self._slots.get(name)
        if slot is None:
            log.warning("key limited by each frontend alone: too many key names", key=name)
            alone = memoryview(bytearray(8 * NUMBERS)).cast("d")
            return SharedUsage(alone[:1], alone[1:2], alone[2:])
        return SharedUsage(*self._numbers_of(slot), self._row, self._release)

    def _read_names(self) -> None:
        for slot in range(len(self._slots), self._count[0]):
            start = NAME_BYTES * (1 + slot)
            name = bytes(self._names[start : start + NAME_BYTES]).rstrip(b"\0").decode()
            self._slots[name] = slot

    def _add(self, name: str) -> None:
        slot = self._slots[name] = len(self._slots)
        start = NAME_BYTES * (1 + slot)
        self._names[start : start + NAME_BYTES] = name.encode().ljust(NAME_BYTES, b"\0")
        # Written last: a process that is killed before this has added nothing.
        self._count[0] = slot + 1

    def _numbers_of(self, slot: int) -> tuple[Numbers, Numbers, Numbers]:
        count, start = self._frontends, slot * NUMBERS * self._frontends
        numbers = self._numbers[start : start + NUMBERS * count]
        return numbers[:count], numbers[count : 2 * count], numbers[2 * count :]

    def _claim(self) -> None:
        """Lock this frontend's row, and reset the requests of the process that had it before."""
        if self._descriptor is not None:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX, 1, self._row)
        with self._locked(self._frontends):
            self._read_names()
        for slot in self._slots.values():
            requests, *_ = self._numbers_of(slot)
            requests[self._row] = 0

    def _release(self, requests: Numbers) -> None:
        """Set the requests of frontends that have ended to 0."""
        for row, count in enumerate(requests):
            if count and row != self._row:
                try:
                    with self._locked(row, fcntl.LOCK_NB):
                        requests[row] = 0
                except OSError:  # the frontend still runs
                    continue

    @contextmanager
    def _locked(self, offset: int, flags: int = 0) -> Iterator[None]:
        """Hold the lock of one byte of the file.

        Raises:
            OSError: `flags` is `LOCK_NB`, and another process holds the lock.
        """
        if self._descriptor is None:
            yield
            return
        fcntl.lockf(self._descriptor, fcntl.LOCK_EX | flags, 1, offset)
        try:
            yield
        finally:
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, offset)
