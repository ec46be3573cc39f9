"""Serve the most frequent routes without FastAPI's routing and dependency injection."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request
from opentelemetry import trace
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from service.http.dialects import Dialects
from service.http.errors import ApiError
from service.http.private import Call, Route, calls_of

Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])

_endpoints: set[Callable[..., Any]] = set()


def direct(endpoint: Endpoint) -> Endpoint:
    """Mark an endpoint as served directly; use it below the decorators of the routes."""
    _endpoints.add(endpoint)
    return endpoint


@dataclass(frozen=True)
class DirectRoute:
    """A route and the calls that serve it: first its dependencies, then its endpoint."""

    declared: Route
    dependencies: list[Call]
    endpoint: Call


def direct_routes(routes: Iterable[Route]) -> dict[tuple[str, str], DirectRoute]:
    """Return the routes of `direct` endpoints, by method and path.

    Raises:
        ValueError: FastAPI does more for one of them than to call its dependencies and its
            endpoint, or an earlier route serves its path.
    """
    routes = list(routes)
    by_path = {}
    for route in routes:
        if route.endpoint in _endpoints:
            for method in route.methods:
                try:
                    by_path[method, route.path] = _direct_route(route, method, routes)
                except ValueError as error:
                    raise ValueError(f"{route.path} cannot be served directly: {error}") from None
    return by_path


def _direct_route(route: Route, method: str, routes: list[Route]) -> DirectRoute:
    if "{" in route.path:
        raise ValueError("its path has parameters")
    matching = (one for one in routes if method in one.methods and one.path_regex.match(route.path))
    if next(matching) is not route:
        raise ValueError("an earlier route answers this path")
    *dependencies, endpoint = calls_of(route)
    return DirectRoute(route, dependencies, endpoint)


@dataclass(frozen=True)
class Direct:
    """Serve some routes without routing and dependency injection, a fifth of a frontend's time.

    The routes are declared and documented like all others, and `direct_routes` has checked that
    FastAPI would do nothing else for them. FastAPI's `dependency_overrides` are ignored.

    Attributes:
        app: application that serves all other routes.
        routes: direct routes by method and path.
        dialects: error responses.
    """

    app: ASGIApp
    routes: Mapping[tuple[str, str], DirectRoute]
    dialects: Dialects

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        route = None
        if scope["type"] == "http":
            route = self.routes.get((scope["method"], scope["path"]))
        if route is None:
            await self.app(scope, receive, send)
            return
        scope["route"] = route.declared.original_route
        span = trace.get_current_span()
        if span.is_recording():
            span.update_name(f"{scope['method']} {route.declared.path}")
            span.set_attribute("http.route", route.declared.path)
        request = Request(scope, receive, send)
        try:
            for dependency in route.dependencies:
                await dependency(request)
            response = await route.endpoint(request)
        except (ApiError, HTTPException) as error:
            response = self.dialects.answer(scope, error)
        await response(scope, receive, send)
