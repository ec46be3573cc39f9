"""GET / and /docs: the playground and the API documentation, from files of this package."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse

from service.http.authentication import needs
from service.http.errors import ApiError
from service.http.health import query_hub
from service.http.state import state_of
from service.ipc.control_messages import GetRecentTraffic

router = APIRouter(tags=["playground"])

KINDS = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
POLICY = (
    "default-src 'none'; script-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
)
STRICT = POLICY + "style-src 'self'; require-trusted-types-for 'script'"
SWAGGER = POLICY + "style-src 'self' 'unsafe-inline'"
"""Content security policy for Swagger UI, which writes inline styles and HTML."""
HEADERS = {"Cross-Origin-Opener-Policy": "same-origin", "Cache-Control": "no-cache"}
DOCS_ROUTE, FILE_ROUTE, RECENT_ROUTE = "/docs", "/playground/{name}", "/playground/recent"
UNLISTED = (DOCS_ROUTE, FILE_ROUTE, RECENT_ROUTE)
"""Routes of the pages, which the API documentation omits."""
ROOT = b"{root}"
"""Placeholder in pages before each link to this server."""


@dataclass(frozen=True)
class _File:
    content: bytes
    kind: str
    tag: str

    def response(self, request: Request, policy: str = STRICT) -> Response:
        """Return the file, or 304 if the browser has it."""
        headers = HEADERS | {"Content-Security-Policy": policy, "ETag": self.tag}
        if request.headers.get("if-none-match") == self.tag:
            return Response(status_code=304, headers=headers)
        return Response(self.content, headers=headers, media_type=self.kind)


_PAGE = files("service.http").joinpath("page")
_NAMES = {
    entry.name: kind
    for entry in _PAGE.iterdir()
    if (kind := KINDS.get(entry.name.rpartition(".")[2]))
}


@cache
def _file(name: str, root: str = "") -> _File:
    """Read a file at its first request, because Swagger UI has two megabytes.

    Links in pages are relative; with a path prefix they begin with it, so that they also work if
    the page is requested without the slash at the end of the prefix.
    """
    content = _PAGE.joinpath(name).read_bytes()
    if name.endswith(".html"):
        content = content.replace(ROOT, f"{root}/".encode() if root else b"")
    # A weak tag, because the response may be compressed.
    return _File(content, _NAMES[name], f'W/"{hashlib.sha256(content).hexdigest()[:16]}"')


@router.get("/", summary="Playground", response_class=HTMLResponse)
async def playground(request: Request) -> Response:
    """Show a page that classifies what is typed, and what it cost."""
    return _file("index.html", request.scope.get("root_path", "")).response(request)


@router.get(DOCS_ROUTE, include_in_schema=False)
async def docs(request: Request) -> Response:
    """Show the API's documentation, with Swagger UI."""
    return _file("docs.html", request.scope.get("root_path", "")).response(request, SWAGGER)


@router.get(RECENT_ROUTE, include_in_schema=False, dependencies=[needs("classify")])
async def recent(request: Request, model: str | None = None) -> Response:
    """Tell what a model's texts took in the last minutes."""
    state = state_of(request)
    return await query_hub(request, GetRecentTraffic(0, state.model(model).checkpoint.name))


@router.get(FILE_ROUTE, include_in_schema=False)
async def file(request: Request, name: str) -> Response:
    """Send one of the page's files."""
    if name not in _NAMES or name.endswith(".html"):
        raise ApiError(404, "the playground has no such file")
    return _file(name).response(request)
