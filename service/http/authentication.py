"""Authentication by keys and their scopes, as a dependency of routes."""

from __future__ import annotations

from typing import Any

from fastapi import Depends, Request
from fastapi.openapi.models import APIKey, APIKeyIn, HTTPBearer, SecurityBase
from fastapi.security.base import SecurityBase as SecurityDependency

from service.http.errors import ApiError
from service.http.state import state_of
from service.keys import Caller, KeyRing, Scope

_TEXT = "A key; `budgetformer keys new` makes one."
HEADER = "X-API-Key"
SCHEMES: dict[str, SecurityBase] = {
    "bearer": HTTPBearer(description=_TEXT),
    "header": APIKey.model_validate({"in": APIKeyIn.header, "name": HEADER, "description": _TEXT}),
}
"""Security schemes of OpenAPI; every route with a key accepts both."""


class _Needs(SecurityDependency):
    """Admit requests whose key has a scope, within the key's limit of concurrent requests."""

    def __init__(self, scope: Scope) -> None:
        self.scheme_name = "bearer"
        self.model = SCHEMES[self.scheme_name]
        self._scope = scope

    async def __call__(self, request: Request) -> None:
        state = state_of(request)
        request.state.scope = self._scope
        caller = _caller(request, state.keys, _key_of(request), self._scope)
        request.state.caller = caller
        # `Observe` releases the request.
        state.admission.request(caller, request.scope["state"])


def needs(scope: Scope) -> Any:
    """Return a dependency that admits requests whose key has a scope."""
    return Depends(_Needs(scope))


def document_keys(schema: dict[str, Any]) -> None:
    """Add both security schemes to the OpenAPI document."""
    schemes = {
        name: scheme.model_dump(mode="json", by_alias=True, exclude_none=True)
        for name, scheme in SCHEMES.items()
    }
    schema["components"]["securitySchemes"] = schemes
    for operations in schema["paths"].values():
        for operation in operations.values():
            if "security" in operation:
                operation["security"] = [{name: []} for name in SCHEMES]


def _key_of(request: Request) -> str | None:
    """Return the key of a request, preferably its Bearer token; None: it has none."""
    kind, _, token = request.headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer" and token.strip():
        return token.strip()
    return request.headers.get(HEADER)


def _caller(request: Request, keys: KeyRing, given: str | None, scope: Scope) -> Caller:
    caller = keys.find(given.encode("latin-1", "replace") if given else None)
    if caller is not None and keys.opens(caller, scope):
        return caller
    if not given:
        message = (
            f"a key with the scope {scope!r} is required; send it as a Bearer token or in X-API-Key"
        )
        raise ApiError(401, message, code="no_key")
    if caller is None or caller.key is None:
        raise ApiError(401, "the key is wrong", code="wrong_key")
    request.state.caller = caller
    message = f"the key {caller.name!r} lacks the scope {scope!r}"
    raise ApiError(403, message, code="missing_scope")
