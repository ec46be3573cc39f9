"""GET /: a page to try the model on."""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

router = APIRouter(tags=["playground"])

_PAGE = files("service.api").joinpath("playground.html").read_text()
_POLICY = "default-src 'self'; style-src 'self' 'unsafe-inline'; script-src 'self' 'unsafe-inline'"


@router.get("/", summary="Playground", response_class=HTMLResponse)
async def playground() -> HTMLResponse:
    """Show a page that classifies what is typed, and what it cost."""
    return HTMLResponse(_PAGE, headers={"Content-Security-Policy": _POLICY})
