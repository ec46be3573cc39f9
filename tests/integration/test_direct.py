"""The direct routes, which bypass FastAPI, answer exactly as FastAPI does."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from starlette.types import Receive, Scope, Send

from tests.support.serving import Service, service
from tests.support.stores import TOPICS
from tests.unit.service.test_keys import key

KEYS = {"web": key("web-secret"), "ops": key("ops-secret", "admin")}
KEY, OTHER_KEY, WRONG_KEY = ({"X-API-Key": f"{name}-secret"} for name in ("web", "ops", "no"))
JSON = {"Content-Type": "application/json"}
BODIES: dict[str, dict[str, Any]] = {
    "/classify": {"input": ["a text", "another"]},
    "/invocations": {"inputs": "a text"},
    "/predict": {"inputs": "a text"},
    "/": {"inputs": ["a text"], "parameters": {"top_k": 1}},
}
REQUESTS = {
    "valid": (KEY | JSON, b"", 200),
    "compressed": (KEY | JSON | {"Content-Encoding": "gzip"}, b"", 200),
    "of a page": (KEY | JSON | {"Origin": "https://page"}, b"", 200),
    "without a key": (JSON, b"", 401),
    "with a wrong key": (WRONG_KEY | JSON, b"", 401),
    "with a key for something else": (OTHER_KEY | JSON, b"", 403),
    "no JSON": (KEY | JSON, b'{"input', 400),
    "no object": (KEY | JSON, b"[]", 422),
    "an unknown field": (KEY | JSON, b'{"inptu": "a"}', 422),
    "an unknown model": (KEY | JSON, b"", 404),
    "another media type": (KEY | {"Content-Type": "text/csv"}, b"a,b", 415),
    "oversized": (KEY | JSON, b" " * 5000, 413),
    "too many values": (KEY | JSON, b'{"input":[' + b"1," * 2000 + b"1]}", 413),
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(model_store: Path) -> AsyncIterator[Service]:
    options = {"cors_origins": ["https://page"], "max_body_bytes": 4500, "max_batch_items": 4}
    async with service(
        model_store, models=[TOPICS], keys=KEYS, admin_key=None, **options
    ) as running:
        yield running


def comparable(response: httpx.Response) -> tuple[int, dict[str, str], str]:
    """Return the status, headers and body of an answer without times."""
    headers = dict(response.headers)
    headers["server-timing"] = re.sub(r"[\d.]+", "", headers.get("server-timing", ""))
    return response.status_code, headers, re.sub(r'"created":\d+', "", response.text)


def test_the_classification_routes_are_direct(running: Service) -> None:
    assert set(running.app.state.direct) == {("POST", path) for path in BODIES}


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("kind", REQUESTS)
@pytest.mark.parametrize("path", BODIES)
async def test_direct_routes_answer_as_fastapi_does(
    running: Service, path: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers, content, status = REQUESTS[kind]
    named = {"model": "none"} if status == 404 else {}
    content = content or json.dumps(BODIES[path] | named).encode()
    if "Content-Encoding" in headers:
        content = gzip.compress(content)
    router, routed = running.app.router.middleware_stack, []

    async def route(scope: Scope, receive: Receive, send: Send) -> None:
        routed.append(scope["path"])
        await router(scope, receive, send)

    monkeypatch.setattr(running.app.router, "middleware_stack", route)

    async def ask() -> tuple[Any, float]:
        before = await running.scrape()
        response = await running.client.post(
            path, content=content, headers=headers | {"X-Request-Id": "same"}
        )
        after = await running.scrape()
        assert response.status_code == status
        outcome = "ok" if status == 200 else "rejected" if status == 413 else "invalid"
        counted = after.minus(before, "requests_total", route=path, outcome=outcome)
        return comparable(response), counted

    directly = await ask()
    assert path not in routed
    monkeypatch.delitem(running.app.state.direct, ("POST", path))
    by_fastapi = await ask()
    assert path in routed
    assert directly == by_fastapi
    assert directly[1] == 1
