"""service/messages.py lists exactly the error codes and log events of the code."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.http.errors import REASONS
from service.messages import ERROR_CODES, EVENTS, page

ROOT = Path(__file__).parents[3]
LEVELS = {"debug", "info", "warning", "error", "critical", "exception"}
INDIRECT_CODES = {
    "already_served", "broken_checkpoint", "busy", "conflict", "load_timeout", "state_not_kept",
    "deadline", "invalid_settings", "not_supported", "method_not_allowed",
}  # fmt: skip
"""Codes of the hub, an engine or Starlette, which are passed in variables."""


def calls() -> Iterator[ast.Call]:
    for folder in ("service", "budgetformer"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call):
                    yield node


def literal(node: ast.expr | None) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def event_of(call: ast.Call) -> str | None:
    """Return the event that a call logs with `log`, or with one of its methods named `write`."""
    match call.func:
        case ast.Attribute(value=ast.Name(id="log"), attr=level) if level in LEVELS:
            return literal(call.args[0])
        case ast.Name(id="write") if call.keywords:
            return literal(call.args[0])
    return None


def code_of(call: ast.Call) -> str | None:
    """Return the code of a call that makes an `ApiError`, by default that of its status."""
    if not (isinstance(call.func, ast.Name) and call.func.id == "ApiError"):
        return None
    by_name = {keyword.arg: keyword.value for keyword in call.keywords}
    code = call.args[3] if len(call.args) > 3 else by_name.get("code")
    if code is not None:
        return literal(code)
    status = call.args[0]
    return REASONS[status.value] if isinstance(status, ast.Constant) else None


def test_every_log_event_is_explained() -> None:
    assert {event for call in calls() if (event := event_of(call))} == set(EVENTS)


def test_every_error_code_is_explained() -> None:
    assert {code for call in calls() if (code := code_of(call))} | INDIRECT_CODES == set(
        ERROR_CODES
    )


def test_every_code_is_listed_with_its_statuses() -> None:
    for call in calls():
        code = code_of(call)
        if code is not None and isinstance(call.args[0], ast.Constant):
            assert call.args[0].value in ERROR_CODES[code].statuses, code


@pytest.mark.parametrize("event", sorted(EVENTS))
def test_events_are_short_and_without_articles(event: str) -> None:
    assert len(event) <= 70
    assert not event.startswith(("a ", "an ", "the ", "this "))
    assert not event.endswith(".")


def test_the_page_is_current() -> None:
    assert (ROOT / "docs" / "messages.md").read_text(encoding="utf-8") == page(), (
        "run python -m service.messages docs/messages.md"
    )
