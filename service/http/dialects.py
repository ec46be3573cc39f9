"""Which API each path speaks, and the responses of errors in it."""

from __future__ import annotations

from collections.abc import Iterable

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.types import Scope

from service.http.errors import ApiError, ErrorSchema, error_response
from service.http.private import Route
from service.http.schemas import ErrorResponse


def without_prefix(path: str, prefix: str) -> str:
    """Return a path without the one before it, if that is there."""
    if prefix and (path == prefix or path.startswith(f"{prefix}/")):
        return path.removeprefix(prefix) or "/"
    return path


class Dialects:
    """The shapes of errors by path, read from what the routes document (`errors_as`).

    Routes with the same first segment and method speak the same API. It is also spoken by methods
    and paths below that segment that no route answers, unless the methods there differ.

    Args:
        routes: of the application, in order.
        prefix: of paths before a proxy strips it.

    Raises:
        ValueError: routes with the same first segment and method document different errors.
    """

    def __init__(self, routes: Iterable[Route], prefix: str = "") -> None:
        self._routes = list(routes)
        self._prefix = prefix
        found: dict[tuple[str, str | None], set[type[ErrorSchema]]] = {}
        for route in self._routes:
            schema = route.responses.get("default", {}).get("model", ErrorResponse)
            for method in (*route.methods, _ANY):
                found.setdefault((method, _segment(route.path)), set()).add(schema)
        for (method, segment), schemas in found.items():
            if method != _ANY and len(schemas) > 1:
                raise ValueError(f"routes of {method} /{segment} document different errors")
        self._schemas = {key: one for key, (one, *others) in found.items() if not others}

    def schema(self, method: str, path: str) -> type[ErrorSchema]:
        """Return the shape in which errors are reported to a request."""
        segment = _segment(without_prefix(path, self._prefix))
        usual = self._schemas.get((_ANY, segment), ErrorResponse)
        return self._schemas.get((method, segment), usual)

    def response(self, method: str, path: str, error: ApiError) -> Response:
        """Return the response to a request that ends in an error."""
        return error_response(error, self.schema(method, path))

    def answer(self, scope: Scope, error: Exception) -> Response:
        """Return the response to a request whose route raised an error, or that has no route."""
        path, method = scope["path"], scope["method"]
        if isinstance(error, ApiError):
            scope["refusal"] = error.code
            return self.response(method, path, error)
        assert isinstance(error, HTTPException)
        message = {
            404: f"there is no route {path}",
            405: f"{path} does not answer {method}",
        }.get(error.status_code, str(error.detail))
        response = self.response(method, path, ApiError(error.status_code, message))
        response.headers.update(error.headers or {})
        if error.status_code == 405:  # the router names the methods of the first route that fits
            known = set(response.headers["Allow"].split(", "))
            known.update(*(one.methods for one in self._routes if one.path_regex.match(path)))
            known |= {"HEAD"} if "GET" in known else set()
            response.headers["Allow"] = ", ".join(sorted(known))
        return response

    def install(self, app: FastAPI) -> None:
        """Have an application answer errors this way; `Observe` answers the unexpected ones."""

        async def handle(request: Request, error: Exception) -> Response:
            return self.answer(request.scope, error)

        app.add_exception_handler(ApiError, handle)
        app.add_exception_handler(HTTPException, handle)


_ANY = "*"


def _segment(path: str) -> str | None:
    """Return the first segment of a path, which is empty for `/`; None: it is not a path."""
    return path.split("/", 2)[1] if path.startswith("/") else None
