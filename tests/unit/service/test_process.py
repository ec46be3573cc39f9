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
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "WATCH_SECONDS", 0.02)


async def silent(last_seen: dict[str, float], limit: float, until: int = 1) -> list[str]:
    """Watch until somebody was acted on so many times, or for a second."""
    acted: list[str] = []
    watching = asyncio.create_task(on_silence(lambda: last_seen, limit, acted.append))
    end = time.monotonic() + 1
    while len(acted) < until and time.monotonic() < end:
        await asyncio.sleep(0.01)
    watching.cancel()
    return acted


async def test_who_is_silent_for_too_long_is_acted_on_and_nobody_else() -> None:
    now = time.monotonic()
    assert set(await silent({"quiet": now, "talking": now + 3600}, limit=0.1)) == {"quiet"}


async def test_as_long_as_the_silence_lasts() -> None:
    assert await silent({"quiet": time.monotonic()}, limit=0.05, until=3) == ["quiet"] * 3


async def test_nobody_is_acted_on_before_the_limit() -> None:
    assert await silent({"quiet": time.monotonic()}, limit=60) == []


async def test_while_this_process_itself_stood_still_nobody_could_be_heard() -> None:
    acted: list[str] = []
    last_seen = {"waiting": time.monotonic()}
    watching = asyncio.create_task(on_silence(lambda: last_seen, 0.5, acted.append))
    await asyncio.sleep(0.01)
    time.sleep(0.7)  # noqa: ASYNC251  # the whole process stands still
    await asyncio.sleep(0.1)
    watching.cancel()
    assert acted == []


def test_large_blocks_are_apart_until_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    library = SimpleNamespace(mallopt=lambda name, value: asked.append((name, value)))
    monkeypatch.setattr(process.ctypes, "CDLL", lambda _: library)
    with process.mmap_large_blocks():
        assert asked == [(process.MMAP_THRESHOLD, process.LARGE_BYTES)]
    assert asked[1:] == [
        (process.MMAP_THRESHOLD, process.KEPT_BYTES),
        (process.TRIM_THRESHOLD, 2 * process.KEPT_BYTES),
    ]


def test_a_library_without_such_blocks_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process.ctypes, "CDLL", lambda _: SimpleNamespace())
    with process.mmap_large_blocks():
        pass


def test_what_no_server_prints_is_not_imported() -> None:
    code = "import service.without_rich, structlog, sys; "
    code += "print([name for name in sys.modules if name.startswith('rich')])"
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert asked.stdout.strip() == "['rich']"
