"""Errors of clients: status, shape and field of the answer, and never the text of an input."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.support.serving import Service, error_of
from tests.support.stores import HEADS, MAX_TOKENS, PICKY

pytestmark = pytest.mark.asyncio(loop_scope="session")

SECRET = "xyzzy plugh"
JSON = {"Content-Type": "application/json"}


async def send(shared: Service, content: bytes, path: str = "/classify") -> Any:
    return await shared.client.post(path, content=content, headers=JSON)


MALFORMED_BODIES = {
    "nothing": b"",
    "white space": b"  \n",
    "half": b'{"input": "xyzzy plugh',
    "a word": b"xyzzy plugh",
    "form": b"input=xyzzy plugh",
    "single quotes": b"{'input': 'xyzzy plugh'}",
    "trailing comma": b'{"input": "xyzzy plugh",}',
    "two values": b'{"input": "xyzzy plugh"} {}',
    "NaN": b'{"input": "xyzzy plugh", "threshold": NaN}',
    "Infinity": b'{"input": "xyzzy plugh", "threshold": Infinity}',
    "-Infinity": b'{"input": "xyzzy plugh", "quality": -Infinity}',
    "100,000 brackets": b"[" * 100_000 + b"]" * 100_000,
    "100,000 open brackets": b"[" * 100_000,
    "100,000 objects": b'{"input":' * 50_000,
    "brackets in the input": b'{"input": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "not UTF-8": b'{"input": "xyzzy plugh \xff"}',
    "UTF-16": '{"input": "xyzzy plugh"}'.encode("utf-16"),
    "lone surrogate": b'{"input": "xyzzy plugh \\ud83d"}',
    "lone low surrogate": b'{"input": "xyzzy plugh \\udc00 x"}',
    "surrogates the wrong way round": b'{"input": "xyzzy plugh \\udc00\\ud83d"}',
    "raw control character": b'{"input": "xyzzy plugh \x01"}',
    "bad escape": b'{"input": "xyzzy plugh \\q"}',
    "NUL": b"\x00",
}


@pytest.mark.parametrize("path", ["/classify", "/tokenize"])
@pytest.mark.parametrize("kind", MALFORMED_BODIES)
async def test_malformed_json_is_refused(shared: Service, kind: str, path: str) -> None:
    error = error_of(await send(shared, MALFORMED_BODIES[kind], path), 400, "invalid_json")
    assert "xyzzy" not in error["message"]
    assert len(error["message"]) < 300


async def test_escaped_surrogate_pairs_are_accepted(shared: Service) -> None:
    response = await send(shared, b'{"input": "\\ud83e\\udda6"}')
    assert response.status_code == 200


@pytest.mark.parametrize("body", [b"[]", b'"text"', b"null", b"7", b"true", b'[{"input": "a"}]'])
async def test_json_must_be_an_object(shared: Service, body: bytes) -> None:
    error_of(await send(shared, body), 422)


@pytest.mark.parametrize("kind", ["text/plain", "application/xml", "multipart/form-data; x=y", "x"])
async def test_other_media_types_are_refused(shared: Service, kind: str) -> None:
    response = await shared.client.post(
        "/classify", content=b'{"input": "a"}', headers={"Content-Type": kind}
    )
    error_of(response, 415, "unsupported_media_type")


@pytest.mark.parametrize(
    "kind",
    ["application/json; charset=utf-8", "APPLICATION/JSON", "application/vnd.api+json", None],
)
async def test_json_media_types_are_accepted(shared: Service, kind: str | None) -> None:
    headers = {"Content-Type": kind} if kind else {}
    response = await shared.client.post("/classify", content=b'{"input": "a"}', headers=headers)
    assert response.status_code == 200


INVALID_FIELDS = [
    ({}, "input"),
    ({"input": None}, "input"),
    ({"input": 5}, "input"),
    ({"input": True}, "input"),
    ({"input": []}, "input"),
    ({"input": ["a", 5]}, "input[1]"),
    ({"input": ["a", None]}, "input[1]"),
    ({"input": ["a", "b", ["c"]]}, "input[2]"),
    ({"input": ["a", {"text_pair": "b"}]}, "input[1].text"),
    ({"input": ["a", {"text": 5}]}, "input[1].text"),
    ({"input": ["a", {"text": "b", "text_pair": 5}]}, "input[1].text_pair"),
    ({"input": {"text": None}}, None),
    ({"input": {}}, None),
    ({"input": "a", "model": 5}, "model"),
    ({"input": "a", "top_k": 0}, "top_k"),
    ({"input": "a", "top_k": -1}, "top_k"),
    ({"input": "a", "top_k": "1"}, "top_k"),
    ({"input": "a", "top_k": 1.5}, "top_k"),
    ({"input": "a", "top_k": True}, "top_k"),
    ({"input": "a", "threshold": -0.1}, "threshold"),
    ({"input": "a", "threshold": 1.1}, "threshold"),
    ({"input": "a", "threshold": "0.5"}, "threshold"),
    ({"input": "a", "use_activation": 1}, "use_activation"),
    ({"input": "a", "truncate": "yes"}, "truncate"),
    ({"input": "a", "quality": "superb"}, "quality"),
    ({"input": "a", "quality": "FAST"}, "quality"),
    ({"input": "a", "quality": -1}, "quality"),
    ({"input": "a", "quality": 101}, "quality"),
    ({"input": "a", "quality": True}, "quality"),
    ({"input": "a", "quality": []}, "quality"),
    ({"input": "a", "heads": -1}, "heads"),
    ({"input": "a", "heads": HEADS + 1}, "heads"),
    ({"input": "a", "heads": 1.5}, "heads"),
    ({"input": "a", "heads": 2**70}, "heads"),
    ({"input": "a", "heads": "2"}, "heads"),
    ({"input": "a", "max_heads": -1}, "max_heads"),
    ({"input": "a", "max_heads": HEADS + 1}, "max_heads"),
    ({"input": "a", "heads": 0, "model": PICKY}, "heads"),
    ({"input": "a", "max_heads": 0, "model": PICKY}, "max_heads"),
    ({"input": "a", "timeout_ms": 0}, "timeout_ms"),
    ({"input": "a", "timeout_ms": -5}, "timeout_ms"),
    ({"input": "a", "timeout_ms": "100"}, "timeout_ms"),
    ({"input": "a", "timeout_ms": 1.5}, "timeout_ms"),
    ({"input": "a", "return_heads": 1}, "return_heads"),
]


@pytest.mark.parametrize(
    ("body", "param"), INVALID_FIELDS, ids=lambda value: json.dumps(value)[:60]
)
async def test_the_error_names_the_invalid_field(
    shared: Service, body: dict[str, Any], param: str | None
) -> None:
    error = error_of(await shared.client.post("/classify", json=body), 422)
    if param is None:
        assert str(error["param"]).startswith("input")
    else:
        assert error["param"] == param
        assert param in error["message"]


@pytest.mark.parametrize(
    "huge", [2**31, 2**63 - 1, 2**63, 10**30, 10**400], ids=lambda huge: f"{len(str(huge))} digits"
)
async def test_a_huge_timeout_causes_no_server_error(shared: Service, huge: int) -> None:
    response = await shared.ask("a", timeout_ms=huge)
    assert response.status_code in (200, 422)


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("imput", "input"),
        ("inputs", "input"),
        ("topk", "top_k"),
        ("treshold", "threshold"),
        ("max_head", "max_heads"),
        ("qualty", "quality"),
        ("timeout", "timeout_ms"),
        ("truncation", "truncate"),
        ("return_head", "return_heads"),
        ("activation", "use_activation"),
        ("modell", "model"),
    ],
)
async def test_the_error_suggests_the_most_similar_field(
    shared: Service, name: str, suggestion: str
) -> None:
    error = error_of(await shared.ask("a", **{name: 1}), 422, "unknown_field", name)
    assert f"did you mean {suggestion!r}?" in error["message"]


@pytest.mark.parametrize(
    "name",
    [
        "zzz",
        "stream",
        "str",
        "string_input",
        "strict",
        "float_type",
        "list[",
        "TextPair",
        "a.b",
        "",
    ],
)
async def test_any_unknown_field_is_named_in_the_error(shared: Service, name: str) -> None:
    error = error_of(await shared.ask("a", **{name: 1}), 422, "unknown_field", name)
    assert repr(name) in error["message"]


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"text": "a", "text_pairs": "b"}, "input.text_pairs"),
        (["a", {"text": "a", "txt_pair": "b"}], "input[1].txt_pair"),
    ],
)
async def test_unknown_fields_of_items_are_refused(shared: Service, given: Any, param: str) -> None:
    error = error_of(await shared.ask(given), 422, "unknown_field", param)
    assert "did you mean 'text_pair'?" in error["message"]


async def test_unknown_fields_of_tokenize_are_refused(shared: Service) -> None:
    response = await shared.client.post("/tokenize", json={"input": "a", "modle": "topics"})
    error = error_of(response, 422, "unknown_field", "modle")
    assert "did you mean 'model'?" in error["message"]


@pytest.mark.parametrize("path", ["/classify", "/tokenize"])
@pytest.mark.parametrize("model", ["nothing", "topics:1", "topics:x", "topics:", ":2", "", "../x"])
async def test_unknown_models_are_refused(shared: Service, path: str, model: str) -> None:
    response = await shared.client.post(path, json={"input": "a", "model": model})
    if model in ("topics:", ""):
        assert response.status_code in (200, 404)
        return
    error_of(response, 404, "unknown_model", "model")


async def test_the_error_about_an_unknown_model_lists_the_served_models(shared: Service) -> None:
    error = error_of(await shared.ask("a", model="topisc"), 404)
    assert "topics" in error["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("POST", "/v1/nothing", 404),
        ("GET", "/models/nothing", 404),
        ("GET", "/classify", 405),
        ("DELETE", "/classify", 405),
        ("POST", "/health", 405),
        ("POST", "/metrics", 405),
        ("GET", "/models/topics/load", 405),
    ],
)
async def test_unknown_routes_and_methods_are_refused(
    shared: Service, method: str, path: str, status: int
) -> None:
    response = await shared.client.request(method, path)
    error_of(response, status)
    assert ("allow" in response.headers) == (status == 405)


class TestSizes:
    async def test_a_body_with_a_large_content_length_is_refused_unread(
        self, shared: Service
    ) -> None:
        headers = JSON | {"Content-Length": str(64 * 2**20)}

        async def body() -> AsyncIterator[bytes]:
            pytest.fail("it was read")
            yield b""

        response = await shared.client.post("/classify", content=body(), headers=headers)
        error_of(response, 413, "body_too_large")

    async def test_a_streamed_body_is_refused_as_soon_as_it_is_too_large(
        self, shared: Service
    ) -> None:
        sent = 0

        async def body() -> AsyncIterator[bytes]:
            nonlocal sent
            for _ in range(64):
                sent += 2**20
                yield b" " * 2**20

        response = await shared.client.post("/classify", content=body(), headers=JSON)
        error_of(response, 413, "body_too_large")
        assert "content-length" not in response.request.headers
        assert sent == 2**20

    async def test_a_streamed_body_within_the_limit_is_accepted(self, shared: Service) -> None:
        async def body() -> AsyncIterator[bytes]:
            yield b'{"input": '
            yield b'"a text"}'

        response = await shared.client.post("/classify", content=body(), headers=JSON)
        assert response.status_code == 200

    async def test_a_body_of_exactly_the_limit_is_accepted(self, shared: Service) -> None:
        body = b'{"input": "a"}'.ljust(500_000)
        assert (await send(shared, body)).status_code == 200
        error_of(await send(shared, body + b" "), 413)

    @pytest.mark.parametrize("path", ["/classify", "/tokenize"])
    async def test_too_many_items_are_refused(self, shared: Service, path: str) -> None:
        response = await shared.client.post(path, json={"input": ["a"] * 65})
        error = error_of(response, 413, "too_many_items", "input")
        assert "64" in error["message"]

    async def test_exactly_as_many_items_as_allowed_are_accepted(self, shared: Service) -> None:
        assert len((await shared.answer(["a"] * 64))["data"]) == 64

    async def test_a_text_with_too_many_characters_is_refused(self, shared: Service) -> None:
        error = error_of(await shared.ask(["a", "b" * 10_001]), 422, param="input[1]")
        assert "10000" in error["message"]

    async def test_the_characters_of_both_texts_of_a_pair_count(self, shared: Service) -> None:
        given = {"text": "a" * 6000, "text_pair": "b" * 6000}
        error_of(await shared.ask(["a", "a", given]), 422, param="input[2]")

    async def test_without_truncation_a_long_text_is_refused(self, shared: Service) -> None:
        error = error_of(await shared.ask(["a", "b " * 100], truncate=False), 422)
        assert error["param"] == "input[1]"
        assert "input[1]" in error["message"]
        assert str(MAX_TOKENS) in error["message"]


@pytest.mark.parametrize(
    "body",
    [
        {"input": [SECRET, 5]},
        {"input": {"text": SECRET, "txt": SECRET}},
        {"input": SECRET * 1000},
        {"input": f"{SECRET} " * 100, "truncate": False},
        {"input": [SECRET] * 65},
        {"input": SECRET, "top_k": SECRET},
        {"input": SECRET, "threshold": SECRET},
        {"input": SECRET, "quality": SECRET},
        {"input": {"text": [SECRET]}},
        [SECRET],
    ],
    ids=range(10),
)
async def test_errors_never_contain_the_text(shared: Service, body: Any) -> None:
    response = await shared.client.post("/classify", json=body)
    assert response.status_code in (413, 422)
    assert "xyzzy" not in response.text
