"""The API to which a path belongs, and the shape of errors outside of routes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI, Request

from service.http.app import create_app
from service.http.dialects import Dialects
from service.http.errors import ApiError, ErrorSchema, errors_as
from service.http.private import api_routes
from service.http.schemas import ErrorResponse, InferError, PredictError
from service.ipc.engine_client import Engines
from service.settings import Settings
from tests.support.connected import HEAD_BYTES, connected
from tests.support.strict_http import answers_in


@pytest.fixture(scope="module")
def dialects() -> Dialects:
    app = create_app(Settings.model_construct(root_path="/before"), Engines([]), Path("hub"))
    table = app.state.dialects
    assert isinstance(table, Dialects)
    return table


@pytest.mark.parametrize("prefix", ["", "/before"])
@pytest.mark.parametrize(
    ("method", "path", "schema"),
    [
        ("POST", "/classify", ErrorResponse),
        ("POST", "/invocations", ErrorResponse),
        ("GET", "/", ErrorResponse),
        ("POST", "/", PredictError),
        ("DELETE", "/", ErrorResponse),  # a path that two APIs share
        ("POST", "/predict", PredictError),
        ("GET", "/predict", PredictError),
        ("POST", "/predict/", PredictError),
        ("GET", "/v2", InferError),
        ("POST", "/v2/models/a/infer", InferError),
        ("POST", "/v2/nothing", InferError),
        ("GET", "/v22", ErrorResponse),
        ("GET", "/nothing", ErrorResponse),
    ],
)
def test_each_path_belongs_to_one_api(
    dialects: Dialects, prefix: str, method: str, path: str, schema: type[ErrorSchema]
) -> None:
    assert dialects.schema(method, prefix + path) is schema


@pytest.mark.parametrize("path", ["", "*", "http://x/predict", "x:443"])
def test_an_invalid_path_gets_the_default_error_shape(dialects: Dialects, path: str) -> None:
    assert dialects.schema("POST", path) is ErrorResponse


def test_every_route_answers_with_its_documented_error_shape() -> None:
    app = create_app(Settings.model_construct(), Engines([]), Path("hub"))
    documented = [
        (method.upper(), path, operation["responses"]["default"])
        for path, operations in app.openapi()["paths"].items()
        for method, operation in operations.items()
        if "default" in operation["responses"]
    ]
    assert len(documented) > 20
    for method, path, response in documented:
        (content,) = response["content"].values()
        schema = app.state.dialects.schema(method, path)
        assert content["schema"]["$ref"] == f"#/components/schemas/{schema.__name__}", path


def test_two_apis_may_not_share_a_path_segment() -> None:
    app, router = FastAPI(), APIRouter(prefix="/v2")

    @router.get("/own")
    async def own(_: Request) -> None: ...

    @router.get("/theirs", responses=errors_as(InferError))
    async def theirs(_: Request) -> None: ...

    app.include_router(router)
    with pytest.raises(ValueError, match="GET /v2 document different errors"):
        Dialects(api_routes(app))


ERROR = ApiError(429, "not now", code="queue_full", retry_after=3)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/classify", {"error": ERROR.body()}),
        ("/predict", {"error": "not now", "error_type": "overloaded"}),
        ("/v2/models/a/infer", {"error": "not now"}),
    ],
)
def test_errors_keep_status_and_headers_in_every_api(
    dialects: Dialects, path: str, body: dict[str, Any]
) -> None:
    response = dialects.response("POST", path, ERROR)
    assert json.loads(bytes(response.body)) == body
    assert (response.status_code, response.headers["retry-after"]) == (429, "3")


HEADS = {
    400: b"Host: x\r\nHost: x\r\n\r\n",
    431: b"Host: x\r\nX: " + b"a" * HEAD_BYTES + b"\r\n\r\n",
}


@pytest.mark.parametrize("status", HEADS)
@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (b"/classify", {"error"}),
        (b"/predict?a=b", {"error", "error_type"}),
        (b"/v2/models/a/infer", {"error"}),
    ],
)
async def test_protocol_errors_have_the_shape_of_the_api_of_their_path(
    dialects: Dialects, path: bytes, fields: set[str], status: int
) -> None:
    with connected(dialects=dialects) as connection:
        await connection.send([b"POST " + path + b" HTTP/1.1\r\n" + HEADS[status]])
        (answer,) = answers_in(connection.wire.sent, [])
        assert answer.status == status
        body = json.loads(connection.wire.sent.partition(b"\r\n\r\n")[2])
        assert set(body) == fields
        assert isinstance(body["error"], dict) == (path == b"/classify")


async def test_each_request_of_a_connection_has_its_own_api(dialects: Dialects) -> None:
    with connected(dialects=dialects) as connection:
        await connection.send([b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n"])
        before = len(connection.wire.sent)
        await connection.send([b"no request\r\n\r\n"])
        body = json.loads(connection.wire.sent[before:].partition(b"\r\n\r\n")[2])
        assert body["error"]["code"] == "invalid_http"
