"""Routes with the formats of other servers: shapes, malformed bodies, errors.

tests/e2e/test_foreign_clients.py tests them with the clients of those servers.
"""

from __future__ import annotations

import gzip
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.serving import Service, held, poison, service
from tests.support.stores import HEADS, LABELS, PAIRS, TAGS, TOPICS, labelled_sentences, sentences

TEXTS = [sentences(label)[7] for label in LABELS]
TEXT = TEXTS[0]
INFER = "/v2/models/topics/infer"

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def predict(shared: Service, inputs: Any, path: str = "/predict", **fields: Any) -> Any:
    response = await shared.client.post(path, json={"inputs": inputs, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def text_tensor(texts: list[Any], **changed: Any) -> dict[str, Any]:
    shape = [len(texts), 1]
    return {"name": "text", "shape": shape, "datatype": "BYTES", "data": texts} | changed


async def infer(
    shared: Service, *inputs: dict[str, Any], path: str = INFER, **fields: Any
) -> httpx.Response:
    return await shared.client.post(path, json={"inputs": list(inputs), **fields})


def predict_error(response: httpx.Response, status: int, kind: str) -> str:
    """Check that an answer is an error in the format of TEI, and return its message."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error", "error_type"}
    assert body["error_type"] == kind
    assert response.headers["x-request-id"]
    return str(body["error"])


def infer_error(response: httpx.Response, status: int) -> str:
    """Check that an answer is an error of the Open Inference Protocol, and return its message."""
    assert response.status_code == status, response.text
    (message,) = response.json().values()
    assert set(response.json()) == {"error"}
    assert isinstance(message, str)
    return message


class TestPredict:
    @pytest.mark.parametrize("path", ["/predict", "/"])
    async def test_one_text_gets_one_list_of_labels(self, shared: Service, path: str) -> None:
        expected = (await shared.item(TEXT))["labels"]
        for inputs in (TEXT, [TEXT]):
            answer = await predict(shared, inputs, path)
            assert [one["label"] for one in answer] == [one["label"] for one in expected]
            assert [one["score"] for one in answer] == pytest.approx(
                [one["score"] for one in expected]
            )

    async def test_a_batch_gets_a_list_of_lists(self, shared: Service) -> None:
        answer = await predict(shared, [[text] for text in TEXTS])
        assert [row[0]["label"] for row in answer] == list(LABELS)

    async def test_two_strings_are_a_pair(self, shared: Service) -> None:
        item = await shared.item({"text": TEXT, "text_pair": TEXTS[1]}, model=PAIRS)
        for inputs in ([TEXT, TEXTS[1]], {"text": TEXT, "text_pair": TEXTS[1]}):
            answer = await predict(shared, inputs, model=PAIRS)
            assert answer[0]["score"] == pytest.approx(item["score"])
        (row, _) = await predict(shared, [[TEXT, TEXTS[1]], [TEXT]], model=PAIRS)
        assert row[0]["score"] == pytest.approx(item["score"], rel=1e-4)

    async def test_with_parameters_several_strings_are_a_batch(self, shared: Service) -> None:
        answer = await predict(shared, TEXTS, parameters={})
        assert [row[0]["label"] for row in answer] == list(LABELS)
        ((best,),) = await predict(shared, TEXT, parameters={"top_k": 1})
        assert best["label"] == LABELS[0]

    async def test_raw_scores_are_logits(self, shared: Service) -> None:
        logits = (await shared.item(TEXT, use_activation=False))["probs"]
        answer = await predict(shared, TEXT, raw_scores=True)
        assert [one["score"] for one in answer] == pytest.approx(sorted(logits, reverse=True))

    async def test_multi_label_models_answer_independent_scores(self, shared: Service) -> None:
        item = await shared.item(TEXT, model=TAGS)
        answer = await predict(shared, TEXT, model=TAGS)
        assert {one["label"]: one["score"] for one in answer} == pytest.approx(
            dict(zip(LABELS, item["probs"], strict=True))
        )

    async def test_truncation_can_be_disabled(self, shared: Service) -> None:
        long = "the otter slept " * 30
        assert await predict(shared, long, truncate=True, truncation_direction="Right")
        for refusal in ({"truncate": False}, {"parameters": {"truncation": False}}):
            body = {"inputs": long, **refusal}
            message = predict_error(
                await shared.client.post("/predict", json=body), 422, "validation"
            )
            assert "tokens" in message

    async def test_server_timing_is_sent_as_by_classify(self, shared: Service) -> None:
        response = await shared.client.post("/predict", json={"inputs": TEXT})
        assert response.headers["server-timing"].startswith("tokenize;dur=")

    @pytest.mark.parametrize(
        ("body", "message"),
        [
            ({}, "field 'inputs' is required"),
            ({"inputs": []}, "at least 1 item"),
            ({"inputs": 5}, "field 'inputs' must be a string"),
            ({"inputs": ["a", "b", "c"]}, "field 'inputs' must be a string"),
            ({"inputs": ["a", ["b"]]}, "field 'inputs' must be a string"),
            ({"inputs": [["a"], "b"]}, "field 'inputs' must be a string"),
            ({"inputs": [["a"], []]}, "field 'inputs[1]'"),
            ({"inputs": [["a"], ["a", "b", "c"]]}, "field 'inputs[1]'"),
            ({"inputs": "a", "truncation_direction": "Left"}, "cuts texts on the right"),
            ({"inputs": "a", "truncation_direction": "up"}, "truncation_direction"),
            ({"inputs": "a", "raw_score": True}, "did you mean 'raw_scores'?"),
            ({"inputs": "a", "parameters": {"topk": 1}}, "did you mean 'top_k'?"),
            ({"inputs": "a", "quality": "superb"}, "'balanced'"),
        ],
        ids=lambda value: json.dumps(value)[:60],
    )
    async def test_invalid_fields_are_refused(
        self, shared: Service, body: Any, message: str
    ) -> None:
        response = await shared.client.post("/predict", json=body)
        assert message in predict_error(response, 422, "validation")

    async def test_errors_have_the_same_status_as_in_classify(self, shared: Service) -> None:
        post = shared.client.post
        predict_error(await post("/predict", content=b"{"), 400, "validation")
        body: dict[str, Any] = {"inputs": "a", "model": "nothing"}
        predict_error(await post("/predict", json=body), 404, "validation")
        body = {"inputs": [["a"]] * 65}
        predict_error(await post("/", json=body), 413, "validation")


class TestInfer:
    async def test_tensors_in_json(self, shared: Service) -> None:
        item = await shared.item(TEXT)
        answer = (await infer(shared, text_tensor([TEXT]), id="seven")).json()
        assert (answer["id"], answer["model_name"], answer["model_version"]) == (
            "seven", TOPICS, "2",
        )  # fmt: skip
        outputs = {output["name"]: output for output in answer["outputs"]}
        assert outputs["label"]["data"] == [item["label"]]
        assert outputs["label"]["shape"] == [1, 1]
        assert outputs["probs"]["data"] == pytest.approx(item["probs"])
        assert outputs["macs"]["data"] == [item["macs"]]

    async def test_only_requested_outputs_are_returned(self, shared: Service) -> None:
        answer = (await infer(shared, text_tensor(TEXTS), outputs=[{"name": "score"}])).json()
        (output,) = answer["outputs"]
        assert (output["name"], output["shape"]) == ("score", [len(TEXTS), 1])

    async def test_data_may_be_nested(self, shared: Service) -> None:
        nested = text_tensor([[text] for text in TEXTS])
        answer = (await infer(shared, nested, outputs=[{"name": "label"}])).json()
        assert answer["outputs"][0]["data"] == list(LABELS)

    async def test_an_empty_second_text_means_none(self, shared: Service) -> None:
        path = "/v2/models/pairs/infer"
        pair = text_tensor(["", TEXTS[1]]) | {"name": "text_pair"}
        answer = (await infer(shared, text_tensor([TEXT, TEXT]), pair, path=path)).json()
        probs = next(o["data"] for o in answer["outputs"] if o["name"] == "probs")
        alone = await shared.item(TEXT, model=PAIRS)
        paired = await shared.item({"text": TEXT, "text_pair": TEXTS[1]}, model=PAIRS)
        assert probs == pytest.approx(alone["probs"] + paired["probs"], rel=1e-4)

    @pytest.mark.parametrize(
        ("tensor", "message"),
        [
            (text_tensor([TEXT], shape=[2, 1]), "has 1 elements, but its shape requires 2"),
            (text_tensor([TEXT], shape=[1, 2]), "it must be [items] or [items, 1]"),
            (text_tensor([TEXT], shape=[]), "it must be [items] or [items, 1]"),
            (text_tensor([], shape=[0, 1]), "at least one item"),
            (text_tensor([5]), "must contain only strings"),
            (text_tensor([TEXT], datatype="FP32"), "datatype"),
            (text_tensor([TEXT], data=None), "either `data` or the parameter `binary_data_size`"),
            (text_tensor([TEXT], parameters={"binary_data_size": 4}), "either"),
            (
                text_tensor([TEXT], data=None, parameters={"binary_data_size": 9}),
                "shape requires 1",
            ),
            (text_tensor([TEXT], name="words"), "unknown input 'words'"),
            (text_tensor([TEXT], name="text_pair"), "input 'text' is missing"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    async def test_invalid_tensors_are_refused(
        self, shared: Service, tensor: dict[str, Any], message: str
    ) -> None:
        assert message in infer_error(await infer(shared, tensor), 422)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"outputs": [{"name": "labels"}]}, "unknown output 'labels'"),
            (
                {"outputs": [{"name": "label", "parameters": {"classification": 1}}]},
                "is for output 'probs'",
            ),
            ({"parameters": {"priority": 3}}, "priority"),
            ({"parameters": {"heads": HEADS + 1}}, str(HEADS)),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    async def test_invalid_outputs_and_parameters_are_refused(
        self, shared: Service, fields: dict[str, Any], message: str
    ) -> None:
        assert message in infer_error(await infer(shared, text_tensor([TEXT]), **fields), 422)

    @pytest.mark.parametrize(
        ("blob", "message"),
        [
            (b"", "bytes follow the JSON"),
            (b"\x05\x00\x00\x00abc", "end within an element"),
            (b"\x05\x00", "end within an element"),
            (b"\xff\xff\xff\xffabc", "end within an element"),
            (b"\x02\x00\x00\x00\xff\xfe", "is not UTF-8"),
            (struct.pack("<I", 1) + b"a" + struct.pack("<I", 1) + b"b", "has 2 elements"),
        ],
        ids=range(6),
    )
    async def test_damaged_binary_data_is_refused(
        self, shared: Service, blob: bytes, message: str
    ) -> None:
        size = {"binary_data_size": max(len(blob), 3)}
        head = json.dumps({"inputs": [text_tensor([TEXT], data=None, parameters=size)]}).encode()
        headers = {"Inference-Header-Content-Length": str(len(head))}
        response = await shared.client.post(INFER, content=head + blob, headers=headers)
        status = 400 if "UTF-8" in message else 422
        assert message in infer_error(response, status) or not blob

    @pytest.mark.parametrize("length", ["", "x", "-1", "1000000", "1.5"])
    async def test_invalid_lengths_of_the_json_part_are_refused(
        self, shared: Service, length: str
    ) -> None:
        headers = {"Inference-Header-Content-Length": length}
        response = await shared.client.post(INFER, content=b"{}", headers=headers)
        assert "length of the body's JSON" in infer_error(response, 400)

    async def test_errors_have_the_same_status_as_in_classify(self, shared: Service) -> None:
        infer_error(await shared.client.post(INFER, content=b"{"), 400)
        path = "/v2/models/nothing/infer"
        infer_error(await infer(shared, text_tensor([TEXT]), path=path), 404)
        infer_error(await infer(shared, text_tensor(["a"] * 65)), 413)
        infer_error(await shared.client.get("/v2/models/nothing/ready"), 404)

    async def test_the_index_can_be_limited_to_ready_models(self, shared: Service) -> None:
        rows = (await shared.client.post("/v2/repository/index", json={"ready": True})).json()
        assert {row["state"] for row in rows} == {"READY"}
        assert (TOPICS, "2") in {(row["name"], row["version"]) for row in rows}


class TestInvocations:
    async def test_the_format_follows_the_name_of_the_input_field(self, shared: Service) -> None:
        post = shared.client.post
        answer = (await post("/invocations", json={"input": TEXT})).json()
        assert answer["data"][0]["label"] == LABELS[0]
        answer = (await post("/invocations", json={"inputs": TEXT})).json()
        assert answer == await predict(shared, TEXT)
        answer = (await post("/invocations", json={"input": [TEXT], "raw_scores": False})).json()
        assert answer["object"] == "classify"

    async def test_errors_have_the_format_of_classify(self, shared: Service) -> None:
        for body, param in (({}, "input"), ({"inputs": 5}, "inputs"), ({"input": []}, "input")):
            response = await shared.client.post("/invocations", json=body)
            assert response.status_code == 422
            assert response.json()["error"]["param"] == param


@pytest.mark.parametrize(
    "field",
    [
        {"priority": 1}, {"add_special_tokens": False}, {"truncate_prompt_tokens": 5},
        {"request_id": "a b"}, {"user": 5}, {"raw_scores": 1},
    ],
    ids=str,
)  # fmt: skip
async def test_unsupported_vllm_options_are_refused(shared: Service, field: dict[str, Any]) -> None:
    response = await shared.ask(TEXT, **field)
    assert response.status_code == 422
    assert response.json()["error"]["param"] == next(iter(field))


_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, -1, 2, 2**31, 10**25, 10**400, 0.5, "", "text", "BYTES", "a", "fast"]),
)
_KEYS = st.sampled_from([
    "input", "inputs", "text", "text_pair", "parameters", "outputs", "name", "shape", "datatype",
    "data", "binary_data_size", "classification", "top_k", "truncate", "raw_scores", "timeout",
    "timeout_ms", "quality", "heads", "options", "id", "ready", "str", "TextPair", "zzz",
])  # fmt: skip
_ANYTHING = st.recursive(
    _SCALARS,
    lambda part: st.lists(part, max_size=4) | st.dictionaries(_KEYS, part, max_size=5),
    max_leaves=12,
)
_BODIES = st.dictionaries(_KEYS, _ANYTHING, max_size=6) | st.builds(
    lambda tensor, rest: {"inputs": [text_tensor([TEXT]) | tensor], **rest},
    st.dictionaries(_KEYS, _ANYTHING, max_size=2),
    st.dictionaries(st.sampled_from(["parameters", "outputs", "id"]), _ANYTHING),
)


@pytest.mark.parametrize("path", ["/predict", "/", "/invocations", INFER, "/classify"])
@given(body=_BODIES)
@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
async def test_no_body_causes_a_server_error(shared: Service, path: str, body: Any) -> None:
    response = await shared.client.post(path, json=body)
    # A deadline of a millisecond, which some bodies ask for, may pass or be refused.
    assert response.status_code < 500 or response.status_code == 504, response.text


class TestCompressedBodies:
    @pytest.mark.parametrize(
        ("encoding", "pack"),
        [("gzip", gzip.compress), ("deflate", zlib.compress), ("GZIP", gzip.compress)],
    )
    async def test_compressed_bodies_are_decompressed(
        self, shared: Service, encoding: str, pack: Callable[[bytes], bytes]
    ) -> None:
        body = pack(json.dumps({"input": TEXT}).encode())
        response = await self.send(shared, body, encoding)
        assert response.json()["data"][0]["label"] == LABELS[0]

    async def send(self, shared: Service, body: bytes, encoding: str) -> httpx.Response:
        headers = {"Content-Encoding": encoding, "Content-Type": "application/json"}
        return await shared.client.post("/classify", content=body, headers=headers)

    async def test_the_limit_applies_to_the_decompressed_size(self, shared: Service) -> None:
        bomb = gzip.compress(b'{"input": "a"}' + b" " * 50_000_000)
        assert len(bomb) < 100_000
        response = await self.send(shared, bomb, "gzip")
        assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")

    async def test_damaged_compressed_bodies_are_refused(self, shared: Service) -> None:
        whole = gzip.compress(b'{"input": "a"}')
        for body in (whole[:-3], whole + b"x", b'{"input": "a"}', b""):
            response = await self.send(shared, body, "gzip")
            assert (response.status_code, response.json()["error"]["code"]) == (
                400, "invalid_encoding",
            )  # fmt: skip

    async def test_other_encodings_are_refused(self, shared: Service) -> None:
        assert (await self.send(shared, b"{}", "br")).status_code == 415


class TestServerErrors:
    pytestmark = pytest.mark.asyncio(loop_scope="function")

    async def test_passed_deadlines_have_the_error_format_of_the_route(
        self, fresh: Service
    ) -> None:
        texts = [text for text, _ in labelled_sentences()]
        answers = (await fresh.answer(texts))["data"]
        computed = next(t for t, a in zip(texts, answers, strict=True) if a["heads"]["budget"])
        with held(fresh.core):
            late = await infer(
                fresh, text_tensor([TEXT]), parameters={"timeout": 50_000, "heads": 1}
            )
            assert "deadline" in infer_error(late, 504)
            body = {"inputs": computed, "timeout_ms": 50}
            predict_error(await fresh.client.post("/predict", json=body), 504, "backend")

    async def test_one_failed_item_fails_a_kserve_request(self, fresh: Service) -> None:
        lengths = {(await fresh.item(text))["tokens"]: text for text, _ in labelled_sentences()}
        (one, bad), (_, good) = list(lengths.items())[:2]
        (model,) = fresh.core.models.values()
        with poison(model.network, one, "raise"):
            response = await infer(fresh, text_tensor([good, bad]), parameters={"heads": 2})
            assert "input[1]" in infer_error(response, 500)

    async def test_a_draining_server_refuses_in_every_format(self, fresh: Service) -> None:
        fresh.app.state.shared.admission.draining = True
        response = await fresh.client.post("/predict", json={"inputs": TEXT})
        predict_error(response, 503, "unhealthy")
        assert int(response.headers["retry-after"]) >= 1
        infer_error(await infer(fresh, text_tensor([TEXT])), 503)
        infer_error(await fresh.client.get("/v2/health/ready"), 503)
        assert (await fresh.client.get("/ping")).status_code == 503

    async def test_without_engines_models_are_loading(self, model_store: Path) -> None:
        async with service(model_store, engines=0) as closed:
            response = await closed.client.get("/v2/models/topics/ready")
            assert "loading" in infer_error(response, 503)
            rows = (await closed.client.post("/v2/repository/index")).json()
            assert {row["state"] for row in rows} == {"LOADING", "UNAVAILABLE"}
