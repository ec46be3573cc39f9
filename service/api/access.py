"""Who asks, and whether they may: what stands before every route but the open ones."""

from __future__ import annotations

import math
import time
from typing import Annotated, Any

from fastapi import Depends, Request, Security
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer

from service.access import Caller, Scope
from service.api.errors import ApiError
from service.api.state import state_of
from service.hub.messages import TextsAsked

_TEXT = "A key; `budgetformer keys new` makes one."
_Bearer = Annotated[
    HTTPAuthorizationCredentials | None,
    Security(HTTPBearer(scheme_name="bearer", description=_TEXT, auto_error=False)),
]
_Header = Annotated[
    str | None,
    Security(
        APIKeyHeader(name="X-API-Key", scheme_name="header", description=_TEXT, auto_error=False)
    ),
]


def needs(scope: Scope) -> Any:
    """Return a dependency that lets those in whose key has a scope, as many as it may at once."""

    async def let_in(request: Request, bearer: _Bearer, header: _Header) -> None:
        given = bearer.credentials if bearer is not None else header
        caller = _caller(request, given, scope)
        request.state.caller = caller
        if caller.busy:
            message = "this key has as many requests under way as it may; try again in 1 s"
            raise ApiError(429, message, code="too_many_requests", retry_after=1)
        caller.requests += 1
        request.state.under_way = caller  # until `Observe` has seen the end of it

    return Depends(let_in)


def _caller(request: Request, given: str | None, scope: Scope) -> Caller:
    keys = state_of(request).keys
    caller = keys.find(given.encode("latin-1", "replace") if given else None)
    if caller is not None and keys.opens(caller, scope):
        return caller
    if not given:
        message = f"this takes a key with the scope {scope!r}, as a Bearer token or in X-API-Key"
        raise ApiError(401, message, code="no_key")
    if caller is None or caller.key is None:
        raise ApiError(401, "the key is wrong", code="wrong_key")
    request.state.caller = caller
    message = f"the key {caller.name!r} lacks the scope {scope!r}"
    raise ApiError(403, message, code="missing_scope")


def spend(request: Request, texts: int) -> None:
    """Count the texts of a request against what its caller may ask for.

    Raises:
        ApiError: 429, it is too much for now.
    """
    caller: Caller = request.state.caller
    wait = caller.take(texts, time.monotonic())
    if wait:
        seconds = math.ceil(wait)
        message = f"this key may not ask for so many texts yet; try again in {seconds} s"
        raise ApiError(429, message, code="rate", retry_after=seconds)
    state_of(request).hub.observe(TextsAsked(caller.name, texts))
