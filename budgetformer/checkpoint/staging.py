"""Write checkpoint folders atomically."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from safetensors import SafetensorError

from budgetformer.checkpoint.manifest import MANIFEST
from budgetformer.errors import CheckpointError, one_line


@contextmanager
def staged(target: Path, replace: bool = False) -> Iterator[Path]:
    """Yield an empty folder that becomes `target` by one rename when the block ends.

    If the block fails or is interrupted (Ctrl-C, SIGTERM), `target` stays as it was.

    Args:
        target: folder to create, `<store>/<name>/<version>`.
        replace: whether an existing checkpoint is replaced.

    Raises:
        CheckpointError: the folder cannot be written (the disk is full, ...), or `target` exists.
    """
    with scratch_folder(target.parent, f".{target.name}.new-") as scratch, disk_errors(target):
        folder = scratch / "checkpoint"
        folder.mkdir()
        yield folder
        move_into_place(folder, target, replace)


@contextmanager
def scratch_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """Create `parent` and a temporary folder in it, which is removed at the end or on SIGTERM.

    Raises:
        CheckpointError: the folder cannot be created.
    """
    with disk_errors(parent):
        parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        with _sigterm_as_exit():
            yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def move_into_place(folder: Path, target: Path, replace: bool = False) -> None:
    """Flush a complete folder to the disk and rename it to `target`.

    Raises:
        CheckpointError: `target` exists and is not a checkpoint, or must not be replaced.
    """
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    target.parent.mkdir(exist_ok=True)
    if not target.exists():
        folder.rename(target)
        return
    check_replaceable(target, replace)
    previous = folder.with_name("previous")
    try:
        target.rename(previous)
        folder.rename(target)
    except BaseException:
        if not target.exists():
            previous.rename(target)
        raise


def check_replaceable(target: Path, replace: bool) -> None:
    """Check that a target does not exist, or is a checkpoint that may be replaced.

    Raises:
        CheckpointError: the target exists and must not be replaced.
    """
    if target.exists() and not (replace and (target / MANIFEST).is_file()):
        raise CheckpointError(f"{target}: exists; choose another version (--version or --out)")


@contextmanager
def disk_errors(path: Path | str) -> Iterator[None]:
    """Convert errors of disk writes in this block to `CheckpointError`."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise CheckpointError(f"{path}: {one_line(error)}") from error


@contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    """Raise `SystemExit` on SIGTERM in this block, so that clean-up runs."""
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def stop(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
