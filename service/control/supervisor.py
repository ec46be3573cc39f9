"""The supervisor: the parent of a server's processes.

It holds the listening sockets and the hub, starts frontends and engines, and restarts processes
that die or hang.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from asyncio.subprocess import Process
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import structlog
import uvloop

from service.background import (
    FIRST_BACKOFF,
    LONGEST_BACKOFF,
    Background,
    describe,
    run_forever,
)
from service.control.catalog import Catalog
from service.control.fork_server import Forked, ForkServer
from service.control.hub import Hub
from service.control.job_watch import JobWatch
from service.control.mirror import copy_at_start, mirror_of
from service.control.poll import StorePoll
from service.control.reload import Reload
from service.environment import has_prefix
from service.ipc.engine_client import EngineClient
from service.key_usage import make_usage_file
from service.process import (
    bind,
    child_command,
    engine_socket,
    freeze_garbage_collector,
    hub_socket,
    on_silence,
    reserve,
    run_folder,
    start,
)
from service.settings import Settings, SettingsError
from service.telemetry.traces import check_tracing

log = structlog.get_logger()

CRASH_LOOP = 3
"""Number of failed starts in a row that `/health` reports. A start fails if the process cannot be
started, or ends before it serves."""
START_SECONDS = 120.0
"""Longest time from the start of a process to its first message."""
POLL_SECONDS = 0.1
KILL_SECONDS = 3.0
LONGEST_SOCKET = 103
"""Longest path of a local socket, in bytes, that every system accepts."""


class _Child:
    """A child process that is restarted whenever it ends.

    Args:
        name: name of the process, for people.
        start: starts it.
        report: called with the reason why it does not stay up, and with None when it does again.
    """

    def __init__(
        self,
        name: str,
        start: Callable[[], Awaitable[Process | Forked]],
        report: Callable[[str, str | None], None],
    ) -> None:
        self.name = name
        self.started = 0.0
        self._start = start
        self._report = report
        self._process: Process | Forked | None = None
        self._last_seen = 0.0
        self._served = False
        self._stopping = False

    @property
    def pid(self) -> int | None:
        """Process id; None: it is not running."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    @property
    def watched(self) -> bool:
        """Whether it runs, and was not told to stop."""
        return self.pid is not None and not self._stopping

    def silent_since(self, last_seen: float | None, patience: float) -> float:
        """Return when its silence began, on the monotonic clock.

        Args:
            heard: time of its last message; None: it is not connected.
            patience: seconds after its start for which it may be silent.
        """
        if last_seen is not None:
            self._last_seen = last_seen
        return self._last_seen if self._last_seen > self.started else self.started + patience

    async def keep_running(self) -> None:
        """Start the process, and restart it whenever it ends, until `stop` or cancelled."""
        backoff, failures = FIRST_BACKOFF, 0
        while not self._stopping:
            self.started, self._served = time.monotonic(), False
            reason = await self._run()
            if self._stopping:
                return
            if self._served:
                backoff, failures = FIRST_BACKOFF, 0
            else:
                failures += 1
            log.error("process down", process=self.name, reason=reason, restart_in=backoff)
            if failures >= CRASH_LOOP:
                self._report(
                    self.name,
                    f"{self.name} does not stay up: {reason}; {failures} failed starts in a row, "
                    f"next one in {backoff:g} s",
                )
            await asyncio.sleep(backoff)
            backoff = min(backoff * 2, LONGEST_BACKOFF)

    async def _run(self) -> str:
        """Run the process once, and return why it is down."""
        self._process = None
        try:
            self._process = await self._start()
        except Exception as error:  # for example too many processes or open files
            return f"it could not be started ({describe(error)})"
        if self._stopping:
            self._process.terminate()
        return f"it ended with exit code {await self._process.wait()}"

    def mark_serving(self) -> None:
        """Note that the process serves; if it ends later, it is restarted without delay."""
        if not self._served:
            self._served = True
            self._report(self.name, None)

    def kill(self) -> None:
        """Kill the process, since it does not respond."""
        if self.pid is not None and self._process is not None:
            log.error("process killed: not responding", process=self.name)
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def stop(self, patience: float) -> None:
        """Ask the process to end, wait up to `patience` seconds, then kill it."""
        self._stopping = True
        process = self._process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
            try:
                async with asyncio.timeout(patience):
                    await process.wait()
            except TimeoutError:
                log.error("process killed: did not end in time", process=self.name)
                process.kill()
                await process.wait()


class _Server:
    """All processes of one server, and its hub.

    Args:
        settings: settings of the server.
        catalog: versions to serve at the start.
        listeners: listening sockets of all frontends: the port for callers, and the port for
            probes and metrics, if it is a separate one.
        run_dir: folder for local sockets.
        started: start of this server, on the monotonic clock.
    """

    def __init__(
        self,
        settings: Settings,
        catalog: Catalog,
        listeners: Sequence[socket.socket],
        run_dir: Path,
        started: float,
    ) -> None:
        self._settings = settings
        self._started = started
        self._run_dir = run_dir
        sockets = [engine_socket(run_dir, i) for i in range(settings.engines)]
        self.hub = Hub(settings, catalog, sockets, self._family)
        self._forks = ForkServer(
            child_command("service.engine", str(run_dir)), settings, START_SECONDS
        )
        self._engines = [
            _Child(f"engine-{i}", partial(self._forks.fork, i), self.hub.report_crash_loop)
            for i in range(settings.engines)
        ]
        # The file outlives frontends, so the limits of keys still hold after a restart of one.
        usage = make_usage_file(settings.fronts)
        descriptors = [usage, *(listener.fileno() for listener in listeners)]
        self._frontends = [
            _Child(
                f"frontend-{i}",
                partial(self._start_frontend, i, descriptors),
                self.hub.report_crash_loop,
            )
            for i in range(settings.fronts)
        ]

        self._job_watch = JobWatch(
            lambda: self.hub.settings, self.hub.metrics, self.hub.report_problem
        )
        self._job_processes: list[_Child] = []
        """The process that runs jobs, while there are jobs to run."""

    async def _start_frontend(self, index: int, descriptors: Sequence[int]) -> Process:
        arguments = (str(self._run_dir), str(index), *map(str, descriptors))
        command = child_command("service.frontend", *arguments)
        return await start(command, self.hub.settings, descriptors)

    async def _start_jobs(self) -> Process:
        lock = self._job_watch.lock
        assert lock is not None
        command = child_command("service.jobs", str(self._run_dir), str(lock))
        return await start(command, self.hub.settings, [lock])

    async def _run_jobs(self) -> None:
        """Keep the process for jobs running while there are jobs."""
        while True:
            await self._job_watch.until_wanted()
            process = _Child("jobs", self._start_jobs, self.hub.report_crash_loop)
            self._job_processes.append(process)
            running = asyncio.create_task(process.keep_running())
            try:
                await self._job_watch.until_idle()
            finally:
                await process.stop(KILL_SECONDS)
                running.cancel()
                self._job_processes.remove(process)

    async def run(self) -> None:
        """Run all processes and tasks until cancelled."""
        socket = hub_socket(self._run_dir)
        settings, hub = self._settings, self.hub
        work: dict[str, Callable[[], Awaitable[None]]] = {
            "hub": partial(hub.serve, socket),
            "readiness": self._watch_serving,
            "job folder": self._job_watch.run,
            "job process": self._run_jobs,
            "silence": partial(on_silence, self._silent_since, settings.hang_seconds, _Child.kill),
        }
        work |= {child.name: child.keep_running for child in (*self._engines, *self._frontends)}
        if settings.poll_store_seconds:
            poll = StorePoll(hub, settings.models, mirror_of(settings))
            work["store"] = partial(poll.run, settings.poll_store_seconds)
        hub.tasks += work
        work["ready"] = self._announce
        async with asyncio.TaskGroup() as tasks:
            for name, run in work.items():
                tasks.create_task(run_forever(name, run, hub.report_problem))

    async def stop(self) -> None:
        """Let the frontends answer their requests, then end all processes."""
        patience = self._settings.drain_seconds + KILL_SECONDS
        jobs = [process.stop(KILL_SECONDS) for process in self._job_processes]
        await asyncio.gather(*jobs, *(frontend.stop(patience) for frontend in self._frontends))
        await asyncio.gather(*(engine.stop(KILL_SECONDS) for engine in self._engines))
        await self._forks.stop()

    async def _announce(self) -> None:
        """Log once that the server can classify."""
        await self.hub.ready.wait()
        settings = self._settings
        log.info(
            "ready",
            url=_url(settings),
            models=[checkpoint.label for checkpoint in self.hub.catalog.served.values()],
            seconds=round(time.monotonic() - self._started, 1),
            frontends=settings.fronts,
            engines=settings.engines,
            device=settings.device,
        )

    async def _watch_serving(self) -> None:
        """Note which processes serve, until cancelled."""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            for child, client in self._clients():
                if self.hub.fleet.equipped(client):
                    child.mark_serving()
            connected = {frontend.pid for frontend in self.hub.frontends}
            for child in self._hub_clients():
                if child.pid in connected:
                    child.mark_serving()

    def _silent_since(self) -> dict[_Child, float]:
        patience = START_SECONDS - self._settings.hang_seconds
        frontends = {frontend.pid: frontend.last_seen for frontend in self.hub.frontends}
        last_seen = [
            *((child, client.last_seen) for child, client in self._clients()),
            *((child, frontends.get(child.pid or 0)) for child in self._hub_clients()),
        ]
        return {child: child.silent_since(at, patience) for child, at in last_seen if child.watched}

    def _hub_clients(self) -> list[_Child]:
        return [*self._frontends, *self._job_processes]

    def _clients(self) -> Iterator[tuple[_Child, EngineClient]]:
        return zip(self._engines, self.hub.fleet.clients, strict=True)

    def _family(self) -> dict[str, int]:
        children = {c.name: c.pid for c in (*self._hub_clients(), *self._engines)}
        others = {"supervisor": os.getpid(), "fork-server": self._forks.pid}
        return {name: pid for name, pid in (others | children).items() if pid}


async def _supervise(
    settings: Settings,
    catalog: Catalog,
    listeners: Sequence[socket.socket],
    run_dir: Path,
    reading: tuple[Settings, Callable[[], Settings]],
    started: float,
) -> None:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    server = _Server(settings, catalog, listeners, run_dir, started)
    reload = server.hub.reload = Reload(server.hub, *reading)
    background = Background()
    loop.add_signal_handler(signal.SIGHUP, lambda: background.start(reload.quietly()))
    running = asyncio.create_task(server.run())
    waiting = asyncio.create_task(stopping.wait())
    await asyncio.wait({running, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    await background.stop()
    log.info("draining", seconds=settings.drain_seconds)
    # Otherwise the kernel would still accept connections, which nobody would answer.
    for listener in listeners:
        listener.close()
    await server.stop()
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    log.info("stopped")


def supervise(settings: Settings, given: Settings, read: Callable[[], Settings]) -> None:
    """Run a server until SIGTERM or SIGINT, then drain it; SIGHUP reloads the settings.

    Args:
        settings: settings of the server.
        given, read: see `Reload`.

    Raises:
        SettingsError: the server cannot listen on the address, no folder for sockets can be
            created, or its path is too long.
        CheckpointError: the model store is not a folder, or lacks the default model.
        TracingError: the environment asks for traces that are not available.
    """
    started = time.monotonic()
    check_tracing()
    mirror = mirror_of(settings)
    if mirror is not None:
        copy_at_start(mirror)
    catalog = Catalog(settings)
    ports = (
        [settings.port] if settings.metrics_port is None else [settings.metrics_port, settings.port]
    )
    # `port` is bound last: if it is 0, the system could choose the number of another port.
    grpc_port = settings.grpc_port
    held = nullcontext() if grpc_port is None else reserve(settings.host, grpc_port)
    *side, listener = (bind(settings.host, port) for port in ports)
    port = listener.getsockname()[1]
    with held, run_folder() as folder:
        run_dir = Path(folder)
        device, engines = settings.resolved_device(), settings.resolved_engines()
        resolved = settings.model_copy(update={"port": port, "device": device, "engines": engines})
        if len(os.fsencode(engine_socket(run_dir, engines))) > LONGEST_SOCKET:
            raise SettingsError(
                f"{run_dir.parent}: too long for sockets, let TMPDIR name a shorter folder"
            )
        # Children read their settings from stdin; the environment must not change them.
        for name in list(filter(has_prefix, os.environ)):
            del os.environ[name]
        log.info("starting", url=_url(resolved), engines=engines, device=device)
        freeze_garbage_collector()
        reading = (given, read)
        uvloop.run(_supervise(resolved, catalog, [listener, *side], run_dir, reading, started))


def _url(settings: Settings) -> str:
    scheme = "http" if settings.tls_cert is None else "https"
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"{scheme}://{host}:{settings.port}"
