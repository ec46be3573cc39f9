"""`budgetformer serve` as real processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.support.exposition import Exposition
from tests.support.waiting import wait_until

START_PATIENCE = 90.0
COMMAND = (sys.executable, "-P", "-c", "from service.cli import main; main()", "serve")


def free_port() -> int:
    """Return a free port."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def clean_environment() -> dict[str, str]:
    """Return this process's environment without settings of the server."""
    ours = ("BUDGETFORMER_", "OTEL_")
    kept = {k: v for k, v in os.environ.items() if not k.upper().startswith(ours)}
    return kept | {"PYTHONUNBUFFERED": "1"}


@dataclass
class Server:
    """A server and all its processes.

    `url` is for probes and `address` for callers; they differ if probes have a separate port.
    """

    process: subprocess.Popen[bytes]
    url: str
    log: Path
    address: str = ""

    @property
    def children(self) -> list[psutil.Process]:
        """The processes of this server without the supervisor."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def engines(self) -> dict[int, int]:
        """Return the process ids of the live engines, by index."""
        return {engine["index"]: engine["pid"] for engine in self._live_engines()}

    def _live_engines(self) -> list[dict[str, Any]]:
        try:
            body = httpx.get(f"{self.url}/health", timeout=30).json()
        except httpx.TransportError:
            return []
        return [engine for engine in body["engines"] if engine["alive"]]

    def in_flight(self) -> int:
        """Count the items that the frontend waits for."""
        body = httpx.get(f"{self.url}/health", timeout=30).json()
        return sum(int(engine["in_flight_items"]) for engine in body["engines"])

    def ready(self) -> bool:
        """Ask whether it can classify."""
        try:
            return httpx.get(f"{self.url}/health/ready", timeout=30).status_code == 200
        except httpx.TransportError:
            return False

    def scrape(self) -> Exposition:
        """Read all metrics."""
        return Exposition(httpx.get(f"{self.url}/metrics", timeout=30).text)

    def wait_ready(self, engines: int) -> None:
        """Wait until the server is ready and this number of engines have loaded the same models."""

        def all_ready() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            loaded = [engine["models"] for engine in self._live_engines()]
            equal = all(models and models == loaded[0] for models in loaded)
            return self.ready() and len(loaded) == engines and equal

        wait_until(all_ready, "readiness of the server", START_PATIENCE)

    def terminate(self) -> int:
        """Ask it to stop, and return its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(START_PATIENCE)


@contextmanager
def server(
    store: Path,
    folder: Path,
    *,
    engines: int,
    command: Sequence[str] = COMMAND,
    environment: dict[str, str] | None = None,
    probes: str | None = None,
    cwd: Path | None = None,
    **options: str,
) -> Iterator[Server]:
    """Run a server until it is ready; processes left afterwards are killed."""
    port = free_port()
    log = folder / "server.log"
    flags = {"port": port, "model_store": store, "engines": engines, "log_format": "json"}
    flags |= {"state_dir": folder / "state"} | options
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, *arguments],
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
            cwd=cwd,
            env=clean_environment() | (environment or {}),
        )
    address = f"http://127.0.0.1:{port}"
    running = Server(process, probes or address, log, address)
    family: list[psutil.Process] = []
    try:
        running.wait_ready(engines)
        family = running.children
        yield running
    finally:
        if process.poll() is None:
            family = running.children
            process.kill()
        process.wait()
        for child in family:
            if child.is_running():
                child.kill()
