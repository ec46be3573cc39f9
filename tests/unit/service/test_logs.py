"""How log lines look: asked of a process of its own, as loggers are configured for good."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

PROGRAM = """
import logging, sys, structlog
from service.observability.logs import configure_logs
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


def written(level: str, form: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, level, form],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout == ""
    return done.stderr.splitlines()


def parsed(level: str, form: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in written(level, form)]


@pytest.fixture(scope="module")
def at_info() -> list[dict[str, Any]]:
    return parsed("info", "json")


def test_every_line_is_json_with_event_level_and_time(at_info: list[dict[str, Any]]) -> None:
    assert [(line["level"], line["event"]) for line in at_info] == [
        ("info", "an event"),
        ("warning", "a warning"),
        ("error", "a failure"),
    ]
    assert all(line["timestamp"].endswith("Z") for line in at_info)
    assert at_info[0]["number"] == 2


def test_a_failure_carries_its_trace_in_the_same_line(at_info: list[dict[str, Any]]) -> None:
    assert "ZeroDivisionError" in at_info[-1]["exception"]


def test_away_from_a_terminal_auto_means_json() -> None:
    assert [line["level"] for line in parsed("error", "auto")] == ["error"]


@pytest.mark.parametrize(("level", "events"), [("debug", 4), ("warning", 2), ("error", 1)])
def test_lines_below_the_level_are_not_written(level: str, events: int) -> None:
    assert len(parsed(level, "json")) == events


def test_console_is_for_reading() -> None:
    lines = written("info", "console")
    assert any("an event" in line for line in lines)
    assert not lines[0].startswith("{")
