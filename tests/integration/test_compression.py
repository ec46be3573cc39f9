"""Compression of answers for clients that accept it."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pytest
import pytest_asyncio

from service.http.accept import ARROW
from service.http.compression import MAX_LOOP_BYTES
from service.http.state import THREADS
from tests.support.serving import Service, service
from tests.support.stores import TOPICS, labelled_sentences

pytestmark = pytest.mark.asyncio(loop_scope="module")

TEXTS = [text for text, _ in labelled_sentences()][:48]
KSERVE = f"/v2/models/{TOPICS}/infer"
MIN_BYTES = 400
GZIP, PLAIN = {"Accept-Encoding": "gzip"}, {"Accept-Encoding": "identity"}
TENSORS = {
    "inputs": [{"name": "text", "datatype": "BYTES", "shape": [len(TEXTS)], "data": TEXTS}],
    "parameters": {"binary_data_output": True},
}
REQUESTS: dict[str, tuple[str, str, Any, dict[str, str]]] = {
    "direct": ("POST", "/classify", {"input": TEXTS}, {}),
    "arrow": ("POST", "/classify", {"input": TEXTS}, {"Accept": ARROW}),
    "routed": ("POST", "/tokenize", {"input": TEXTS}, {}),
    "KServe, binary": ("POST", KSERVE, TENSORS, {}),
    "metrics": ("GET", "/metrics", None, {}),
    "page": ("GET", "/playground/style.css", None, {}),
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(model_store: Path) -> AsyncIterator[Service]:
    options = {"quality_floor": "balanced", "compress_min_bytes": MIN_BYTES}
    async with service(model_store, models=[TOPICS], **options) as it:
        yield it


async def sent(
    running: Service, method: str, path: str, body: Any, headers: dict[str, str]
) -> tuple[httpx.Headers, bytes]:
    """Return the headers and the undecoded bytes of an answer."""
    asking = running.client.stream(method, path, json=body, headers=headers)
    async with asking as response:
        assert response.status_code in (200, 304)
        return response.headers, b"".join([part async for part in response.aiter_raw()])


def comparable(headers: httpx.Headers, content: bytes) -> Any:
    """Return the content of an answer without the parts that differ between requests."""
    if headers["content-type"] == ARROW:
        return pa.ipc.open_stream(content).read_all()
    if length := headers.get("inference-header-content-length"):
        head = json.loads(content[: int(length)])
        sizes = [output["parameters"]["binary_data_size"] for output in head["outputs"]]
        assert int(length) + sum(sizes) == len(content)
        return head["outputs"], content[int(length) :]
    text = content.decode()
    if text.startswith("#"):
        return [line for line in text.splitlines() if line.startswith("# TYPE")]
    return re.sub(r'"(id|created)":("[^"]*"|\d+)', "", text)


@pytest.mark.parametrize("kind", REQUESTS)
async def test_a_compressed_answer_has_the_same_content(running: Service, kind: str) -> None:
    method, path, body, headers = REQUESTS[kind]
    plain_headers, plain = await sent(running, method, path, body, headers | PLAIN)
    gzip_headers, zipped = await sent(running, method, path, body, headers | GZIP)
    assert "content-encoding" not in plain_headers
    assert gzip_headers["content-encoding"] == "gzip"
    assert (int(plain_headers["content-length"]), len(zipped)) == (
        len(plain), int(gzip_headers["content-length"]),
    )  # fmt: skip
    assert len(zipped) < len(plain)
    content = gzip.decompress(zipped)
    assert comparable(gzip_headers, content) == comparable(plain_headers, plain)
    for one in (plain_headers, gzip_headers):
        assert one["vary"] == "Accept-Encoding"


async def test_small_answers_and_health_are_never_compressed(running: Service) -> None:
    for method, path, body in (
        ("POST", "/tokenize", {"input": "an otter"}),
        ("GET", "/health", None),
        ("GET", "/health/live", None),
        ("GET", "/v2/health/ready", None),
    ):
        headers, content = await sent(running, method, path, body, GZIP)
        assert "content-encoding" not in headers, path
        assert "vary" not in headers, path
        assert int(headers["content-length"]) == len(content)
    assert len((await running.client.get("/health")).content) > MIN_BYTES


async def test_compression_can_be_disabled(model_store: Path) -> None:
    async with service(model_store, models=[TOPICS], compress_min_bytes=0) as plain:
        headers, _ = await sent(plain, "POST", "/classify", {"input": TEXTS}, GZIP)
    assert "content-encoding" not in headers


async def test_vary_names_both_the_encoding_and_the_origin(model_store: Path) -> None:
    origin = {"Origin": "https://page"}
    async with service(model_store, models=[TOPICS], cors_origins=["https://page"]) as shared:
        headers, _ = await sent(shared, *REQUESTS["direct"][:3], GZIP | origin)
    assert {part.strip() for part in headers["vary"].split(",")} == {"Accept-Encoding", "Origin"}


async def test_not_modified_answers_have_vary_and_etag(running: Service) -> None:
    page, _ = await sent(running, "GET", "/playground/style.css", None, GZIP)
    known = {"If-None-Match": page["etag"]}
    for encoding in (GZIP, PLAIN):
        again, content = await sent(running, "GET", "/playground/style.css", None, known | encoding)
        assert (content, again["vary"], again["etag"]) == (b"", "Accept-Encoding", page["etag"])


async def test_head_has_the_headers_of_get(running: Service) -> None:
    head, content = await sent(running, "HEAD", "/playground/style.css", None, GZIP)
    get, _ = await sent(running, "GET", "/playground/style.css", None, GZIP)
    assert content == b""
    assert {n: v for n, v in head.items() if n != "x-request-id"} == {
        n: v for n, v in get.items() if n != "x-request-id"
    }


async def test_large_answers_are_compressed_in_a_thread(running: Service) -> None:
    threads, held = running.app.state.shared.tokenizing, threading.Event()
    path = "/playground/swagger-ui.css"
    assert len((await sent(running, "GET", path, None, PLAIN))[1]) > MAX_LOOP_BYTES
    try:
        for _ in range(THREADS):
            threads.submit(held.wait)
        large = asyncio.create_task(sent(running, "GET", path, None, GZIP))
        headers, _ = await sent(running, *REQUESTS["page"][:3], GZIP)
        assert headers["content-encoding"] == "gzip", "a small one takes no thread"
        assert not large.done()
    finally:
        held.set()
    assert (await large)[0]["content-encoding"] == "gzip"
