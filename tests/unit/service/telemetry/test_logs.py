"""The format of log lines.

Each test logs in a new process, because the configuration of loggers cannot be undone.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from service.telemetry.logs import MAX_LINES

PROGRAM = """
import logging, sys, structlog, threading
from service.telemetry.context import RequestContext, serving
from service.telemetry.logs import configure_logs
configure_logs(*sys.argv[1:])
log = structlog.get_logger()
log.debug("a detail", number=1)
log.info("an event", number=2)
logging.getLogger("elsewhere").warning("a %s", "warning")
logging.getLogger("uvicorn.access").warning("GET /?text=secret")
try:
    1 / 0
except ZeroDivisionError as error:
    log.error("a failure", exc_info=error)
"""
IN_A_REQUEST = """
trace = "0af7651916cd43dd8448eb211c80319c"

def fails():
    try:
        raise KeyError("xyzzy")
    except KeyError as error:
        raise ValueError("the text was xyzzy") from error

with serving(RequestContext("r-1", f"00-{trace}-b7ad6b7169203331-01")):
    log.warning("served")
    logging.getLogger("elsewhere").warning("served elsewhere")
    try:
        fails()
    except ValueError as error:
        log.error("failed", exc_info=error)
        log.error("failed again", exc_info=True)
        logging.getLogger("elsewhere").exception("failed elsewhere")
threading.Thread(target=log.warning, args=("beside",)).start()
"""


UNREAD_LOG = """
import sys, time, structlog
from service.telemetry import logs
logs.configure_logs("info", "json")
log = structlog.get_logger()
for number in range(2 * logs.MAX_LINES):
    log.info("an event", number=number)
print("done", flush=True)
sys.stdin.readline()
log.info("read again")
"""


def lines_of(*arguments: str, program: str = PROGRAM) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout == ""
    return done.stderr.splitlines()


def json_lines_of(*arguments: str, program: str = PROGRAM) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines_of(*arguments, program=program)]


@pytest.fixture(scope="module")
def at_info() -> list[dict[str, Any]]:
    return json_lines_of("info", "json")


def test_every_line_is_json_with_event_level_and_time(at_info: list[dict[str, Any]]) -> None:
    assert [(line["level"], line["event"]) for line in at_info] == [
        ("info", "an event"),
        ("warning", "a warning"),
        ("error", "a failure"),
    ]
    assert all(line["timestamp"].endswith("Z") for line in at_info)
    assert at_info[0]["number"] == 2


def test_a_failure_has_its_stack_trace_in_the_same_line(at_info: list[dict[str, Any]]) -> None:
    assert "ZeroDivisionError" in at_info[-1]["exception"]


def test_auto_is_json_without_a_terminal() -> None:
    assert [line["level"] for line in json_lines_of("error", "auto")] == ["error"]


@pytest.mark.parametrize(("level", "events"), [("debug", 4), ("warning", 2), ("error", 1)])
def test_lines_below_the_level_are_not_written(level: str, events: int) -> None:
    assert len(json_lines_of(level, "json")) == events


def test_a_changed_level_applies_to_existing_loggers() -> None:
    changes = """
from service.telemetry.logs import set_log_level
def write():
    log.debug("detail")
    log.info("info")
    logging.getLogger("elsewhere").info("other info")
    log.warning("warning")
for level in ("warning", "debug", "error"):
    set_log_level(level)
    write()
"""
    lines = json_lines_of("info", "json", program=PROGRAM + changes)[3:]
    assert [line["event"] for line in lines] == [
        "warning", "detail", "info", "other info", "warning",
    ]  # fmt: skip


def test_console_lines_are_not_json() -> None:
    lines = lines_of("info", "console")
    assert any("an event" in line for line in lines)
    assert not lines[0].startswith("{")


@pytest.fixture(scope="module")
def in_a_request() -> dict[str, dict[str, Any]]:
    lines = json_lines_of("warning", "json", "frontend", program=PROGRAM + IN_A_REQUEST)
    return {line["event"]: line for line in lines}


@pytest.mark.parametrize("event", ["served", "served elsewhere", "failed", "failed elsewhere"])
def test_lines_of_a_request_have_its_id_and_trace(
    in_a_request: dict[str, dict[str, Any]], event: str
) -> None:
    assert in_a_request[event]["request_id"] == "r-1"
    assert in_a_request[event]["trace_id"] == "0af7651916cd43dd8448eb211c80319c"


def test_lines_outside_of_a_request_have_no_request_id(
    in_a_request: dict[str, dict[str, Any]],
) -> None:
    assert "request_id" not in in_a_request["beside"]


def test_lines_of_every_thread_name_the_process(
    in_a_request: dict[str, dict[str, Any]],
) -> None:
    assert {line["process"] for line in in_a_request.values()} == {"frontend"}


@pytest.mark.parametrize("event", ["failed", "failed again", "failed elsewhere"])
def test_errors_of_a_request_are_logged_without_their_messages(
    in_a_request: dict[str, dict[str, Any]], event: str
) -> None:
    stack = in_a_request[event]["exception"]
    assert "KeyError" in stack
    assert "ValueError" in stack
    assert "in fails" in stack
    assert "xyzzy" not in json.dumps(in_a_request[event])


def test_errors_outside_of_a_request_are_logged_with_their_messages(
    in_a_request: dict[str, dict[str, Any]],
) -> None:
    assert "division by zero" in in_a_request["a failure"]["exception"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_loses_lines_without_ending_the_process() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", f"{PROGRAM}\nprint('alive')", "debug", "json"],
            stdout=subprocess.PIPE, stderr=full, text=True, check=False,
        )  # fmt: skip
    assert done.stdout == "alive\n"


def test_an_unread_log_drops_lines_without_blocking_the_process() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", UNREAD_LOG],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        assert running.stdin is not None
        assert running.stdout.readline() == "done\n"
        numbers: list[int] = []
        dropped = 0
        while len(numbers) + dropped < 2 * MAX_LINES:
            line = json.loads(running.stderr.readline())
            if "number" in line:
                numbers.append(line["number"])
            else:
                assert line["event"] == "log lines dropped: they were not read"
                dropped += line["lines"]
        running.stdin.write("\n")
        running.stdin.close()
        (last,) = running.stderr
    assert json.loads(last)["event"] == "read again"
    assert numbers == sorted(numbers)
    assert dropped > 0


def test_the_last_lines_of_a_process_are_written() -> None:
    program = PROGRAM + 'for number in range(500):\n    log.info("the end", number=number)\n'
    assert json_lines_of("info", "json", program=program)[-1]["number"] == 499
