"""Routes served past FastAPI: their dependencies, their errors, and what is left to the others."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.routing import APIRoute
from starlette.types import Receive, Scope, Send

from service.http.direct import Direct
from service.http.errors import ApiError, errors_as, install_error_handlers
from service.http.responses import json_response


async def note_first(request: Request) -> None:
    request.state.seen = ["first"]


async def note_second(request: Request) -> None:
    request.state.seen.append("second")


router = APIRouter(dependencies=[Depends(note_first)])


@router.post("/echo", dependencies=[Depends(note_second)])
async def echo(request: Request) -> Response:
    return json_response({"seen": request.state.seen, "body": (await request.body()).decode()})


@router.post("/refuse")
async def refuse(_: Request) -> Response:
    raise ApiError(422, "not so", "input")


def application() -> FastAPI:
    app = FastAPI()
    app.include_router(router)
    install_error_handlers(app)
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


def routes(of: APIRouter = router) -> list[APIRoute]:
    return [route for route in of.routes if isinstance(route, APIRoute)]


async def test_dependencies_run_in_their_order_then_the_endpoint() -> None:
    recorder = Recorder(Direct(refuse_all, routes()))
    answer = await ask(recorder, "POST", "/echo")
    assert answer.json() == {"seen": ["first", "second"], "body": "a text"}
    assert recorder.scopes[0]["route"].path == "/echo"


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/echo"), ("POST", "/echo/"), ("POST", "/other"), ("OPTIONS", "/echo")],
)
async def test_whatever_else_is_asked_goes_to_the_application(method: str, path: str) -> None:
    answer = await ask(Recorder(Direct(refuse_all, routes())), method, path)
    assert answer.status_code == 418


@pytest.mark.parametrize("path", ["/echo", "/refuse"])
async def test_it_answers_as_fastapi_does(path: str) -> None:
    direct = Recorder(Direct(refuse_all, routes()))
    usual = Recorder(application())
    answers = [await ask(app, "POST", path) for app in (direct, usual)]
    assert answers[0].status_code == answers[1].status_code
    assert answers[0].content == answers[1].content
    assert dict(answers[0].headers) == dict(answers[1].headers)
    assert direct.scopes[0].get("refusal") == usual.scopes[0].get("refusal")


async def test_errors_keep_the_shape_of_their_router_and_their_reason() -> None:
    shaped = APIRouter(dependencies=[errors_as(lambda error: {"told": error.message})])

    @shaped.post("/refuse")
    async def full(_: Request) -> Response:
        raise ApiError(429, "not now", code="queue_full", retry_after=3)

    recorder = Recorder(Direct(refuse_all, routes(shaped)))
    answer = await ask(recorder, "POST", "/refuse")
    assert (answer.status_code, answer.json()) == (429, {"told": "not now"})
    assert answer.headers["retry-after"] == "3"
    assert recorder.scopes[0]["refusal"] == "queue_full"
