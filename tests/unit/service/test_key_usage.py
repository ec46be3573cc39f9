"""Keys counted by several real processes over one file in memory."""

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
def crowd(seconds, most, log):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if usage.begin(most):
            os.write(log, b"+")
            os.write(log, b"-")
            usage.end()
"""


@dataclass
class Frontend:
    """A process that counts for the key `web`."""

    process: subprocess.Popen[str]

    def begin(self, line: str) -> None:
        """Have it evaluate a line with `usage`."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def answer(self) -> str:
        """Return what it says next."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask(self, line: str) -> str:
        """Return what a line evaluates to."""
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
def all_of_them(file: int) -> Iterator[list[Frontend]]:
    with ExitStack() as stack:
        yield [stack.enter_context(frontend(file, row)) for row in range(FRONTENDS)]


def test_a_rate_holds_over_four_processes_that_ask_as_fast_as_they_can(
    all_of_them: list[Frontend],
) -> None:
    # A quarter of a second of burst: on a busy machine nobody may be able to ask for as long.
    rate, burst, seconds = 2000, 500, 2.0
    before = time.monotonic()
    for one in all_of_them:
        one.begin(f"spend({seconds}, {rate}, {burst})")
    taken = sum(int(one.answer()) for one in all_of_them)
    passed = time.monotonic() - before
    assert burst + rate * seconds * 0.97 <= taken <= burst + rate * passed + FRONTENDS


def test_one_process_gets_the_whole_rate_of_a_key(all_of_them: list[Frontend]) -> None:
    rate, burst, seconds = 2000, 500, 1.0
    taken = int(all_of_them[2].ask(f"spend({seconds}, {rate}, {burst})"))
    assert taken >= burst + rate * seconds * 0.97


def test_requests_of_all_processes_count_and_those_of_a_killed_one_are_free_again(
    file: int, all_of_them: list[Frontend]
) -> None:
    first, second, third, _ = all_of_them
    assert [first.ask("usage.begin(3)") for _ in range(2)] == ["True", "True"]
    assert second.ask("usage.begin(3)") == "True"
    assert third.ask("usage.begin(3)") == "False"
    os.kill(second.process.pid, signal.SIGSTOP)
    assert third.ask("usage.begin(3)") == "False", "one that is stopped has its requests still"
    first.kill()
    assert [third.ask("usage.begin(3)") for _ in range(3)] == ["True", "True", "False"]
    second.kill()
    with frontend(file, 1) as again:
        assert again.ask("usage.begin(3)") == "True"
        assert third.ask("usage.begin(3)") == "False"


def test_no_more_are_under_way_than_allowed_however_many_ask(
    all_of_them: list[Frontend], tmp_path: Path
) -> None:
    log, most = tmp_path / "log", 2
    for one in all_of_them:
        one.begin(
            f"crowd(1, {most}, os.open({str(log)!r}, os.O_CREAT | os.O_WRONLY | os.O_APPEND))"
        )
    assert [one.answer() for one in all_of_them] == ["None"] * FRONTENDS
    # Each sign is written while its request is counted, so this is never above what was admitted.
    under_way = list(accumulate(1 if sign == "+" else -1 for sign in log.read_text()))
    assert len(under_way) > 1000
    assert 1 <= max(under_way) <= most
    assert under_way[-1] == 0


def test_a_process_that_starts_again_finds_what_was_spent(file: int) -> None:
    with frontend(file, 0) as first:
        assert first.ask("usage.take(100.0, 1.0, 1000.0)") == "0.0"
        first.kill()
    with frontend(file, 0) as again:
        assert again.ask("usage.take(1.0, 1.0, 1000.0)") == "100.0"


def test_a_process_killed_while_it_adds_a_key_keeps_no_other_from_it(
    file: int, all_of_them: list[Frontend]
) -> None:
    first, second, *_ = all_of_them
    assert first.ask("fcntl.lockf(int(sys.argv[1]), fcntl.LOCK_EX, 1, int(sys.argv[2]))") == "None"
    first.kill()
    assert second.ask("whole.of('another').begin(1)") == "True"
    with frontend(file, 0) as again:
        assert again.ask("whole.of('another').begin(1)") == "False"


def test_every_name_has_its_own_numbers() -> None:
    usage = KeyUsage()
    names = ["a", "ab", "b", "x" * 64]
    assert all(usage.of(name).begin(1) for name in names)
    assert not any(usage.of(name).begin(1) for name in names)


def test_a_key_beyond_the_most_is_limited_by_each_frontend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_usage, "MAX_NAMES", 1)
    usage = KeyUsage()
    usage.of("first")
    with capture_logs() as lines:
        other = usage.of("second")
    assert [line["key"] for line in lines] == ["second"]
    assert other.begin(1)
    assert not other.begin(1)
    assert usage.of("first").begin(1)
