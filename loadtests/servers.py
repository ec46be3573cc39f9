"""Start servers for load tests on dedicated cores, and measure their memory and time."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psutil

START_SECONDS = 120.0
SETTLE_SECONDS = 10.0
"""Seconds to wait until start-up work is done."""


def run_quietly(program: Sequence[str | Path]) -> None:
    """Run a program, and print its output only if it fails."""
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, program))}\n{done.stdout}{done.stderr}")


def free_port() -> int:
    """Return a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def family(pid: int) -> list[psutil.Process]:
    """Return a process and all its descendants; empty if it has ended."""
    try:
        top = psutil.Process(pid)
        return [top, *top.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def memory(processes: Iterable[psutil.Process]) -> float:
    """Return the memory of processes in MiB, with shared pages counted once."""
    mib = 0.0
    for process in processes:
        with contextlib.suppress(psutil.Error):  # the process has just ended
            mib += process.memory_full_info().pss / 2**20
    return mib


PARTS = {"frontend": "service.front", "engine": "service.engine"}
"""Parts of this service, in older versions too, and the beginning of a word in their commands."""


@dataclass(frozen=True)
class Cores:
    """The cores of the server and of the client."""

    server: tuple[int, ...]
    client: tuple[int, ...]

    @classmethod
    def split(cls, server: int | None = None) -> Cores:
        """Assign the last core to the client, and the others (at most `server`) to the server.

        If there is only one core, they share it.
        """
        cores = tuple(sorted(os.sched_getaffinity(0)))
        if len(cores) == 1:
            return cls(cores, cores)
        return cls(cores[:-1][:server], cores[-1:])

    @property
    def separate(self) -> bool:
        """Whether client and server have separate cores."""
        return not set(self.server) & set(self.client)

    def hold_client(self) -> None:
        """Pin this process to the client's cores."""
        os.sched_setaffinity(0, self.client)

    def describe(self) -> str:
        """Return a description for a report, on one line."""
        placement = "separate from the client" if self.separate else "shared with the client"
        return f"server on {len(self.server)} core(s), {placement}"


class ServerError(RuntimeError):
    """A server did not start."""


class Server:
    """A server process; as a context manager, it runs until the block ends.

    Args:
        command: command line; `{port}` is replaced by a free port.
        cores: cores that the server may use.
        ready: path that answers 200 once the server is ready.
        environment: further environment variables.
        folder: working directory.

    Attributes:
        port, url: port and base URL, also after another start.
        start_seconds: seconds from the last start until `ready` answered 200.
    """

    def __init__(
        self,
        command: Sequence[str],
        cores: Sequence[int],
        ready: str = "/health/ready",
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._command = [part.replace("{port}", str(self.port)) for part in command]
        self._cores, self._ready = set(cores), ready
        self._environment = dict(environment or {})
        self._folder = folder
        self.start_seconds = 0.0

    def start(self) -> Self:
        """Start the server, and return it when it is ready.

        Raises:
            ServerError: the server ends, or is not ready in time.
        """
        started = time.monotonic()
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=os.environ | self._environment,
            cwd=self._folder,
            preexec_fn=lambda: os.sched_setaffinity(0, self._cores),
        )
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `with` blocks exit
        try:
            self._wait_ready(started)
        except BaseException:
            self.stop()
            raise
        self.start_seconds = time.monotonic() - started
        return self

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _wait_ready(self, started: float) -> None:
        while not self._answers():
            if self._process.poll() is not None:
                code = self._process.returncode
                raise ServerError(f"{' '.join(self._command)} ended with exit code {code}")
            if time.monotonic() - started > START_SECONDS:
                raise ServerError(
                    f"{' '.join(self._command)} did not answer {self._ready} with 200 within "
                    f"{START_SECONDS:g} s"
                )
            time.sleep(0.05)

    def stop(self) -> None:
        """Stop the server with SIGTERM, and kill processes that it leaves behind."""
        processes = self.family()
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(30)
        self._kill(processes)

    def kill(self) -> None:
        """Kill all processes of the server at once."""
        self._kill(self.family())

    def _kill(self, processes: Sequence[psutil.Process]) -> None:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()
        psutil.wait_procs(processes, 10)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}{self._ready}", timeout=2) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def family(self) -> list[psutil.Process]:
        """Return all processes of the server."""
        return family(self._process.pid)

    def memory(self) -> float:
        """Return the memory of all processes in MiB, with shared pages counted once."""
        return memory(self.family())

    def resident(self) -> float:
        """Return the memory of all processes in MiB, with shared pages counted in each."""
        return sum(p.memory_info().rss for p in self.family()) / 2**20

    def cpu_seconds(self, part: str = "") -> float:
        """Return the processor time of the processes with a word in their command that begins with
        `part`, in seconds."""
        used = 0.0
        for process in self.family():
            with contextlib.suppress(psutil.Error):  # the process has just ended
                if any(word.startswith(part) for word in process.cmdline()):
                    times = process.cpu_times()
                    used += times.user + times.system
        return used

    def cpu_by_part(self) -> dict[str, float]:
        """Return the processor time of all processes in seconds, by part of this service."""
        parts = {part: self.cpu_seconds(word) for part, word in PARTS.items()}
        return parts | {"rest": self.cpu_seconds() - sum(parts.values())}

    def at_rest(self, seconds: float) -> float:
        """Return the share of a core that all processes use while idle."""
        time.sleep(SETTLE_SECONDS)
        before, began = self.cpu_seconds(), time.monotonic()
        time.sleep(seconds)
        return (self.cpu_seconds() - before) / (time.monotonic() - began)


def ours(
    cores: Sequence[int], *flags: str, engines: int | None = None, folder: Path | None = None
) -> Server:
    """Return a server of this project, not started yet.

    Args:
        cores: cores of the server.
        flags: further flags of `serve`.
        engines: number of engines; None: one per core.
        folder: another checkout to serve from, with its own virtual environment; None: this one.
    """
    python = sys.executable if folder is None else str(folder.absolute() / ".venv/bin/python")
    command = [
        python, "-m", "service.cli", "serve", "--port={port}", "--log-level=error",
        f"--engines={engines or len(cores)}", *flags,
    ]  # fmt: skip
    return Server(command, cores, folder=folder)
