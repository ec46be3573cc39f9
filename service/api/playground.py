"""GET /: a page to try the models on, of plain files that need nothing from elsewhere."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse

from service.api.access import needs
from service.api.errors import ApiError
from service.api.health import shown
from service.api.state import state_of
from service.hub.messages import TellRecent

router = APIRouter(tags=["playground"])

KINDS = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
FILE_ROUTE, RECENT_ROUTE = "/playground/{name}", "/playground/recent"
UNLISTED = (FILE_ROUTE, RECENT_ROUTE)
"""Routes that only the page asks, and that the API's documentation leaves out."""


@dataclass(frozen=True)
class _File:
    content: bytes
    kind: str
    tag: str

    def response(self, request: Request) -> Response:
        """Return the file, or 304 to a browser that has it."""
        headers = HEADERS | {"ETag": self.tag}
        if request.headers.get("if-none-match") == self.tag:
            return Response(status_code=304, headers=headers)
        return Response(self.content, headers=headers, media_type=self.kind)


def _read() -> dict[str, _File]:
    found = {}
    for entry in files("service.api").joinpath("page").iterdir():
        kind = KINDS.get(entry.name.rpartition(".")[2])
        if kind is not None:
            content = entry.read_bytes()
            tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
            found[entry.name] = _File(content, kind, tag)
    return found


_FILES = _read()


@router.get("/", summary="Playground", response_class=HTMLResponse)
async def playground(request: Request) -> Response:
    """Show a page that classifies what is typed, and what it cost."""
    return _FILES["index.html"].response(request)


@router.get(RECENT_ROUTE, include_in_schema=False, dependencies=[needs("classify")])
async def recent(request: Request, model: str | None = None) -> Response:
    """Tell what a model's texts took in the last minutes."""
    state = state_of(request)
    return await shown(request, TellRecent(0, state.model(model).checkpoint.name))


@router.get(FILE_ROUTE, include_in_schema=False)
async def file(request: Request, name: str) -> Response:
    """Send one of the page's files."""
    if name not in _FILES:
        raise ApiError(404, "the playground has no such file")
    return _FILES[name].response(request)
