"""The parent of a server's processes.

It holds the socket, starts front and engines, and replaces the dead.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import tempfile
import time
from pathlib import Path

import structlog

from budgetformer.checkpoint import read_store
from service.observability.traces import check_tracing
from service.process import child_command, encode_settings
from service.settings import Settings, SettingsError

log = structlog.get_logger()

FIRST_BACKOFF = 0.1
LONGEST_BACKOFF = 5.0
STEADY_SECONDS = 30.0
"""A child that lived this long is started again at once when it dies."""
KILL_SECONDS = 3.0


class _Child:
    """One process that is kept running."""

    def __init__(
        self, name: str, command: list[str], settings: bytes, descriptors: tuple[int, ...] = ()
    ) -> None:
        self.name = name
        self._settings = settings
        self._command = command
        self._descriptors = descriptors
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = False

    async def keep_running(self) -> None:
        """Start the process, and again whenever it ends, until `stop` or cancelled."""
        backoff = FIRST_BACKOFF
        while not self._stopping:
            started = time.monotonic()
            # The child watches its stdin: it ends when this process does, however that happens. A
            # session of its own keeps a terminal's Ctrl-C from it: this process says when to stop.
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.PIPE,
                pass_fds=self._descriptors,
                start_new_session=True,
            )
            assert self._process.stdin is not None
            self._process.stdin.write(self._settings)
            code = await self._process.wait()
            if self._stopping:
                return
            if time.monotonic() - started > STEADY_SECONDS:
                backoff = FIRST_BACKOFF
            log.error("a process died", process=self.name, code=code, restart_in=backoff)
            await asyncio.sleep(backoff)
            backoff = min(backoff * 2, LONGEST_BACKOFF)

    async def stop(self, patience: float) -> None:
        """Ask the process to end, wait for `patience` seconds, then kill it."""
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
                log.error("a process did not end in time", process=self.name)
                process.kill()
                await process.wait()


def bind(host: str, port: int) -> socket.socket:
    """Open the listening socket.

    Raises:
        SettingsError: the address cannot be had.
    """
    listener = None
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        if listener is not None:
            listener.close()
        raise SettingsError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    return listener


async def _supervise(settings: Settings, listener: socket.socket, run_dir: Path) -> None:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    front_command = child_command("service.front", str(run_dir), str(listener.fileno()))
    line = encode_settings(settings)
    front = _Child("front", front_command, line, (listener.fileno(),))
    engines = [
        _Child(f"engine-{i}", child_command("service.engine", str(run_dir), str(i)), line)
        for i in range(settings.engines)
    ]
    async with asyncio.TaskGroup() as tasks:
        for child in (*engines, front):
            tasks.create_task(child.keep_running())
        await stopping.wait()
        log.info("draining", seconds=settings.drain_seconds)
        # Without this the kernel would go on taking connections that nobody answers.
        listener.close()
        await front.stop(settings.drain_seconds + KILL_SECONDS)
        await asyncio.gather(*(engine.stop(KILL_SECONDS) for engine in engines))
    log.info("stopped")


def supervise(settings: Settings) -> None:
    """Run a server until SIGTERM or SIGINT, then drain it.

    Raises:
        SettingsError: the address cannot be had.
        CheckpointError: the model store is no folder.
        TracingError: the environment asks for traces that cannot be had.
    """
    check_tracing()
    store = read_store(settings.model_store)
    if settings.default_model is not None:
        store.find(settings.default_model)
    listener = bind(settings.host, settings.port)
    host, port = listener.getsockname()[:2]
    with tempfile.TemporaryDirectory(prefix="budgetformer-") as folder:
        run_dir = Path(folder)
        resolved = settings.model_copy(
            update={"port": port, "engines": settings.resolved_engines()}
        )
        # Children get their settings from this process alone.
        for name in [n for n in os.environ if n.upper().startswith("BUDGETFORMER_")]:
            del os.environ[name]
        log.info("starting", url=f"http://{host}:{port}", engines=resolved.engines)
        asyncio.run(_supervise(resolved, listener, run_dir))
