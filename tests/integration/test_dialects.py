"""Rules for all dialects: nulls, encodings of JSON, invalid Unicode, HEAD."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest

from service.http import kserve
from service.http.model_routes import LoadRequest
from service.http.schemas import (
    ClassifyRequest,
    IndexRequest,
    InferInput,
    InferOutput,
    InferParameters,
    InferRequest,
    OutputParameters,
    PipelineParameters,
    PredictRequest,
    RepositoryRequest,
    RequestBody,
    TensorParameters,
    TextPair,
    TokenizeRequest,
)
from tests.support.serving import ADMIN, Service
from tests.support.stores import TOPICS

pytestmark = pytest.mark.asyncio(loop_scope="session")

INFER = f"/v2/models/{TOPICS}/infer"
JSON = {"Content-Type": "application/json"}


def tensor(*texts: Any, **more: Any) -> dict[str, Any]:
    shape = [len(texts)]
    return {"name": "text", "shape": shape, "datatype": "BYTES", "data": list(texts), **more}


def nulls(schema: type[RequestBody]) -> dict[str, None]:
    """Return every optional field of a schema, each null."""
    fields = schema.model_fields.items()
    return {name: None for name, field in fields if not field.is_required()}


OUTPUT = {"name": "probs", "parameters": nulls(OutputParameters)}
NULLS: list[tuple[str, dict[str, Any]]] = [
    ("/classify", {**nulls(ClassifyRequest), "input": {**nulls(TextPair), "text": "a"}}),
    ("/invocations", {**nulls(ClassifyRequest), "input": ["a"]}),
    ("/invocations", {**nulls(PredictRequest), "inputs": "a"}),
    ("/predict", {**nulls(PredictRequest), "inputs": "a"}),
    ("/", {"inputs": ["a"], "parameters": nulls(PipelineParameters)}),
    ("/tokenize", {**nulls(TokenizeRequest), "input": "a"}),
    (INFER, {**nulls(InferRequest), "inputs": [{**nulls(InferInput), **tensor("a")}]}),
    (
        INFER,
        {
            "inputs": [tensor("a", parameters=nulls(TensorParameters))],
            "outputs": [OUTPUT, {**nulls(InferOutput), "name": "label"}],
            "parameters": nulls(InferParameters),
        },
    ),
    ("/v2/repository/index", nulls(IndexRequest)),
]


@pytest.mark.parametrize(("path", "body"), NULLS)
async def test_null_means_absent(shared: Service, path: str, body: dict[str, Any]) -> None:
    response = await shared.client.post(path, json=body)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize("schema", [LoadRequest, RepositoryRequest])
async def test_null_means_absent_in_requests_that_change_models(
    shared: Service, schema: type[RequestBody]
) -> None:
    path = {LoadRequest: "/models/none/load", RepositoryRequest: "/v2/repository/models/none/load"}
    response = await shared.client.post(path[schema], json=nulls(schema), headers=ADMIN)
    assert response.status_code == 404


@pytest.mark.parametrize(
    ("path", "body", "blamed"),
    [
        ("/classify", {"input": None}, "input"),
        ("/classify", {"input": {"text": None}}, "input"),
        ("/classify", {"input": "a", "modle": None}, "modle"),
        ("/predict", {"inputs": None}, "inputs"),
        (INFER, {"inputs": None}, "inputs"),
        (INFER, {"inputs": [tensor("a", name=None)]}, "name"),
    ],
)
async def test_null_is_refused_for_required_fields(
    shared: Service, path: str, body: dict[str, Any], blamed: str
) -> None:
    response = await shared.client.post(path, json=body)
    assert response.status_code == 422
    assert blamed in response.text


@pytest.mark.parametrize(
    "change",
    [
        {"id": None},
        {"parameters": {"content_type": "str", "headers": {}, "x": [1]}},
        {"inputs": [tensor("a", parameters={"content_type": "str"})]},
        {"outputs": [{"name": "label", "parameters": {"content_type": "np", "shm": 1}}]},
    ],
)
async def test_unknown_parameters_of_the_open_inference_protocol_are_ignored(
    shared: Service, change: dict[str, Any]
) -> None:
    response = await shared.client.post(INFER, json={"inputs": [tensor("a")], **change})
    assert response.status_code == 200, response.text


INVALID_TEXTS = {
    "lone surrogate": ("\\ud83d", b"\\ud83d"),
    "lone low surrogate": ("\\udc00", b"x \\udc00 \\ud83e\\udda6"),
    "raw byte": ("UTF-8", b"\xff"),
    "half a character": ("UTF-8", b"\xf0\x9f"),
    "raw surrogate": ("UTF-8", b"\xed\xa0\xbd"),
}
PLACES = [
    ("/classify", '{"input": ["fine", "broken @"]}', "input[1]"),
    ("/classify", '{"input": "broken @", "top_k": 1}', "input"),
    ("/classify", '{"input": ["fine", {"text": "a", "text_pair": "@"}]}', "input[1].text_pair"),
    ("/invocations", '{"input": ["fine", "broken @"]}', "input[1]"),
    ("/invocations", '{"inputs": [["fine"], ["a", "@"]]}', "inputs[1][1]"),
    ("/predict", '{"inputs": [["fine"], ["@"]]}', "inputs[1][0]"),
    ("/", '{"inputs": "@"}', "inputs"),
    ("/tokenize", '{"input": ["fine", "@"]}', "input[1]"),
    (INFER, json.dumps({"inputs": [tensor("fine", "@")]}), "inputs[0].data[1]"),
    (INFER, json.dumps({"inputs": [tensor("fine", ["@"])]}), "inputs[0].data[1][0]"),
]


@pytest.mark.parametrize("kind", INVALID_TEXTS)
@pytest.mark.parametrize(("path", "body", "place"), PLACES)
async def test_the_error_states_where_a_text_is_invalid_unicode(
    shared: Service, path: str, body: str, place: str, kind: str
) -> None:
    shown, broken = INVALID_TEXTS[kind]
    content = body.encode().replace(b"@", broken)
    response = await shared.client.post(path, content=content, headers=JSON)
    assert response.status_code == 400
    assert f" {place} " in response.text
    assert ("UTF-8" if shown == "UTF-8" else "lone surrogate") in response.text


async def test_errors_do_not_contain_names_that_are_invalid_unicode(shared: Service) -> None:
    response = await shared.client.post("/classify", content=b'{"xyzzy \\ud83d": 1}', headers=JSON)
    assert response.status_code == 400
    assert "a name holds a lone surrogate" in response.text
    assert "xyzzy" not in response.text


@pytest.mark.parametrize("broken", [b"\xff", b"\xed\xa0\xbd", b"\xf0\x9f"])
async def test_the_error_states_which_binary_text_is_invalid_unicode(
    shared: Service, broken: bytes
) -> None:
    blob = b"".join(struct.pack("<I", len(text)) + text for text in (b"fine", broken))
    tensor = {"name": "text", "shape": [2], "datatype": "BYTES"}
    head = json.dumps(
        {"inputs": [tensor | {"parameters": {"binary_data_size": len(blob)}}]}
    ).encode()
    headers = {kserve.HEADER_LENGTH: str(len(head))}
    response = await shared.client.post(INFER, content=head + blob, headers=headers)
    assert response.status_code == 400
    assert "text[1] is not UTF-8" in response.text


@pytest.mark.parametrize("path", ["/classify", "/tokenize", "/invocations"])
async def test_a_byte_order_mark_is_ignored(shared: Service, path: str) -> None:
    content = '\ufeff{"input": "a"}'.encode()
    assert (await shared.client.post(path, content=content, headers=JSON)).status_code == 200


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"])
async def test_other_encodings_of_json_are_refused_by_name(shared: Service, encoding: str) -> None:
    content = '{"input": "a"}'.encode(encoding)
    response = await shared.client.post("/classify", content=content, headers=JSON)
    assert response.status_code == 400
    assert encoding[:6].upper() in response.text


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
async def test_nan_and_infinity_are_refused_by_name(shared: Service, constant: str) -> None:
    content = f'{{"input": "a", "threshold": {constant}}}'.encode()
    response = await shared.client.post("/classify", content=content, headers=JSON)
    assert response.status_code == 400
    assert f"{constant} is not a JSON number" in response.text


async def test_the_last_of_duplicate_names_is_used(shared: Service) -> None:
    content = b'{"input": "a", "top_k": 3, "top_k": 1}'
    response = await shared.client.post("/classify", content=content, headers=JSON)
    assert len(response.json()["data"][0]["labels"]) == 1


@pytest.mark.parametrize(
    ("method", "path", "status", "fields"),
    [
        ("GET", "/v2/nothing", 404, {"error"}),
        ("DELETE", f"/v2/models/{TOPICS}", 405, {"error"}),
        ("GET", "/predict", 405, {"error", "error_type"}),
        ("POST", "/predict/", 404, {"error", "error_type"}),
    ],
)
async def test_errors_of_unknown_routes_have_the_format_of_their_path(
    shared: Service, method: str, path: str, status: int, fields: set[str]
) -> None:
    response = await shared.client.request(method, path)
    assert response.status_code == status
    assert set(response.json()) == fields
    assert path in response.json()["error"]
    assert ("allow" in response.headers) == (status == 405)


async def test_head_is_answered_like_get_without_a_body(shared: Service) -> None:
    paths = shared.app.openapi()["paths"]
    assert len(paths) > 10
    for path, methods in {**paths, "/docs": {"get"}, "/openapi.json": {"get"}}.items():
        filled = path.format(name=TOPICS, version=2, job="0" * 32)
        head = await shared.client.head(filled)
        assert head.content == b""
        if "get" not in methods:
            assert head.status_code == 405, path
            continue
        get = await shared.client.get(filled)
        status = 404 if "{job}" in path else 401 if path.endswith("/rollout") else 200
        assert head.status_code == get.status_code == status, path
        for name in ("content-type", "etag", "cache-control", "x-frame-options"):
            assert head.headers.get(name) == get.headers.get(name), path
        assert "content-length" in head.headers


async def test_head_of_readiness_routes_is_503_while_draining(shared: Service) -> None:
    shared.app.state.shared.admission.draining = True
    try:
        for path in ("/health/ready", "/health", "/ping", "/v2/health/ready"):
            response = await shared.client.head(path)
            assert (response.status_code, response.content) == (503, b"")
    finally:
        shared.app.state.shared.admission.draining = False


async def test_head_requests_are_counted_under_their_route(shared: Service) -> None:
    before = await shared.scrape()
    await shared.client.head("/v1/models")
    after = await shared.scrape()
    counted = after.minus(before, "requests_total", route="/v1/models", outcome="ok")
    assert counted == 1


async def test_the_allow_header_includes_head_for_get_routes(shared: Service) -> None:
    assert (await shared.client.post("/health")).headers["allow"] == "GET, HEAD"
    assert (await shared.client.head("/classify")).headers["allow"] == "POST"
