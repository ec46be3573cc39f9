"""Fork processes from a fork server that has already imported torch.

`import torch` takes seconds, and forked processes share its memory. The supervisor writes the
settings to the fork server's stdin, then a number for each process to fork. The fork server writes
to its stdout:

    NUMBER PID        the process was forked
    NUMBER PID CODE   the process has ended, with this exit code
    NUMBER -ERRNO     the process could not be forked
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import selectors
import signal
import subprocess
from asyncio import Future
from collections.abc import Sequence

import structlog

from service.process import encode_settings, read_line
from service.settings import Settings

log = structlog.get_logger()

POLL_SECONDS = 0.01


def fork_on_demand() -> int | None:
    """Fork a process for each number that is read from stdin, until stdin ends.

    No thread may run yet, since a forked process has only the thread that forked it. Output to
    stdout goes to stderr from now on.

    Returns:
        In each forked process, its number; in the fork server, None once stdin has ended.
    """
    answers = os.dup(1)
    os.dup2(2, 1)
    children: dict[int, tuple[int, int]] = {}
    """Number and process id, by the read end of a pipe; the process holds the write end open."""
    with selectors.DefaultSelector() as selector:
        selector.register(0, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fd:
                    selector.unregister(key.fd)
                    os.close(key.fd)
                    number, pid = children.pop(key.fd)
                    _, status = os.waitpid(pid, 0)
                    _write_numbers(answers, number, pid, os.waitstatus_to_exitcode(status))
                    continue
                line = read_line()
                if not line:
                    return None
                try:
                    read_end, write_end, pid = _fork()
                except OSError as error:  # EAGAIN, ENOMEM, EMFILE: a later fork may succeed
                    _write_numbers(answers, int(line), -(error.errno or errno.EAGAIN))
                    continue
                if not pid:
                    for fd in (answers, read_end, *children):
                        os.close(fd)
                    return int(line)
                os.close(write_end)
                selector.register(read_end, selectors.EVENT_READ)
                children[read_end] = int(line), pid
                _write_numbers(answers, *children[read_end])


def _fork() -> tuple[int, int, int]:
    """Fork, and return both ends of a pipe and the process id, 0 in the new process.

    Raises:
        OSError: there are too many processes or open files, or too little memory.
    """
    read_end, write_end = os.pipe()
    try:
        return read_end, write_end, os.fork()
    except OSError:
        os.close(read_end)
        os.close(write_end)
        raise


def _write_numbers(answers: int, *numbers: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # the supervisor ended, so stdin ends too
        os.write(answers, b" ".join(str(number).encode() for number in numbers) + b"\n")


class Forked:
    """A forked process, with the interface of `asyncio.subprocess.Process`."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._end: Future[int] = asyncio.get_running_loop().create_future()

    @property
    def returncode(self) -> int | None:
        """Exit code, negative for a signal; None while the process runs."""
        return self._end.result() if self._end.done() else None

    async def wait(self) -> int:
        """Wait until the process has ended, and return its exit code."""
        return await asyncio.shield(self._end)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self._signal(signal.SIGKILL)

    def ended(self, code: int) -> None:
        """Set the exit code of a process that has ended."""
        if not self._end.done():
            self._end.set_result(code)

    def _signal(self, number: signal.Signals) -> None:
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


class ForkServer:
    """Client of the fork server, which is started when a fork is requested and it does not run.

    Forked processes end with the fork server, since nothing else could report their exit codes.

    Args:
        command: command line of the fork server.
        settings: settings that it reads from stdin.
        seconds: longest time that a fork may take.
    """

    def __init__(self, command: Sequence[str], settings: Settings, seconds: float) -> None:
        self._command = command
        self._settings = settings
        self._seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._reading: asyncio.Task[None] | None = None
        self._requested: dict[int, Future[Forked]] = {}
        self._forked: dict[int, Forked] = {}
        self._starting = asyncio.Lock()

    @property
    def pid(self) -> int | None:
        """Process id of the fork server; None: it is not running."""
        if self._process is None or self._reading is None or self._reading.done():
            return None
        return self._process.pid

    async def fork(self, number: int) -> Forked:
        """Return a new process; it may have ended already, for example if its start failed.

        Raises:
            OSError: the fork server cannot be started, or cannot fork.
        """
        async with self._starting:
            if self._reading is None or self._reading.done():
                await self._start()
        forked: Future[Forked] = asyncio.get_running_loop().create_future()
        self._requested[number] = forked
        self._write_line(b"%d\n" % number)
        try:
            async with asyncio.timeout(self._seconds):
                return await asyncio.shield(forked)
        except TimeoutError:
            self._kill()
            return await forked

    async def stop(self) -> None:
        """End the fork server and all processes that it has forked."""
        if self._process is None or self._reading is None:
            return
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            async with asyncio.timeout(self._seconds):
                await asyncio.shield(self._reading)
        except TimeoutError:
            self._kill()
            await self._reading

    def _kill(self) -> None:
        log.error("fork server killed: not responding")
        assert self._process is not None
        self._process.kill()

    async def _start(self) -> None:
        # Not started by uvloop, which duplicates the descriptors of a child's pipes: forked
        # processes would inherit the duplicates, and this process would never read end-of-file.
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            self._command, stdin=pipe, stdout=pipe, bufsize=0, start_new_session=True
        )
        self._write_line(encode_settings(self._settings))
        output = asyncio.StreamReader()
        try:
            await asyncio.get_running_loop().connect_read_pipe(
                lambda: asyncio.StreamReaderProtocol(output), self._process.stdout
            )
        except BaseException:
            self._process.kill()
            raise
        self._reading = asyncio.create_task(self._read(self._process, output))

    def _write_line(self, line: bytes) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, so `_read` sees end-of-file
            self._process.stdin.write(line)

    async def _read(self, process: subprocess.Popen[bytes], output: asyncio.StreamReader) -> None:
        """Handle the output of the fork server until it ends, then end all its processes."""
        while not output.at_eof():
            try:
                self._handle(await output.readline())
            except (ValueError, KeyError, asyncio.InvalidStateError) as error:
                log.error("fork server: unexpected output ignored", reason=type(error).__name__)
            except OSError as error:
                log.error("fork server killed: broken pipe", reason=str(error))
                process.kill()
                break
        assert process.stdin is not None
        process.stdin.close()
        # Polled: waiting would need a thread, and the system may have no room for one.
        while (exit_code := process.poll()) is None:
            await asyncio.sleep(POLL_SECONDS)
        for forked in self._forked.values():
            forked.kill()
            forked.ended(exit_code)
        self._forked.clear()
        for request in self._requested.values():
            never_forked = Forked(process.pid)
            never_forked.ended(exit_code)
            request.set_result(never_forked)
        self._requested.clear()

    def _handle(self, line: bytes) -> None:
        """Handle one line of the fork server's output; an empty line means that it has ended."""
        if not line:
            return
        number, pid, *code = map(int, line.split())
        if code:
            self._forked.pop(pid).ended(code[0])
        elif pid < 0:
            self._requested.pop(number).set_exception(OSError(-pid, os.strerror(-pid)))
        else:
            self._forked[pid] = Forked(pid)
            self._requested.pop(number).set_result(self._forked[pid])
