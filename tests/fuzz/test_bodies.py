"""Mutated bodies are answered, or refused in the error shape of their route, but never with 5xx."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pyarrow as pa
import pytest

from service.http.accept import ARROW
from tests.support.mutation import fuzzed, mutated_bytes, mutated_json
from tests.support.serving import Service, service
from tests.support.stores import PAIRS, TAGS, TOPICS

CORPUS = sorted((Path(__file__).parent / "corpus" / "bodies").iterdir())
TEXT = "The otter slept under the hedge."
PAIR = {"text": TEXT, "text_pair": "A choir"}
SAMPLES: dict[str, dict[str, Any]] = {
    "/classify": {
        "input": [TEXT, PAIR], "model": TOPICS, "top_k": 2, "threshold": 0.1, "quality": "fast",
        "use_activation": False, "truncate": True, "max_heads": 2, "return_heads": True,
        "target_ms": None, "heads": None, "raw_scores": None, "request_id": "a", "priority": 0,
    },
    "/tokenize": {"input": [TEXT, PAIR], "model": PAIRS},
    "/predict": {
        "inputs": [[TEXT], [TEXT, "A choir"]], "truncate": True, "raw_scores": True,
        "truncation_direction": "Right", "quality": 0.5,
    },
    "/": {"inputs": [TEXT], "parameters": {"top_k": 1, "function_to_apply": "sigmoid"}},
    "/invocations": {"inputs": TEXT, "model": TAGS, "options": {"use_cache": False}},
    f"/v2/models/{TOPICS}/infer": {
        "id": "7",
        "inputs": [
            {"name": "text", "shape": [2, 1], "datatype": "BYTES", "data": [TEXT, TEXT]},
            {"name": "text_pair", "shape": [2], "datatype": "BYTES", "data": ["", "b"]},
        ],
        "outputs": [{"name": "probs", "parameters": {"classification": 2, "binary_data": True}}],
        "parameters": {"quality": "best", "timeout": 10**9, "binary_data_output": False},
    },
    "/v2/repository/index": {"ready": True},
    "/v2/repository/models/none/load": {"parameters": {}},
    "/models/none/load": {"version": 1},
}  # fmt: skip
ADMIN = {"X-API-Key": "open-sesame"}


class SyncService:
    """A service in this process with a synchronous client."""

    def __init__(self, runner: asyncio.Runner, running: Service) -> None:
        self._runner = runner
        self._running = running

    def post(self, path: str, body: bytes, headers: dict[str, str] | None = None) -> httpx.Response:
        response = self._running.client.post(path, content=body, headers=ADMIN | (headers or {}))
        return self._runner.run(response)


@pytest.fixture(scope="module")
def service_client(model_store: Path) -> Iterator[SyncService]:
    with asyncio.Runner() as runner:
        opened = service(model_store, max_batch_items=16, timeout_ms=100_000)
        running = runner.run(opened.__aenter__())
        yield SyncService(runner, running)
        runner.run(opened.__aexit__(None, None, None))


def check(response: httpx.Response) -> None:
    """Check that an answer is not a server error and has the right shape."""
    assert response.status_code < 500 or response.status_code == 504, response.text
    assert "Traceback" not in response.text
    if response.status_code != 200:
        error = response.json()["error"]
        assert error["message"] if isinstance(error, dict) else error
    elif response.headers["content-type"] == "application/json":
        json.loads(response.content, parse_constant=_no_constant)


def _no_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


@pytest.mark.parametrize("path", SAMPLES)
@fuzzed(0.15)
def test_mutated_fields(service_client: SyncService, path: str, random: Random) -> None:
    body = json.dumps(mutated_json(random, SAMPLES[path])).encode()
    check(service_client.post(path, body))


@pytest.mark.parametrize("path", SAMPLES)
@fuzzed(0.075)
def test_mutated_bytes_of_json(service_client: SyncService, path: str, random: Random) -> None:
    check(service_client.post(path, mutated_bytes(random, json.dumps(SAMPLES[path]).encode())))


@fuzzed(0.1)
def test_mutated_binary_tensors(service_client: SyncService, random: Random) -> None:
    texts = [TEXT.encode(), b""]
    blob = b"".join(len(text).to_bytes(4, "little") + text for text in texts)
    tensor = {"name": "text", "shape": [2, 1], "datatype": "BYTES"}
    tensor["parameters"] = {"binary_data_size": len(blob)}
    head = json.dumps(mutated_json(random, {"inputs": [tensor]})).encode()
    if random.randrange(2):
        head, blob = json.dumps({"inputs": [tensor]}).encode(), mutated_bytes(random, blob)
    length = random.choice([len(head)] * 4 + [0, len(head) - 1, 10**9])
    headers = {"Inference-Header-Content-Length": str(length)}
    check(service_client.post(f"/v2/models/{TOPICS}/infer", head + blob, headers))


@fuzzed(0.1)
def test_mutated_token_tensors(service_client: SyncService, random: Random) -> None:
    kind = random.choice(["INT32", "INT64"])
    rows = {"input_ids": [2, 7, 3, 2, 3, 0], "attention_mask": [1, 1, 1, 1, 1, 0]}
    rows["token_type_ids"] = [0, 0, 1, 0, 1, 0]
    tensors: list[dict[str, Any]] = []
    blob = b""
    for name, values in rows.items():
        tensor: dict[str, Any] = {"name": name, "shape": [2, 3], "datatype": kind}
        if random.randrange(2):
            tensor["data"] = random.choice([values, [values[:3], values[3:]]])
        else:
            data = b"".join(v.to_bytes(4 if kind == "INT32" else 8, "little") for v in values)
            tensor["parameters"] = {"binary_data_size": len(data)}
            blob += data
        tensors.append(tensor)
    if random.randrange(2):
        blob = mutated_bytes(random, blob)
    else:
        tensors = mutated_json(random, tensors)
    head = json.dumps({"inputs": tensors}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    check(service_client.post(f"/v2/models/{PAIRS}/infer", head + blob, headers))


@fuzzed(0.1)
def test_mutated_fields_with_arrow_answers(service_client: SyncService, random: Random) -> None:
    body = json.dumps(mutated_json(random, SAMPLES["/classify"] | {"return_heads": False})).encode()
    accept = random.choice([ARROW, f"{ARROW};q=0.5", f"{ARROW}, */*;q=0.1"])
    response = service_client.post("/classify", body, {"Accept": accept})
    check(response)
    if response.status_code == 200:
        assert pa.ipc.open_stream(response.content).read_all().num_rows > 0


@fuzzed(0.1)
def test_random_bytes_with_content_encodings(service_client: SyncService, random: Random) -> None:
    body = random.randbytes(random.randint(0, 40))
    encoding = random.choice(["gzip", "deflate", "br", "", "x"])
    check(service_client.post("/classify", body, {"Content-Encoding": encoding}))


@pytest.mark.parametrize("route", SAMPLES)
@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name)
def test_inputs_that_once_failed(service_client: SyncService, path: Path, route: str) -> None:
    check(service_client.post(route, path.read_bytes()))
