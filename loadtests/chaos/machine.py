"""Faults of the machine: out of memory, full disk, clock jumps."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx

from loadtests.chaos.load import Seen, under_load
from loadtests.chaos.server import MODEL, OTHER, STORE, Server, Setup, inside, serving

THIRD = "imdb"
"""A model that is not served and does not fit into memory."""
ROOM_BYTES = 8 * 2**20
SETTLE_SECONDS = 3.0
JUMPS = ("+2d", "-2d", "+0", "+1h", "-400d", "+0")
"""Offsets of the wall clock from the real time."""
JUMP_SECONDS = 3.0
LIBRARIES = ("/usr/lib/*/faketime/libfaketime.so.1", "/usr/lib/faketime/libfaketime.so.1")


class _Names(NamedTuple):
    root: Path
    limit: str
    usage: str
    events: str


_VERSIONS = (
    _Names(Path("/sys/fs/cgroup"), "memory.max", "memory.current", "memory.events"),
    _Names(
        Path("/sys/fs/cgroup/memory"),
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "memory.oom_control",
    ),
)


class _Memory:
    """A control group (version 1 or 2) that limits memory."""

    def __init__(self, names: _Names) -> None:
        self._names = names
        self.folder = names.root / f"budgetformer-chaos-{os.getpid()}"
        self.folder.mkdir()

    def limit(self, size: int | None) -> None:
        """Allow this many bytes more than are used now; None: no limit."""
        unlimited = "max" if self._names.limit == "memory.max" else "-1"
        used = int((self.folder / self._names.usage).read_text())
        text = unlimited if size is None else str(used + size)
        (self.folder / self._names.limit).write_text(text)

    def kills(self) -> int:
        """Return how many processes of the group the kernel's OOM killer has killed."""
        lines = (self.folder / self._names.events).read_text().splitlines()
        counts = dict(line.split() for line in lines)
        return int(counts["oom_kill"])

    def remove(self) -> None:
        """Remove the group, whose processes have ended."""
        self.folder.rmdir()


@contextmanager
def _memory() -> Iterator[_Memory]:
    group = _Memory(
        next(
            names
            for names in _VERSIONS
            if (names.root / names.events).exists() or (names.root / "cgroup.controllers").exists()
        )
    )
    try:
        yield group
    finally:
        group.remove()


def no_memory_group() -> str | None:
    """Return the missing requirement for limiting memory, if any."""
    try:
        with _memory() as group:
            group.limit(None)
    except (OSError, StopIteration):
        return "needs root and a memory control group"
    return None


async def memory(repeats: int) -> Seen:
    """Load a model that exceeds the memory limit of the control group."""
    with _memory() as group:
        async with serving(Setup(before=inside(group.folder))) as server:

            async def work(seen: Seen) -> None:
                await asyncio.sleep(SETTLE_SECONDS)
                statuses = set()
                for _ in range(max(1, repeats // 5)):
                    group.limit(ROOM_BYTES)
                    killed = group.kills()
                    with contextlib.suppress(httpx.TransportError):
                        statuses.add((await server.change("load", THIRD)).status_code)
                    group.limit(None)
                    seen.recovery.append(await server.until_whole())
                    seen.notes = [f"processes killed for memory: {group.kills()}"]
                    assert group.kills() > killed
                    await asyncio.sleep(SETTLE_SECONDS)
                seen.notes.append(f"the load got {', '.join(map(str, sorted(statuses)))}")

            return await under_load(server, work)


@contextmanager
def _small_disk(size: int) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="budgetformer-disk-"))
    command = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=0755", "tmpfs", str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
        folder.rmdir()


def no_small_disk() -> str | None:
    """Return the missing requirement for mounting a small disk, if any."""
    try:
        with _small_disk(2**20):
            return None
    except (OSError, subprocess.CalledProcessError):
        return "needs root, to mount a small disk"


def _fill(path: Path) -> None:
    """Fill the disk of a path to the last byte."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        for size in (2**20, 2**12, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))


async def disk(repeats: int) -> Seen:
    """Fill the disk of log, run directory and store, and kill processes that must restart there."""
    stored = sum(f.stat().st_size for m in (MODEL, OTHER) for f in (STORE / m).rglob("*"))
    with _small_disk(stored + 8 * 2**20) as folder:
        for name in (MODEL, OTHER):
            shutil.copytree(STORE / name, folder / "store" / name)
        (folder / "run").mkdir()
        log = folder / "server.log"
        setup = Setup(
            {
                "model-store": folder / "store", "remote-store": f"file://{STORE.resolve()}",
                "poll-store-seconds": 1, "log-level": "info", "access-log": 1,
            },
            environment={"TMPDIR": str(folder / "run")}, log=log,
        )  # fmt: skip
        async with serving(setup) as server:

            async def work(seen: Seen) -> None:
                await asyncio.sleep(SETTLE_SECONDS)
                _fill(folder / "filling")
                seen.notes.append(f"bytes free: {shutil.disk_usage(folder).free}")
                for kind in ("engine", "frontend") * max(1, repeats // 10):
                    await asyncio.sleep(SETTLE_SECONDS)
                    server.processes(kind)[0].kill()
                    await asyncio.sleep(0.1)
                    seen.recovery.append(0.1 + await server.until_whole())
                size = log.stat().st_size
                (folder / "filling").unlink()
                await asyncio.sleep(SETTLE_SECONDS)
                assert log.stat().st_size > size, "the log did not continue after space was freed"
                seen.notes.append("the log continued after space was freed")

            return await under_load(server, work)


def _faketime() -> str | None:
    return next((str(p) for n in LIBRARIES for p in Path("/").glob(n[1:])), None)


def no_faketime() -> str | None:
    """Return the missing requirement for changing the clock, if any."""
    return None if _faketime() else "needs faketime (Debian: faketime)"


async def clock(repeats: int) -> Seen:  # noqa: ARG001
    """Make the wall clock of all processes jump forward and back; the monotonic clock continues."""
    library = _faketime()
    assert library is not None
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder) / "clock"
        wanted.write_text("+0\n")
        environment = {
            "LD_PRELOAD": library, "FAKETIME_TIMESTAMP_FILE": str(wanted),
            "FAKETIME_CACHE_DURATION": "1",  # without a cache, every read of the clock is slow
            "FAKETIME_DONT_FAKE_MONOTONIC": "1", "NO_FAKE_STAT": "1",
        }  # fmt: skip
        async with serving(Setup(environment=environment)) as server:

            async def work(seen: Seen) -> None:
                for jump in JUMPS:
                    _replace(wanted, jump)
                    await asyncio.sleep(JUMP_SECONDS)
                    if jump == "+2d":
                        offset = await _clock_offset(server)
                        assert offset > 100_000, f"the clock did not jump: {offset} s"
                for kind in ("engine", "frontend"):
                    _replace(wanted, "-1d" if kind == "frontend" else "+1d")
                    server.processes(kind)[0].kill()
                    await asyncio.sleep(0.1)
                    seen.recovery.append(0.1 + await server.until_whole())
                seen.notes.append(f"{len(JUMPS)} jumps")

            return await under_load(server, work)


def _replace(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(f"{text}\n")
    part.replace(path)


async def _clock_offset(server: Server) -> float:
    """Return the seconds between the server's clock and ours."""
    answer = await server.plain.post("/classify", json={"input": "What time is it?"})
    return abs(float(answer.json()["created"]) - time.time())
