"""Start the server into which faults are injected."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from loadtests.servers import family, free_port, memory

KEY = "a-key-for-this-run"
ADMIN = {"Authorization": f"Bearer {KEY}"}
MODEL, OTHER = "ag_news", "banking77"
PATIENCE = 60.0
STORE = Path("model_store")


def inside(group: Path) -> tuple[str, ...]:
    """Return the words to put before a command so that it joins a control group."""
    return "sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"


@dataclass(frozen=True)
class Setup:
    """The command line and environment of a server.

    Attributes:
        flags: flags of `budgetformer serve`, in addition to or instead of the common ones.
        before: words before the command, for a program that starts it.
        environment: further environment variables.
        log: file for stderr; None: the stderr of this process.
        models: models to serve.
        host: address to listen at, as clients reach it.
        probes: port of probes and metrics; None: the port of requests.
    """

    flags: Mapping[str, Any] = field(default_factory=dict)
    before: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    log: Path | None = None
    models: tuple[str, ...] = (MODEL, OTHER)
    host: str = "127.0.0.1"
    probes: int | None = None


class Server:
    """A running server, and its processes."""

    def __init__(self, setup: Setup) -> None:
        flags: dict[str, Any] = {
            "host": setup.host, "port": free_port(), "model-store": STORE, "engines": 2,
            "fronts": 2, "admin-key": KEY, "log-level": "error", "hang-seconds": 4,
            "dtype": "float32",  # answers then do not depend on the batch
        } | dict(setup.flags)  # fmt: skip
        self.port: int = flags["port"]
        self.url = f"http://{setup.host}:{self.port}"
        self.engines, self.fronts = int(flags["engines"]), int(flags["fronts"])
        self.models = len(setup.models)
        words = [f"--{name}={value}" for name, value in flags.items()]
        words += [f"--models={name}" for name in setup.models]
        command = [*setup.before, sys.executable, "-m", "service.cli", "serve", *words]
        with contextlib.ExitStack() as opened:
            log = opened.enter_context(setup.log.open("ab", buffering=0)) if setup.log else None
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stderr=log,
                env=os.environ | dict(setup.environment),
            )
        probes = f"http://{setup.host}:{setup.probes or self.port}"
        self.plain = httpx.AsyncClient(base_url=probes, timeout=10)

    async def stop(self) -> int:
        """Stop the server with SIGTERM, as a service manager does; return its exit code."""
        await self.plain.aclose()
        self.process.terminate()
        try:
            return await asyncio.to_thread(self.process.wait, 40)
        except subprocess.TimeoutExpired:
            for process in self.family():
                process.kill()
            raise

    def family(self) -> list[psutil.Process]:
        """Return all processes of the server."""
        return family(self.process.pid)

    def processes(self, kind: str) -> list[psutil.Process]:
        """Return the processes whose names begin with `kind`, oldest first."""
        by_age = []
        for process in self.family():
            with contextlib.suppress(psutil.Error):
                if process.name().startswith(kind):
                    by_age.append((process.create_time(), process.pid, process))
        return [process for *_, process in sorted(by_age, key=lambda entry: entry[:2])]

    def memory(self) -> float:
        """Return the memory of all processes in MiB, with shared pages counted once."""
        return memory(self.family())

    async def whole(self) -> bool:
        """Return whether all engines and frontends run and every engine has all models."""
        try:
            health = (await self.plain.get("/health")).json()
            metrics = (await self.plain.get("/metrics")).text
        except (httpx.HTTPError, ValueError):
            return False
        fronts = re.search(r"^budgetformer_fronts (\S+)$", metrics, re.MULTILINE)
        alive = sum(engine["alive"] for engine in health["engines"])
        return (
            health["status"] == "ok"
            and alive == self.engines
            and all(len(engine["models"]) == self.models for engine in health["engines"])
            and fronts is not None
            and float(fronts[1]) == self.fronts
        )

    async def until_whole(self) -> float:
        """Wait until `whole`, and return the seconds that it took.

        Raises:
            RuntimeError: the server ended, or is not whole after `PATIENCE` seconds.
        """
        started = time.perf_counter()
        while not await self.whole():
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with exit code {self.process.returncode}")
            if time.perf_counter() - started > PATIENCE:
                raise RuntimeError(f"the server did not recover within {PATIENCE:g} s")
            await asyncio.sleep(0.05)
        return time.perf_counter() - started

    async def change(self, action: str, model: str) -> httpx.Response:
        """Load or unload a model, and return the response."""
        return await self.plain.post(f"/models/{model}/{action}", headers=ADMIN, timeout=PATIENCE)


@asynccontextmanager
async def serving(setup: Setup | None = None) -> AsyncIterator[Server]:
    """Run a server for this block, which begins when all its processes are ready."""
    server = Server(setup or Setup())
    try:
        await server.until_whole()
        yield server
    finally:
        await server.stop()
