"""Routes served past FastAPI: nothing is skipped, or the start fails."""

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
    """Keeps what the scopes of requests say when they have been served."""

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


async def refuse_all(scope: Scope, receive: Receive, send: Send) -> None:
    await Response("the others", 418)(scope, receive, send)


def directly() -> Recorder:
    """Serve the direct routes alone."""
    declared = api_routes(application())
    return Recorder(Direct(refuse_all, direct_routes(declared), Dialects(declared)))


async def test_every_dependency_runs_in_order_then_the_endpoint() -> None:
    answer = await ask(directly(), "POST", "/outer/inner/echo")
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
async def test_all_else_goes_to_the_application(method: str, path: str) -> None:
    assert (await ask(directly(), method, path)).status_code == 418


@pytest.mark.parametrize("path", ["echo", "refuse", "http"])
async def test_it_answers_as_fastapi_does(path: str) -> None:
    ways = directly(), Recorder(application())
    answers = [await ask(way, "POST", f"/outer/inner/{path}") for way in ways]
    assert answers[0].status_code == answers[1].status_code != 418
    assert answers[0].content == answers[1].content
    assert dict(answers[0].headers) == dict(answers[1].headers)
    for added in ("refusal", "route"):
        assert ways[0].scopes[0].get(added) == ways[1].scopes[0].get(added)
    assert ways[0].scopes[0]["route"].path == f"/inner/{path}"


async def with_query(request: Request, name: str = "") -> None: ...
async def with_dependency(request: Request, other: Annotated[None, note("other")]) -> None: ...
async def with_background(request: Request, tasks: BackgroundTasks) -> None: ...
async def without_request() -> None: ...
def in_a_thread(request: Request) -> None: ...
async def with_end(_: Request) -> AsyncIterator[None]:
    yield


async def plain(request: Request) -> None: ...


@pytest.mark.parametrize(
    "dependency",
    [with_query, with_dependency, with_background, without_request, in_a_thread, with_end],
)
def test_a_dependency_that_takes_more_than_a_call_is_refused(dependency: Any) -> None:
    app = FastAPI()

    @app.post("/a", dependencies=[Depends(dependency)])
    @direct
    async def endpoint(_: Request) -> Response:
        return Response()

    with pytest.raises(ValueError, match="/a cannot be served directly: .*request alone"):
        direct_routes(api_routes(app))


def of_a_thread(_: Request) -> Response:
    return Response()


async def with_parameter(_: Request, name: str) -> Response:
    return Response(name)


async def not_a_response(_: Request) -> dict[str, str]:
    return {}


async def sound(_: Request) -> Response:
    return Response()


@pytest.mark.parametrize(
    ("endpoint", "path", "options", "why"),
    [
        (of_a_thread, "/a", {}, "request alone"),
        (with_parameter, "/a", {}, "request alone"),
        (not_a_response, "/a", {}, "no Response"),
        (sound, "/{name}", {}, "parameters"),
        (sound, "/a", {"max_body_size": 10}, "limits its bodies"),
        (sound, "/a", {"dependencies": [Depends(plain), Depends(plain)]}, "twice"),
        (sound, "/earlier", {}, "earlier route"),
    ],
)
def test_a_route_that_takes_more_than_calls_is_refused(
    endpoint: Callable[..., Any], path: str, options: dict[str, Any], why: str
) -> None:
    app = FastAPI()

    @app.post("/earlie{letter}")
    async def earlier(letter: str) -> Response:
        return Response(letter)

    app.post(path, **options)(direct(endpoint))
    with pytest.raises(ValueError, match=f"cannot be served directly: .*{why}"):
        direct_routes(api_routes(app))


def test_a_route_is_only_served_directly_if_it_says_so() -> None:
    app = FastAPI()

    @app.post("/a")
    async def endpoint(_: Request) -> Response:
        return Response()

    assert not direct_routes(api_routes(app))
