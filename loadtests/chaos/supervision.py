"""Faults of the supervisor's environment: forks, remote store, scrapes, stalls, ports."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from loadtests.chaos.load import Seen, under_load
from loadtests.chaos.server import MODEL, STORE, Server, Setup, inside, serving
from loadtests.servers import free_port

PID_GROUPS = (Path("/sys/fs/cgroup/pids"), Path("/sys/fs/cgroup"))
SHOWN_SECONDS = 3.0
"""Seconds within which `/health` shows a fault."""
STALL_SECONDS = 15.0
ERRORS = ("ValueError", "KeyError", "OSError", "SystemExit", "GeneratorExit", "CancelledError", "")
"""Exceptions that the store's driver raises, one after the other; empty: none."""
DRIVER = """
import asyncio, os
from pathlib import Path
from fsspec.implementations.memory import MemoryFileSystem

class Failing(MemoryFileSystem):
    def glob(self, path, **named):
        name = Path(os.environ["CHAOS_ERROR"]).read_text()
        if name == "CancelledError":
            raise asyncio.CancelledError
        if name:
            raise getattr(__builtins__, name, None) or __builtins__[name]
        return []
"""
REGISTER = """
import fsspec
fsspec.register_implementation("failing", "chaos_driver.Failing")
"""
HOSTILE = (
    "text/plain; version=abc", "text/plain;version=1e999", "application/openmetrics-text;version=x",
    "application/openmetrics-text;q=nan", ",;=;,", "\xe9" * 1000, "x" * 20_000,
)  # fmt: skip


@contextmanager
def _pids() -> Iterator[Path]:
    """Create a control group (version 1 or 2) that can limit processes and threads."""
    root = next(p for p in PID_GROUPS if (p / "cgroup.procs").exists())
    group = root / f"budgetformer-chaos-{os.getpid()}"
    group.mkdir()
    try:
        yield group
    finally:
        group.rmdir()


def no_pids_group() -> str | None:
    """Return the missing requirement for limiting processes, if any."""
    try:
        with _pids() as group:
            (group / "pids.max").write_text("max")
    except (OSError, StopIteration):
        return "needs root and a control group that limits pids"
    return None


async def _health(server: Server) -> dict[str, list[str]]:
    health: dict[str, list[str]] = (await server.plain.get("/health")).json()
    return health


async def fork(repeats: int) -> Seen:
    """Kill engines and frontends while the control group allows no new process or thread."""
    with _pids() as group:
        async with serving(Setup(before=inside(group))) as server:

            async def work(seen: Seen) -> None:
                await asyncio.sleep(1)  # until the background work of a load is done
                for kind in ("engine", "frontend") * max(1, repeats // 10):
                    (group / "pids.max").write_text("1")
                    server.processes(kind)[0].kill()
                    await asyncio.sleep(SHOWN_SECONDS)
                    (reason,) = (await _health(server))["crash_loops"]
                    assert "could not be started" in reason, reason
                    (group / "pids.max").write_text("max")
                    seen.recovery.append(await server.until_whole())
                seen.notes.append("`/health` named each under `crash_loops`")

            return await under_load(server, work)


async def store(repeats: int) -> Seen:
    """Poll a remote store whose driver raises one exception after another."""
    with tempfile.TemporaryDirectory(prefix="budgetformer-driver-") as name:
        folder = Path(name)
        (folder / "chaos_driver.py").write_text(DRIVER)
        (folder / "sitecustomize.py").write_text(REGISTER)
        wanted = folder / "error"
        wanted.write_text("ValueError")  # at start already: models of the local store are served
        setup = Setup(
            {"remote-store": "failing://bucket/models", "poll-store-seconds": 0.2},
            environment={"PYTHONPATH": name, "CHAOS_ERROR": str(wanted)},
        )
        async with serving(setup) as server:

            async def work(seen: Seen) -> None:
                for error in ERRORS * max(1, repeats // 10):
                    wanted.write_text(error)
                    started = time.perf_counter()
                    while error not in " ".join((await _health(server))["errors"] or [""]) or (
                        not error and (await _health(server))["errors"]
                    ):
                        assert time.perf_counter() - started < 20, f"{error} is not shown"
                        await asyncio.sleep(0.05)
                seen.recovery.append(await server.until_whole())
                seen.notes.append(f"`/health` showed {len(ERRORS) - 1} errors, and their end")

            return await under_load(server, work)


async def scrape(repeats: int) -> Seen:
    """Scrape with invalid Accept headers while models are loaded."""
    async with serving() as server:

        async def work(seen: Seen) -> None:
            statuses: set[int] = set()
            for _ in range(max(1, repeats // 4)):
                loading = asyncio.create_task(server.change("load", MODEL))
                while not loading.done():
                    for accept in HOSTILE:
                        headers = {b"Accept": accept.encode("latin-1")}
                        answer = await server.plain.get("/metrics", headers=headers)
                        statuses.add(answer.status_code)
                        assert answer.status_code != 200 or "budgetformer_" in answer.text
                    await asyncio.sleep(0.02)
                assert (await loading).status_code == 200
            codes = ", ".join(map(str, sorted(statuses)))
            seen.notes.append(f"scrapes got {codes}; every load was answered")
            seen.recovery.append(await server.until_whole())

        return await under_load(server, work)


async def stalled(repeats: int) -> Seen:  # noqa: ARG001
    """Suspend the supervisor, which contains the hub, and resume it."""
    async with serving() as server:

        async def work(seen: Seen) -> None:
            seen.memory.append(server.memory())
            os.kill(server.process.pid, signal.SIGSTOP)
            try:
                until = time.perf_counter() + STALL_SECONDS
                waits = []
                while time.perf_counter() < until:
                    started = time.perf_counter()
                    answer = await server.plain.get("/metrics")
                    waits.append(time.perf_counter() - started)
                    assert answer.status_code == 503, answer.status_code
                    await asyncio.sleep(0.5)
            finally:
                os.kill(server.process.pid, signal.SIGCONT)
            seen.notes.append(f"scrapes got 503 within {max(waits):.1f} s")
            seen.recovery.append(await server.until_whole())
            seen.memory.append(server.memory())

        seen = await under_load(server, work)
        await asyncio.sleep(1)
        metrics = (await server.plain.get("/metrics")).text
        line = r'^budgetformer_requests_total{outcome="ok",route="/classify"} (\S+)$'
        match = re.search(line, metrics, re.MULTILINE)
        counted = int(float(match[1])) if match else 0
        answered = seen.outcomes["200"] + 1  # one more: the request that learned the right answers
        seen.notes.append(f"counted {counted:,} of {answered:,} answers")
        assert counted == answered
        return seen


async def port(repeats: int) -> Seen:
    """Start another server on the metrics port of one that runs, and kill its frontends."""
    taken = free_port()
    async with serving(Setup({"metrics-port": taken}, probes=taken)) as server:

        async def work(seen: Seen) -> None:
            command = [
                sys.executable, "-m", "service.cli", "serve", "--port=0", f"--model-store={STORE}",
                "--engines=1", "--fronts=2", f"--metrics-port={taken}",
            ]  # fmt: skip
            done = await asyncio.to_thread(
                subprocess.run, command, capture_output=True, text=True, timeout=60, check=False
            )
            (line,) = done.stderr.splitlines()
            assert f":{taken}" in line, line
            seen.notes.append(
                f"the second server ended with exit code {done.returncode} and one line"
            )
            failed = probed = 0
            for _ in range(max(1, repeats // 10)):
                server.processes("frontend")[0].kill()
                until = time.perf_counter() + SHOWN_SECONDS
                while time.perf_counter() < until:
                    probed += 1
                    try:
                        failed += (await server.plain.get("/health/ready")).status_code != 200
                    except httpx.TransportError:
                        failed += 1
                    await asyncio.sleep(0.02)
                seen.recovery.append(await server.until_whole())
            seen.notes.append(f"{failed} of {probed} probes failed while a frontend was replaced")

        return await under_load(server, work)
