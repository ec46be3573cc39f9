"""Processes forked from one that has already imported what they need.

`import torch` takes seconds, and memory that forked processes share. The supervisor writes a number
for each process that it wants to the fork server's stdin, after its settings; the fork server says
on its stdout `NUMBER PID` when it has forked it, `NUMBER PID CODE` when that has ended, and
`NUMBER -ERRNO` when it could not fork it.
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
    """Fork a process for every number that comes, until stdin ends.

    There must be no thread yet: a fork leaves all but its own behind. What is printed goes to
    stderr from now on.

    Returns:
        In each forked process its number; in the fork server, at the end, None.
    """
    answers = os.dup(1)
    os.dup2(2, 1)
    lives: dict[int, tuple[int, int]] = {}
    """Number and process id, by a pipe whose other end is open for as long as the process lives."""
    with selectors.DefaultSelector() as heard:
        heard.register(0, selectors.EVENT_READ)
        while True:
            for key, _ in heard.select():
                if key.fd:
                    heard.unregister(key.fd)
                    os.close(key.fd)
                    number, pid = lives.pop(key.fd)
                    _, status = os.waitpid(pid, 0)
                    _say(answers, number, pid, os.waitstatus_to_exitcode(status))
                    continue
                line = read_line()
                if not line:
                    return None
                try:
                    ends, stays, pid = _fork()
                except OSError as error:  # EAGAIN, ENOMEM, EMFILE: this one alone is not forked
                    _say(answers, int(line), -(error.errno or errno.EAGAIN))
                    continue
                if not pid:
                    for fd in (answers, ends, *lives):
                        os.close(fd)
                    return int(line)
                os.close(stays)
                heard.register(ends, selectors.EVENT_READ)
                lives[ends] = int(line), pid
                _say(answers, *lives[ends])


def _fork() -> tuple[int, int, int]:
    """Fork, and return both ends of a pipe and the process id, 0 in the new process.

    Raises:
        OSError: there are too many processes or open files, or too little memory.
    """
    ends, stays = os.pipe()
    try:
        return ends, stays, os.fork()
    except OSError:
        os.close(ends)
        os.close(stays)
        raise


def _say(answers: int, *numbers: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # the supervisor is gone, and stdin will say so
        os.write(answers, b" ".join(str(number).encode() for number in numbers) + b"\n")


class Forked:
    """A forked process, as `asyncio.subprocess.Process` is one that was started."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._end: Future[int] = asyncio.get_running_loop().create_future()

    @property
    def returncode(self) -> int | None:
        """Its exit code, negative for a signal; None: it runs."""
        return self._end.result() if self._end.done() else None

    async def wait(self) -> int:
        """Await its end, and return its exit code."""
        return await asyncio.shield(self._end)

    def terminate(self) -> None:
        """Ask it to end."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it."""
        self._signal(signal.SIGKILL)

    def ended(self, code: int) -> None:
        """Note that it has ended."""
        if not self._end.done():
            self._end.set_result(code)

    def _signal(self, number: signal.Signals) -> None:
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


class ForkServer:
    """Start the fork server when a process is wanted and it does not run.

    Processes do not outlive the server that they come from: nobody would hear how they end.

    Args:
        command: its command line.
        settings: what it is told.
        seconds: how long it may take to fork a process.
    """

    def __init__(self, command: Sequence[str], settings: Settings, seconds: float) -> None:
        self._command = command
        self._settings = settings
        self._seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._hearing: asyncio.Task[None] | None = None
        self._asked: dict[int, Future[Forked]] = {}
        self._forked: dict[int, Forked] = {}
        self._starting = asyncio.Lock()

    @property
    def pid(self) -> int | None:
        """Its process id; None: it does not run now."""
        process, hearing = self._process, self._hearing
        lives = process is not None and hearing is not None and not hearing.done()
        return process.pid if process is not None and lives else None

    async def fork(self, number: int) -> Forked:
        """Return a new process, which may have ended already, as it does if it cannot begin.

        Raises:
            OSError: the fork server cannot be started, or cannot fork.
        """
        async with self._starting:
            if self._hearing is None or self._hearing.done():
                await self._start()
        forked: Future[Forked] = asyncio.get_running_loop().create_future()
        self._asked[number] = forked
        self._tell(b"%d\n" % number)
        try:
            async with asyncio.timeout(self._seconds):
                return await asyncio.shield(forked)
        except TimeoutError:
            self._kill()
            return await forked

    async def stop(self) -> None:
        """End it, and what it has forked."""
        if self._process is None or self._hearing is None:
            return
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            async with asyncio.timeout(self._seconds):
                await asyncio.shield(self._hearing)
        except TimeoutError:
            self._kill()
            await self._hearing

    def _kill(self) -> None:
        log.error("fork server killed: not responding")
        assert self._process is not None
        self._process.kill()

    async def _start(self) -> None:
        # Not by the event loop: uvloop leaves a child second descriptors of its pipes. These would
        # be handed on, and nobody would hear the end of the first one.
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            self._command, stdin=pipe, stdout=pipe, bufsize=0, start_new_session=True
        )
        self._tell(encode_settings(self._settings))
        said = asyncio.StreamReader()
        try:
            await asyncio.get_running_loop().connect_read_pipe(
                lambda: asyncio.StreamReaderProtocol(said), self._process.stdout
            )
        except BaseException:
            self._process.kill()
            raise
        self._hearing = asyncio.create_task(self._hear(self._process, said))

    def _tell(self, line: bytes) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, as is about to be heard
            self._process.stdin.write(line)

    async def _hear(self, process: subprocess.Popen[bytes], said: asyncio.StreamReader) -> None:
        while not said.at_eof():
            try:
                self._heed(await said.readline())
            except (ValueError, KeyError, asyncio.InvalidStateError) as error:
                log.error("fork server: unexpected output ignored", reason=type(error).__name__)
            except OSError as error:
                log.error("fork server killed: broken pipe", reason=str(error))
                process.kill()
                break
        assert process.stdin is not None
        process.stdin.close()
        # Polled, as waiting takes a thread, and there may be no room for one.
        while (code_of_all := process.poll()) is None:
            await asyncio.sleep(POLL_SECONDS)
        for forked in self._forked.values():
            forked.kill()
            forked.ended(code_of_all)
        self._forked.clear()
        for asked in self._asked.values():
            stillborn = Forked(process.pid)
            stillborn.ended(code_of_all)
            asked.set_result(stillborn)
        self._asked.clear()

    def _heed(self, line: bytes) -> None:
        """Act on one line of the fork server; an empty one is the end."""
        if not line:
            return
        number, pid, *code = (int(word) for word in line.split())
        if code:
            self._forked.pop(pid).ended(code[0])
        elif pid < 0:
            self._asked.pop(number).set_exception(OSError(-pid, os.strerror(-pid)))
        else:
            self._forked[pid] = Forked(pid)
            self._asked.pop(number).set_result(self._forked[pid])
