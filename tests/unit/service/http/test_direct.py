"""Routes served directly, without FastAPI's routing: they skip nothing, or the start fails."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any

import httpx
import pytest
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, HTTPException, Request, Response
from starlette.types import Receive, Scope, Send

from service.http.dialects import Dialects
from service.http.direct import Direct, direct, direct_routes
from service.http.errors import ApiError, errors_as
from service.http.private import api_routes
from service.http.responses import json_response
from service.http.schemas import PredictError


def note(word: str) -> Any:
    async def dependency(request: Request) -> None:
        request.scope.setdefault("seen", []).append(word)

    return Depends(dependency)


router = APIRouter(
    prefix="/inner", dependencies=[note("router")], responses=errors_as(PredictError)
)


@router.post("/echo", dependencies=[note("route")])
@direct
async def echo(request: Request) -> Response:
    return json_response({"seen": request.scope["seen"], "body": (await request.body()).decode()})


@router.post("/refuse")
@direct
async def refuse(_: Request) -> Response:
    raise ApiError(429, "not now", "input", "queue_full", retry_after=3)


@router.post("/http")
@direct
async def http(_: Request) -> Response:
    raise HTTPException(404, headers={"X-A": "b"})


def application() -> FastAPI:
    app = FastAPI(dependencies=[note("application")])
    app.include_router(router, prefix="/outer", dependencies=[note("inclusion")])
    Dialects(api_routes(app)).install(app)
    return app


class Recorder:
    """Keeps the scopes of requests."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.scopes: list[Scope] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope.setdefault("state", {})
        self.scopes.append(scope)
        await self.app(scope, receive, send)


async def ask(app: Any, method: str, path: str) -> httpx.Response:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.request(method, path, content="a text")


async def fallback(scope: Scope, receive: Receive, send: Send) -> None:
    await Response("not a direct route", 418)(scope, receive, send)


def direct_application() -> Recorder:
    """Return an application that serves the direct routes, and 418 elsewhere."""
    declared = api_routes(application())
    return Recorder(Direct(fallback, direct_routes(declared), Dialects(declared)))


async def test_dependencies_run_in_order_before_the_endpoint() -> None:
    answer = await ask(direct_application(), "POST", "/outer/inner/echo")
    seen = ["application", "inclusion", "router", "route"]
    assert answer.json() == {"seen": seen, "body": "a text"}


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/outer/inner/echo"),
        ("POST", "/outer/inner/echo/"),
        ("POST", "/inner/echo"),
        ("OPTIONS", "/outer/inner/echo"),
    ],
)
async def test_other_requests_go_to_the_application(method: str, path: str) -> None:
    assert (await ask(direct_application(), method, path)).status_code == 418


@pytest.mark.parametrize("path", ["echo", "refuse", "http"])
async def test_answers_and_scopes_equal_those_of_fastapi(path: str) -> None:
    applications = direct_application(), Recorder(application())
    actual, expected = [await ask(app, "POST", f"/outer/inner/{path}") for app in applications]
    assert actual.status_code == expected.status_code != 418
    assert actual.content == expected.content
    assert dict(actual.headers) == dict(expected.headers)
    actual_scope, expected_scope = (app.scopes[0] for app in applications)
    for key in ("refusal", "route"):
        assert actual_scope.get(key) == expected_scope.get(key)
    assert actual_scope["route"].path == f"/inner/{path}"


async def with_query(request: Request, name: str = "") -> None: ...
async def with_dependency(request: Request, other: Annotated[None, note("other")]) -> None: ...
async def with_background(request: Request, tasks: BackgroundTasks) -> None: ...
async def without_request() -> None: ...
def synchronous_dependency(request: Request) -> None: ...
async def with_teardown(_: Request) -> AsyncIterator[None]:
    yield


async def plain(request: Request) -> None: ...


@pytest.mark.parametrize(
    "dependency",
    [
        with_query,
        with_dependency,
        with_background,
        without_request,
        synchronous_dependency,
        with_teardown,
    ],
)
def test_a_dependency_that_needs_fastapi_is_refused(dependency: Any) -> None:
    app = FastAPI()

    @app.post("/a", dependencies=[Depends(dependency)])
    @direct
    async def endpoint(_: Request) -> Response:
        return Response()

    with pytest.raises(ValueError, match="/a cannot be served directly: .*request alone"):
        direct_routes(api_routes(app))


def synchronous(_: Request) -> Response:
    return Response()


async def with_parameter(_: Request, name: str) -> Response:
    return Response(name)


async def without_response(_: Request) -> dict[str, str]:
    return {}


async def valid(_: Request) -> Response:
    return Response()


@pytest.mark.parametrize(
    ("endpoint", "path", "options", "reason"),
    [
        (synchronous, "/a", {}, "request alone"),
        (with_parameter, "/a", {}, "request alone"),
        (without_response, "/a", {}, "no Response"),
        (valid, "/{name}", {}, "parameters"),
        (valid, "/a", {"max_body_size": 10}, "limits its bodies"),
        (valid, "/a", {"dependencies": [Depends(plain), Depends(plain)]}, "twice"),
        (valid, "/earlier", {}, "earlier route"),
    ],
)
def test_a_route_that_needs_fastapi_is_refused(
    endpoint: Callable[..., Any], path: str, options: dict[str, Any], reason: str
) -> None:
    app = FastAPI()

    @app.post("/earlie{letter}")
    async def earlier(letter: str) -> Response:
        return Response(letter)

    app.post(path, **options)(direct(endpoint))
    with pytest.raises(ValueError, match=f"cannot be served directly: .*{reason}"):
        direct_routes(api_routes(app))


def test_only_marked_routes_are_served_directly() -> None:
    app = FastAPI()

    @app.post("/a")
    async def endpoint(_: Request) -> Response:
        return Response()

    assert not direct_routes(api_routes(app))
