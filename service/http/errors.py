"""Every error that a client can see: one shape, made in one place.

Routes that speak another server's language write the same errors in that server's shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.routing import compile_path

from service.http.responses import json_response

REASONS = {
    400: "invalid_request",
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    406: "not_acceptable",
    408: "request_timeout",
    413: "too_large",
    415: "unsupported_media_type",
    422: "invalid_field",
    429: "overloaded",
    431: "headers_too_large",
    500: "internal_error",
    503: "unavailable",
    504: "timeout",
}


_MESSAGE_LENGTH, _SHOWN_LENGTH = 2000, 100


def shorten(name: str) -> str:
    """Return a name that a client sent, short enough for an error."""
    return name if len(name) <= _SHOWN_LENGTH else f"{name[:_SHOWN_LENGTH]}..."


CLIENT_GONE = 499
"""What a request counts as whose client went away; never sent."""


class ClientGoneError(Exception):
    """The client closed its connection before the answer was there."""


@dataclass
class ApiError(Exception):
    """An answer that is not the one asked for.

    Attributes:
        status: HTTP status.
        message: what was wrong, where, and what to do; never the text of an input.
        param: the field that is to blame.
        code: a name for programs; by default the status's.
        retry_after: seconds after which it is worth trying again.
    """

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    retry_after: int | None = None

    def response(self, state: Mapping[str, Any]) -> Response:
        """Return the answer for HTTP; `state` is the request's."""
        return self.shaped(state.get(_SHAPE, own_shape))

    def shaped(self, write: Shape) -> Response:
        """Return the answer for HTTP in a shape."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == HTTPStatus.UNAUTHORIZED:
            headers["WWW-Authenticate"] = "Bearer"
        return json_response(write(self), self.status, headers)

    def body(self) -> dict[str, Any]:
        """Return the error object."""
        kind = REASONS.get(self.status, "error")
        return {
            "message": self.message[:_MESSAGE_LENGTH],
            "type": kind,
            "param": self.param,
            "code": self.code or kind,
        }


Shape = Callable[[ApiError], Any]
"""Writes an error as JSON."""

_SHAPE = "error_shape"


def own_shape(error: ApiError) -> dict[str, Any]:
    """Write an error in our own shape."""
    return {"error": error.body()}


def errors_as(shape: Shape) -> Any:
    """Return a dependency that has a router's errors written in another shape."""

    async def choose(request: Request) -> None:
        setattr(request.state, _SHAPE, shape)

    return Depends(choose)


def _methods(request: Request) -> set[str]:
    """Return the methods of every documented route with the path of a request."""
    fitting = (
        methods
        for path, methods in request.app.openapi()["paths"].items()
        if compile_path(path)[0].match(request.scope["path"])
    )
    return {method.upper() for methods in fitting for method in methods}


CLASSIFYING = (400, 401, 403, 404, 408, 413, 415, 422, 429, 503, 504)
"""What a route that classifies may answer instead."""


def errors_documented_as(
    model: type[BaseModel], statuses: Iterable[int] = ()
) -> dict[int | str, dict[str, Any]]:
    """Return what OpenAPI says of answers that are no success; `statuses` are named one by one."""
    any_other: dict[int | str, Any] = {
        "default": {"model": model, "description": "Why there is no answer"}
    }
    return {status: {"model": model} for status in statuses} | any_other


async def answer_error(request: Request, error: Exception) -> Response:
    """Return the answer of a request that ended in an `ApiError`."""
    assert isinstance(error, ApiError)
    request.scope["refusal"] = error.code
    return error.response(request.scope["state"])


def install_error_handlers(app: FastAPI) -> None:
    """Turn every expected exception of this app into the one shape; `Observe` does the others."""

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = {
            404: f"there is no route {request.scope['path']}",
            405: f"{request.scope['path']} does not answer {request.method}",
        }.get(error.status_code, str(error.detail))
        response = ApiError(error.status_code, message).response(request.scope["state"])
        response.headers.update(error.headers or {})
        if error.status_code == 405:  # the router names the methods of the first route that fits
            known = set(response.headers.get("Allow", "").split(", ")) - {""} | _methods(request)
            known |= {"HEAD"} if "GET" in known else set()
            response.headers["Allow"] = ", ".join(sorted(known))
        return response

    app.add_exception_handler(ApiError, answer_error)
    app.add_exception_handler(HTTPException, http_error)
