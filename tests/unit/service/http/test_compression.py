"""Responses that `Compress` does not compress."""

from __future__ import annotations

from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from service.http.compression import Compress

PARTS = [b"a" * 100, b"b" * 100]


async def stream(_: Request) -> Response:
    async def parts() -> AsyncIterator[bytes]:
        for part in PARTS:
            yield part

    return StreamingResponse(parts(), media_type="text/plain")


async def encoded(_: Request) -> Response:
    return Response(b"".join(PARTS), headers={"Content-Encoding": "identity"})


@pytest.mark.parametrize("path", ["/stream", "/encoded"])
async def test_streams_and_encoded_responses_are_not_compressed(path: str) -> None:
    app = Starlette(routes=[Route("/stream", stream), Route("/encoded", encoded)])
    with ThreadPoolExecutor(1) as threads:
        transport = httpx.ASGITransport(Compress(app, 10, threads))
        async with httpx.AsyncClient(transport=transport, base_url="http://s") as client:
            response = await client.get(path, headers={"Accept-Encoding": "gzip"})
    assert response.content == b"".join(PARTS)
    assert response.headers.get("content-encoding") != "gzip"
    assert "vary" not in response.headers
