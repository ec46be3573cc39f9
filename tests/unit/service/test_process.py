"""Code that all processes share: silence of other processes, memory, imports."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from service import process
from service.process import on_silence


@pytest.fixture(autouse=True)
def _short_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "WATCH_SECONDS", 0.02)


async def silent(last_seen: dict[str, float], limit: float, until: int = 1) -> list[str]:
    """Return the names called as silent, after `until` calls or one second."""
    called: list[str] = []
    watching = asyncio.create_task(on_silence(lambda: last_seen, limit, called.append))
    end = time.monotonic() + 1
    while len(called) < until and time.monotonic() < end:
        await asyncio.sleep(0.01)
    watching.cancel()
    return called


async def test_only_silent_processes_are_called() -> None:
    now = time.monotonic()
    assert set(await silent({"quiet": now, "talking": now + 3600}, limit=0.1)) == {"quiet"}


async def test_calls_repeat_while_the_silence_lasts() -> None:
    assert await silent({"quiet": time.monotonic()}, limit=0.05, until=3) == ["quiet"] * 3


async def test_no_process_is_called_before_the_limit() -> None:
    assert await silent({"quiet": time.monotonic()}, limit=60) == []


async def test_no_process_is_called_after_this_process_was_stopped() -> None:
    called: list[str] = []
    last_seen = {"waiting": time.monotonic()}
    watching = asyncio.create_task(on_silence(lambda: last_seen, 0.5, called.append))
    await asyncio.sleep(0.01)
    time.sleep(0.7)  # noqa: ASYNC251  # stops the whole process
    await asyncio.sleep(0.1)
    watching.cancel()
    assert called == []


def test_large_blocks_are_mapped_while_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    options: list[tuple[int, int]] = []
    library = SimpleNamespace(mallopt=lambda name, value: options.append((name, value)))
    monkeypatch.setattr(process.ctypes, "CDLL", lambda _: library)
    with process.mmap_large_blocks():
        assert options == [(process.MMAP_THRESHOLD, process.LARGE_BYTES)]
    assert options[1:] == [
        (process.MMAP_THRESHOLD, process.KEPT_BYTES),
        (process.TRIM_THRESHOLD, 2 * process.KEPT_BYTES),
    ]


def test_a_c_library_without_mallopt_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process.ctypes, "CDLL", lambda _: SimpleNamespace())
    with process.mmap_large_blocks():
        pass


def test_rich_is_not_imported_by_servers() -> None:
    code = "import service.without_rich, structlog, sys; "
    code += "print([name for name in sys.modules if name.startswith('rich')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['rich']"
