"""The format of error responses by path: that of the API to which the path belongs."""

from __future__ import annotations

from collections.abc import Iterable

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.types import Scope

from service.http.errors import ApiError, ErrorSchema, error_response
from service.http.private import Route
from service.http.schemas import ErrorResponse


def without_prefix(path: str, prefix: str) -> str:
    """Return a path without the prefix, if it begins with it."""
    if prefix and (path == prefix or path.startswith(f"{prefix}/")):
        return path.removeprefix(prefix) or "/"
    return path


class Dialects:
    """The schemas of errors by path, as the routes document them with `errors_as`.

    Routes with the same method and first segment of the path have the same schema. Requests below
    that segment that no route answers have it too, if it is the same for all methods.

    Args:
        routes: routes of the application, in order.
        prefix: path prefix that a proxy may strip.

    Raises:
        ValueError: routes with the same first segment and method document different errors.
    """

    def __init__(self, routes: Iterable[Route], prefix: str = "") -> None:
        self._routes = list(routes)
        self._prefix = prefix
        by_segment: dict[tuple[str, str | None], set[type[ErrorSchema]]] = {}
        for route in self._routes:
            schema = route.responses.get("default", {}).get("model", ErrorResponse)
            for method in (*route.methods, _ANY):
                by_segment.setdefault((method, _segment(route.path)), set()).add(schema)
        for (method, segment), schemas in by_segment.items():
            if method != _ANY and len(schemas) > 1:
                raise ValueError(f"routes of {method} /{segment} document different errors")
        self._schemas = {key: one for key, (one, *others) in by_segment.items() if not others}

    def schema(self, method: str, path: str) -> type[ErrorSchema]:
        """Return the schema of errors for a request."""
        segment = _segment(without_prefix(path, self._prefix))
        usual = self._schemas.get((_ANY, segment), ErrorResponse)
        return self._schemas.get((method, segment), usual)

    def response(self, method: str, path: str, error: ApiError) -> Response:
        """Return the response for an error, in the schema of the path."""
        return error_response(error, self.schema(method, path))

    def answer(self, scope: Scope, error: Exception) -> Response:
        """Return the response for an exception of a route or of the router."""
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
        if error.status_code == 405:  # Starlette lists the methods of the first matching route only
            methods = set(response.headers["Allow"].split(", "))
            methods.update(*(one.methods for one in self._routes if one.path_regex.match(path)))
            methods |= {"HEAD"} if "GET" in methods else set()
            response.headers["Allow"] = ", ".join(sorted(methods))
        return response

    def install(self, app: FastAPI) -> None:
        """Register the handlers of expected errors; `Observe` handles the unexpected ones."""

        async def handle(request: Request, error: Exception) -> Response:
            return self.answer(request.scope, error)

        app.add_exception_handler(ApiError, handle)
        app.add_exception_handler(HTTPException, handle)


_ANY = "*"


def _segment(path: str) -> str | None:
    """Return the first segment of a path, empty for `/`; None: the target is not a path."""
    return path.split("/", 2)[1] if path.startswith("/") else None
