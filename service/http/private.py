"""All uses of undocumented features of FastAPI and uvicorn; each has a test.

Of uvicorn's protocol, `connections.py` also reads `transport`, `parser`, `headers`, `url`, `cycle`,
`loop`, `connections` and `expect_100_continue`, and overrides the parser's callbacks,
`on_response_complete` and `shutdown`. Of its server, `frontend.py` overrides `startup`, `shutdown`,
`handle_exit` and `capture_signals`.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from dataclasses import replace
from re import Pattern
from typing import Any, Protocol, cast

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute, iter_route_contexts
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

Call = Callable[[Request], Awaitable[Any]]
"""A dependency or an endpoint whose only parameter is the request."""


class Route(Protocol):
    """The attributes of a route that we use, including those that its routers add."""

    original_route: APIRoute
    path: str
    path_regex: Pattern[str]
    methods: set[str]
    responses: dict[int | str, dict[str, Any]]
    endpoint: Callable[..., Any]
    dependant: Dependant
    max_body_size: int | None


def api_routes(app: FastAPI) -> list[Route]:
    """Return the routes of an application in the order of matching."""
    contexts = iter_route_contexts(app.routes)
    return [cast("Route", one) for one in contexts if isinstance(one.original_route, APIRoute)]


def calls_of(route: Route) -> list[Call]:
    """Return the dependencies of a route in the order of their calls, then its endpoint.

    Raises:
        ValueError: FastAPI does more for this route than to await these calls with the request.
    """
    if route.max_body_size is not None:
        raise ValueError("FastAPI limits its bodies")
    calls: list[Call] = []
    for node in (*route.dependant.dependencies, replace(route.dependant, dependencies=[])):
        call: Any = node.call
        # Any other attribute means that FastAPI does more: a parameter, a scope, a thread.
        given = replace(node, scope=None, own_oauth_scopes=node.own_oauth_scopes or None)
        plain = Dependant(call=call, path=node.path, request_param_name=node.request_param_name)
        awaited = inspect.iscoroutinefunction(call) or inspect.iscoroutinefunction(
            type(call).__call__
        )
        if given != plain or node.request_param_name is None or not awaited:
            raise ValueError(f"{call} is not an async function of the request alone")
        if call in calls:
            raise ValueError(f"{call} is a dependency twice")
        calls.append(call)
    returned = inspect.signature(calls[-1], eval_str=True).return_annotation
    if not (isinstance(returned, type) and issubclass(returned, Response)):
        raise ValueError("its endpoint returns no Response")
    return calls


def new_protocol(server: uvicorn.Server) -> asyncio.Protocol:
    """Return the protocol for a new connection of a started server."""
    return server.config.http_protocol_class(  # type: ignore[call-arg]
        config=server.config, server_state=server.server_state, app_state=server.lifespan.state
    )


def open_connections(server: uvicorn.Server) -> int:
    """Return the number of connections of a server, including TLS handshakes in progress."""
    return len(server.server_state.connections)


class UvicornProtocol(HttpToolsProtocol):
    """Uvicorn's HTTP protocol, with names for its undocumented attributes."""

    @property
    def answered(self) -> bool:
        """Whether no request of this connection is being served."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def expects_request(self) -> bool:
        """Whether the connection is idle, so that the keep-alive timer runs."""
        return self.timeout_keep_alive_task is not None

    def stop_keep_alive_timer(self) -> None:
        """Cancel the timer that closes an idle connection."""
        if self.timeout_keep_alive_task is not None:
            self.timeout_keep_alive_task.cancel()
            self.timeout_keep_alive_task = None

    def keep_alive_after_answer(self, keep_alive: bool) -> None:
        """Set whether the connection stays open after the response to the last request."""
        self.cycle.keep_alive = keep_alive

    def drop_last_request(self) -> RequestResponseCycle:
        """Discard the last request, so that the application cannot answer it, and return it."""
        disconnect(self.cycle)
        if self.pipeline:
            self.pipeline.popleft()
        return self.cycle


def disconnect(request: RequestResponseCycle) -> None:
    """Notify the application that the client of a request has disconnected."""
    request.disconnected = True
    request.message_event.set()
