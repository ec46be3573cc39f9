"""What the processes of one server share: the run directory, its files, and their life."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import json
import os
import select
import signal
import socket
import threading
import time
from asyncio.subprocess import Process
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import psutil

from budgetformer.subprocesses import python_command
from service.settings import Settings, SettingsError

WATCH_SECONDS = 0.5
SHARED_MEMORY = "/dev/shm"
MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1
"""Parameters of glibc's `mallopt`."""
LARGE_BYTES, KEPT_BYTES = 2**20, 2**25
"""Blocks apart while a model loads, and otherwise: what glibc comes to by itself."""
_T = TypeVar("_T")


def engine_socket(run_dir: Path, index: int) -> Path:
    """Return where engine `index` listens."""
    return run_dir / f"engine-{index}.sock"


def run_folder() -> TemporaryDirectory[str]:
    """Return a new folder for the sockets of one server, which goes when it is left.

    Raises:
        SettingsError: none can be made, neither where temporary files go nor in shared memory,
            which containers with a read-only root still have.
    """
    for place in (None, SHARED_MEMORY):
        with contextlib.suppress(OSError):
            return TemporaryDirectory(prefix="budgetformer-", dir=place)
    raise SettingsError(
        f"no folder can be written for sockets, not even {SHARED_MEMORY}: mount a tmpfs on /tmp, "
        "or let TMPDIR name a folder that can be written"
    )


def hub_socket(run_dir: Path) -> Path:
    """Return where the hub listens."""
    return run_dir / "hub.sock"


def receive_settings() -> Settings:
    """Read the settings from stdin, where the parent writes them: no secret is left on a disk."""
    line = read_line()
    if not line:
        raise SystemExit("this process is started by `budgetformer serve`")
    return decode_settings(line)


def read_line() -> bytes:
    """Read a line from stdin, and nothing of what follows; empty: stdin has ended."""
    line = bytearray()
    while not line.endswith(b"\n"):
        part = os.read(0, 1)
        if not part:
            return b""
        line += part
    return bytes(line)


def exit_with_parent() -> None:
    """End this process, by SIGTERM, when its parent ends.

    The parent holds the other side of stdin. What comes from there is for somebody else.
    """

    def watch() -> None:
        hangup = select.poll()
        hangup.register(0, 0)
        hangup.poll()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True, name="parent-watch").start()


async def on_silence(
    last_words: Callable[[], Mapping[_T, float]], limit: float, act: Callable[[_T], None]
) -> None:
    """Act on everyone who has been silent for too long, until cancelled.

    While this process itself stood still nobody could be heard, so that time does not count.

    Args:
        last_words: says when each was heard last, on the monotonic clock.
        limit: seconds.
        act: is called for each, again and again while the silence lasts.
    """
    still = time.monotonic()
    while True:
        before = time.monotonic()
        await asyncio.sleep(WATCH_SECONDS)
        now = time.monotonic()
        if now - before > 2 * WATCH_SECONDS:
            still = now
        for one, heard in last_words().items():
            if now - max(heard, still) > limit:
                act(one)


def resident_bytes() -> int:
    """Return this process's resident memory."""
    return int(psutil.Process().memory_info().rss)


def keep_what_is_here() -> None:
    """Spare the garbage collector what exists by now, which stays until this process ends.

    Else it would look through all modules again and again, for some thirty milliseconds each time.
    """
    return_memory()
    gc.freeze()


def collect_seldom() -> None:
    """Have the garbage collector look only after as many new objects as a busy frontend holds.

    By default it looks after seven hundred, a few requests, of which hardly any is done by then:
    where hundreds wait, that was a sixth of a frontend's time.
    """
    gc.set_threshold(50_000, 20, 50)


def name_process(name: str) -> None:
    """Have this process shown by its name, in `top` for one, where the system can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text(name)


@contextlib.contextmanager
def large_blocks_apart() -> Iterator[None]:
    """Have the C library take each large block from the system by itself, where it can.

    A model is loaded by way of copies that are soon let go. Taken from among what stays they leave
    holes that are kept; blocks of their own go back at once. For passes they would be slow.
    """
    mallopt = _glibc("mallopt")
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, LARGE_BYTES)
    try:
        yield
    finally:
        keep_large_blocks()


def keep_large_blocks() -> None:
    """Have the C library keep large blocks, where it can: passes ask for the same ones again."""
    mallopt = _glibc("mallopt")
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, KEPT_BYTES)
        mallopt(TRIM_THRESHOLD, 2 * KEPT_BYTES)


def return_memory() -> None:
    """Give free memory back to the system, where the C library can.

    A model's weights are freed among what stays, and the library would keep what lies between.
    """
    gc.collect()
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(0)


def _glibc(name: str) -> Any:
    """Return a function that only this C library has, or None."""
    return getattr(ctypes.CDLL(None), name, None)


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
        listener.setblocking(False)
    except OSError as error:
        if listener is not None:
            listener.close()
        raise SettingsError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    return listener


def reserve(host: str, port: int) -> socket.socket:
    """Hold a port for child processes that each listen on it by themselves (SO_REUSEPORT).

    Nobody connects to this socket: it does not listen.

    Raises:
        SettingsError: the address cannot be had.
    """
    bind(host, port).close()  # nobody else listens there, with that option or without
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    holder = socket.socket(family)
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    holder.bind((host, port))
    return holder


def child_command(module: str, *arguments: str) -> list[str]:
    """Return the command line of a child process that runs a module of this package."""
    return python_command("-m", module, *arguments)


async def start(
    command: Sequence[str], settings: Settings, descriptors: Sequence[int] = ()
) -> Process:
    """Start a child that reads its settings from its stdin.

    That stays open until this process ends, so the child ends with it, however that happens. A
    session of its own keeps a terminal's Ctrl-C from it: this process says when to stop.

    Args:
        command: its command line.
        settings: what it is told.
        descriptors: open files that it gets.
    """
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.PIPE, pass_fds=descriptors, start_new_session=True
    )
    assert process.stdin is not None
    process.stdin.write(encode_settings(settings))
    return process


def encode_settings(settings: Settings) -> bytes:
    """Return the settings, secrets in the clear, as the line that a child reads from its stdin."""
    values = settings.model_dump(mode="json")
    if settings.admin_key is not None:
        values["admin_key"] = settings.admin_key.get_secret_value()
    return json.dumps(values).encode() + b"\n"


def decode_settings(line: bytes) -> Settings:
    """Return the settings that `encode_settings` wrote."""
    return Settings(**json.loads(line))
