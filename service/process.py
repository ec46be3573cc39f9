"""Functions for all processes of a server: sockets, settings, start and end, memory."""

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
"""Size from which blocks are allocated with `mmap`: while a model loads, and otherwise. glibc would
reach the second by itself."""
_T = TypeVar("_T")


def engine_socket(run_dir: Path, index: int) -> Path:
    """Return the socket of the engine `index`."""
    return run_dir / f"engine-{index}.sock"


def run_folder() -> TemporaryDirectory[str]:
    """Create a temporary folder for the sockets of one server.

    Raises:
        SettingsError: it can be created neither in the folder for temporary files nor in shared
            memory, which is writable even in containers with a read-only root.
    """
    for parent in (None, SHARED_MEMORY):
        with contextlib.suppress(OSError):
            return TemporaryDirectory(prefix="budgetformer-", dir=parent)
    raise SettingsError(
        f"cannot create a folder for sockets, not even in {SHARED_MEMORY}: mount a tmpfs on /tmp, "
        "or set TMPDIR to a folder that can be written"
    )


def hub_socket(run_dir: Path) -> Path:
    """Return the socket of the hub."""
    return run_dir / "hub.sock"


def receive_settings() -> Settings:
    """Read the settings that the parent writes to stdin, so that no secret is stored on a disk."""
    line = read_line()
    if not line:
        raise SystemExit("this process can only be started by `budgetformer serve`")
    return decode_settings(line)


def read_line() -> bytes:
    """Read one line from stdin, without buffering what follows; empty at end-of-file."""
    line = bytearray()
    while not line.endswith(b"\n"):
        part = os.read(0, 1)
        if not part:
            return b""
        line += part
    return bytes(line)


def exit_with_parent() -> None:
    """End this process with SIGTERM when its parent ends.

    The parent holds the other end of stdin, so this waits for a hang-up. It does not read from
    stdin, which the fork server needs.
    """

    def watch() -> None:
        hangup = select.poll()
        hangup.register(0, 0)
        hangup.poll()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True, name="parent-watch").start()


async def on_silence(
    last_messages: Callable[[], Mapping[_T, float]], limit: float, act: Callable[[_T], None]
) -> None:
    """Call `act` for each peer that has been silent for too long, until cancelled.

    Time in which this process itself was stopped does not count, since it could not receive then.

    Args:
        last_words: returns the time of each peer's last message, on the monotonic clock.
        limit: longest silence, in seconds.
        act: called with a silent peer, repeatedly while its silence lasts.
    """
    resumed = time.monotonic()
    while True:
        before = time.monotonic()
        await asyncio.sleep(WATCH_SECONDS)
        now = time.monotonic()
        if now - before > 2 * WATCH_SECONDS:
            resumed = now
        for peer, last_seen in last_messages().items():
            if now - max(last_seen, resumed) > limit:
                act(peer)


def resident_bytes() -> int:
    """Return the resident memory of this process."""
    return int(psutil.Process().memory_info().rss)


def freeze_garbage_collector() -> None:
    """Exclude all present objects from garbage collection, since most live as long as the process.

    Otherwise each full collection would traverse all modules, which takes about 30 ms.
    """
    return_memory()
    gc.freeze()


def collect_seldom() -> None:
    """Run the garbage collector less often, after as many new objects as a busy frontend holds.

    By default it runs after 700 new objects, which are a few requests, and finds little garbage.
    With hundreds of requests in flight that took a sixth of a frontend's time.
    """
    gc.set_threshold(50_000, 20, 50)


def name_process(name: str) -> None:
    """Set the name of this process, which `top` shows, if the system supports it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text(name)


@contextlib.contextmanager
def mmap_large_blocks() -> Iterator[None]:
    """Have glibc allocate large blocks with `mmap` in this context.

    Loading a model allocates large temporary copies. On the heap, they would leave holes between
    blocks that stay; mapped blocks are returned to the system when they are freed. Passes would be
    slower with them. Other C libraries are left unchanged.
    """
    mallopt = _glibc("mallopt")
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, LARGE_BYTES)
    try:
        yield
    finally:
        keep_large_blocks()


def keep_large_blocks() -> None:
    """Have glibc keep freed large blocks, since passes allocate blocks of the same sizes again."""
    mallopt = _glibc("mallopt")
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, KEPT_BYTES)
        mallopt(TRIM_THRESHOLD, 2 * KEPT_BYTES)


def return_memory() -> None:
    """Return free memory to the system, if the C library is glibc.

    The memory of a freed model lies between blocks that stay, and glibc would keep it.
    """
    gc.collect()
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(0)


def _glibc(name: str) -> Any:
    """Return a function of glibc; None: the C library does not have it."""
    return getattr(ctypes.CDLL(None), name, None)


def bind(host: str, port: int) -> socket.socket:
    """Open a listening socket.

    Raises:
        SettingsError: the address is not available.
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
    """Reserve a port on which each child process listens with SO_REUSEPORT.

    The returned socket does not listen, so it receives no connections.

    Raises:
        SettingsError: the address is not available.
    """
    bind(host, port).close()  # fails if another program listens there, with SO_REUSEPORT or not
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
    """Start a child process that reads its settings from stdin.

    Its stdin stays open until this process ends, so the child can end with it. The child runs in a
    new session, so Ctrl-C in a terminal does not reach it: this process decides when it stops.

    Args:
        command: command line.
        settings: settings to send.
        descriptors: open files that the child inherits.
    """
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.PIPE, pass_fds=descriptors, start_new_session=True
    )
    assert process.stdin is not None
    process.stdin.write(encode_settings(settings))
    return process


def encode_settings(settings: Settings) -> bytes:
    """Encode the settings, with secrets in the clear, as the line that a child reads from stdin."""
    values = settings.model_dump(mode="json")
    if settings.admin_key is not None:
        values["admin_key"] = settings.admin_key.get_secret_value()
    return json.dumps(values).encode() + b"\n"


def decode_settings(line: bytes) -> Settings:
    """Decode the settings that `encode_settings` encoded."""
    return Settings(**json.loads(line))
