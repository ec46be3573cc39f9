"""Usage of keys, counted by several real processes in one memory file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from service import key_usage
from service.key_usage import KeyUsage, make_usage_file

FRONTENDS = 4
PROGRAM = """
import fcntl, sys
from service.key_usage import KeyUsage
whole = KeyUsage(*map(int, sys.argv[1:]))
usage = whole.of("web")
print("ready", flush=True)
for line in sys.stdin:
    print(eval(line), flush=True)
"""
SPEND = """
import os, time
def spend(seconds, rate, burst):
    end, taken = time.monotonic() + seconds, 0
    while (now := time.monotonic()) < end:
        taken += usage.take(1 / rate, burst / rate, now) == 0
    return taken
def crowd(seconds, limit, log):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if usage.begin(limit):
            os.write(log, b"+")
            os.write(log, b"-")
            usage.end()
"""


@dataclass
class Frontend:
    """A process that counts for the key `web`."""

    process: subprocess.Popen[str]

    def begin(self, line: str) -> None:
        """Start to evaluate a line of Python with `usage`."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def answer(self) -> str:
        """Return the next line of output."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask(self, line: str) -> str:
        """Return the value of a line of Python."""
        self.begin(line)
        return self.answer()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def file() -> Iterator[int]:
    descriptor = make_usage_file(FRONTENDS)
    yield descriptor
    os.close(descriptor)


@contextmanager
def frontend(file: int, row: int) -> Iterator[Frontend]:
    command = [sys.executable, "-c", SPEND + PROGRAM, str(file), str(FRONTENDS), str(row)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, pass_fds=[file]) as process:
        started = Frontend(process)
        assert started.answer() == "ready"
        try:
            yield started
        finally:
            process.kill()


@pytest.fixture
def frontends(file: int) -> Iterator[list[Frontend]]:
    with ExitStack() as stack:
        yield [stack.enter_context(frontend(file, row)) for row in range(FRONTENDS)]


def test_the_rate_holds_over_four_processes(
    frontends: list[Frontend],
) -> None:
    # A burst of a quarter second bridges pauses of the processes on a busy machine.
    rate, burst, seconds = 2000, 500, 2.0
    before = time.monotonic()
    for each in frontends:
        each.begin(f"spend({seconds}, {rate}, {burst})")
    taken = sum(int(each.answer()) for each in frontends)
    passed = time.monotonic() - before
    assert burst + rate * seconds * 0.97 <= taken <= burst + rate * passed + FRONTENDS


def test_one_process_gets_the_whole_rate_of_a_key(frontends: list[Frontend]) -> None:
    rate, burst, seconds = 2000, 500, 1.0
    taken = int(frontends[2].ask(f"spend({seconds}, {rate}, {burst})"))
    assert taken >= burst + rate * seconds * 0.97


def test_requests_of_all_processes_count_until_they_are_killed(
    file: int, frontends: list[Frontend]
) -> None:
    first, second, third, _ = frontends
    assert [first.ask("usage.begin(3)") for _ in range(2)] == ["True", "True"]
    assert second.ask("usage.begin(3)") == "True"
    assert third.ask("usage.begin(3)") == "False"
    os.kill(second.process.pid, signal.SIGSTOP)
    assert third.ask("usage.begin(3)") == "False"  # a stopped process keeps its requests
    first.kill()
    assert [third.ask("usage.begin(3)") for _ in range(3)] == ["True", "True", "False"]
    second.kill()
    with frontend(file, 1) as restarted:
        assert restarted.ask("usage.begin(3)") == "True"
        assert third.ask("usage.begin(3)") == "False"


def test_concurrent_requests_never_exceed_the_limit(
    frontends: list[Frontend], tmp_path: Path
) -> None:
    log, limit = tmp_path / "log", 2
    for each in frontends:
        each.begin(
            f"crowd(1, {limit}, os.open({str(log)!r}, os.O_CREAT | os.O_WRONLY | os.O_APPEND))"
        )
    assert [each.answer() for each in frontends] == ["None"] * FRONTENDS
    # Each sign is written while its request is counted, so the sum never exceeds the limit.
    running = list(accumulate(1 if sign == "+" else -1 for sign in log.read_text()))
    assert len(running) > 1000
    assert 1 <= max(running) <= limit
    assert running[-1] == 0


def test_a_restarted_process_continues_the_count(file: int) -> None:
    with frontend(file, 0) as first:
        assert first.ask("usage.take(100.0, 1.0, 1000.0)") == "0.0"
        first.kill()
    with frontend(file, 0) as restarted:
        assert restarted.ask("usage.take(1.0, 1.0, 1000.0)") == "100.0"


def test_a_process_killed_while_adding_a_key_does_not_block_others(
    file: int, frontends: list[Frontend]
) -> None:
    first, second, *_ = frontends
    assert first.ask("fcntl.lockf(int(sys.argv[1]), fcntl.LOCK_EX, 1, int(sys.argv[2]))") == "None"
    first.kill()
    assert second.ask("whole.of('another').begin(1)") == "True"
    with frontend(file, 0) as restarted:
        assert restarted.ask("whole.of('another').begin(1)") == "False"


def test_every_key_has_its_own_counts() -> None:
    usage = KeyUsage()
    names = ["a", "ab", "b", "x" * 64]
    assert all(usage.of(name).begin(1) for name in names)
    assert not any(usage.of(name).begin(1) for name in names)


def test_keys_above_the_maximum_are_limited_by_each_frontend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(key_usage, "MAX_NAMES", 1)
    usage = KeyUsage()
    usage.of("first")
    with capture_logs() as lines:
        other = usage.of("second")
    assert [line["key"] for line in lines] == ["second"]
    assert other.begin(1)
    assert not other.begin(1)
    assert usage.of("first").begin(1)
