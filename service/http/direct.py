"""The routes that are asked most, served without what FastAPI does around them."""

from __future__ import annotations

from collections.abc import Iterable

from fastapi import Request
from fastapi.routing import APIRoute
from opentelemetry import trace
from starlette.types import ASGIApp, Receive, Scope, Send

from service.http.errors import ApiError, answer_error


class Direct:
    """Serve some routes past routing and dependency injection: a fifth of a front's work.

    They are declared and documented as all others are.

    Args:
        app: serves all others.
        routes: whose paths have no parameters; endpoints and dependencies take the request alone.
    """

    def __init__(self, app: ASGIApp, routes: Iterable[APIRoute]) -> None:
        self.app = app
        self._routes = {
            (method, route.path): route for route in routes for method in route.methods or ()
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        route = None
        if scope["type"] == "http":
            route = self._routes.get((scope["method"], scope["path"]))
        if route is None:
            await self.app(scope, receive, send)
            return
        scope["route"] = route
        span = trace.get_current_span()
        if span.is_recording():
            span.update_name(f"{scope['method']} {route.path}")
            span.set_attribute("http.route", route.path)
        request = Request(scope, receive, send)
        try:
            for dependency in route.dependencies:
                await dependency.dependency(request)  # type: ignore[misc]
            response = await route.endpoint(request)
        except ApiError as error:
            response = await answer_error(request, error)
        await response(scope, receive, send)
