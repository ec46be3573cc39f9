"""Clients of other servers work with this one: Hugging Face, Infinity, vLLM, SageMaker, Triton."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from infinity_client import Client as InfinityClient
from infinity_client.api.default import classify as infinity_classify
from infinity_client.models import ClassifyInput, ClassifyResult
from tritonclient import http as triton
from tritonclient.utils import InferenceServerException

from tests.support.processes import Server
from tests.support.serving import ADMIN
from tests.support.stores import LABELS, LAYERS, MAX_TOKENS, PAIRS, TOPICS, sentences

pytestmark = pytest.mark.timeout(300)

TEXTS = [sentences(label)[7] for label in LABELS]
LONG = "the otter slept " * 30


def classify(running: Server, texts: Any, **fields: Any) -> list[dict[str, Any]]:
    """Return the answer of POST /classify, which other routes must agree with."""
    response = httpx.post(f"{running.url}/classify", json={"input": texts, **fields})
    assert response.status_code == 200, response.text
    return list(response.json()["data"])


class TestHuggingFaceHub:
    @pytest.mark.parametrize("path", ["", "/", "/predict"])
    def test_a_text_gets_all_labels_best_first(self, running: Server, path: str) -> None:
        (expected,) = classify(running, TEXTS[0])
        answer = InferenceClient(f"{running.url}{path}").text_classification(TEXTS[0])
        assert [(one.label, one.score) for one in answer] == [
            (one["label"], pytest.approx(one["score"])) for one in expected["labels"]
        ]

    @pytest.mark.parametrize("path", ["", "/predict"])
    async def test_the_asynchronous_client_gets_answers(self, running: Server, path: str) -> None:
        async with AsyncInferenceClient(f"{running.url}{path}") as client:
            answers = [await client.text_classification(text) for text in TEXTS]
        assert [answer[0].label for answer in answers] == list(LABELS)

    def test_the_model_may_be_a_url_at_each_call(self, running: Server) -> None:
        answer = InferenceClient().text_classification(TEXTS[1], model=f"{running.url}/predict")
        assert answer[0].label == LABELS[1]

    def test_top_k_limits_the_labels(self, running: Server) -> None:
        answer = InferenceClient(running.url).text_classification(TEXTS[0], top_k=2)
        assert len(answer) == 2
        assert answer[0].label == LABELS[0]

    def test_function_to_apply_selects_the_scores(self, running: Server) -> None:
        (expected,) = classify(running, TEXTS[0], use_activation=False)
        client = InferenceClient(running.url)
        raw = client.text_classification(TEXTS[0], function_to_apply="none")
        assert [one.score for one in raw] == pytest.approx(sorted(expected["probs"], reverse=True))
        independent = client.text_classification(TEXTS[0], function_to_apply="sigmoid")
        assert [one.score for one in independent] == pytest.approx(
            [1 / (1 + np.exp(-one.score)) for one in raw]
        )

    def test_errors_have_the_clients_shape(self, running: Server) -> None:
        client = InferenceClient(running.url)
        with pytest.raises(HfHubHTTPError, match="greater than or equal to 1") as caught:
            client.text_classification(TEXTS[0], top_k=0)
        assert caught.value.response.status_code == 422
        assert caught.value.response.json()["error_type"] == "validation"


class TestInfinity:
    def ask(self, running: Server, body: ClassifyInput) -> ClassifyResult:
        with InfinityClient(running.url, raise_on_unexpected_status=True) as client:
            answer = infinity_classify.sync(client=client, body=body)
        assert isinstance(answer, ClassifyResult)
        return answer

    def test_every_text_gets_its_labels(self, running: Server) -> None:
        expected = classify(running, TEXTS)
        answer = self.ask(running, ClassifyInput(input_=TEXTS))
        assert answer.object_ == "classify"
        assert answer.model == "topics:2"
        assert answer.usage.prompt_tokens == sum(item["tokens"] for item in expected)
        for row, item in zip(answer.data, expected, strict=True):
            assert [one.label for one in row] == [one["label"] for one in item["labels"]]
            assert row[0].score == pytest.approx(item["score"])

    def test_raw_scores_are_logits(self, running: Server) -> None:
        (expected,) = classify(running, TEXTS[0], use_activation=False)
        (row,) = self.ask(
            running, ClassifyInput(input_=[TEXTS[0]], model=TOPICS, raw_scores=True)
        ).data
        assert [one.score for one in row] == pytest.approx(sorted(expected["probs"], reverse=True))


class TestVllm:
    def test_the_fields_of_its_client_are_accepted(self, running: Server) -> None:
        body = {
            "model": TOPICS, "input": TEXTS, "user": "someone", "request_id": "mine-1",
            "priority": 0, "truncate_prompt_tokens": -1, "add_special_tokens": True,
            "use_activation": None,
        }  # fmt: skip
        answer = httpx.post(f"{running.url}/classify", json=body).json()
        assert answer["id"] == "classify-mine-1"
        assert answer["object"] == "list"
        for index, (item, label) in enumerate(zip(answer["data"], LABELS, strict=True)):
            assert (item["index"], item["label"]) == (index, label)
            assert item["num_classes"] == len(item["probs"]) == len(LABELS)
        assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] > 0


class TestSageMaker:
    def test_ping_answers(self, running: Server) -> None:
        assert httpx.get(f"{running.url}/ping").status_code == 200

    def test_invocations_with_input_answer_like_classify(self, running: Server) -> None:
        answer = httpx.post(f"{running.url}/invocations", json={"input": TEXTS}).json()
        assert [item["label"] for item in answer["data"]] == list(LABELS)

    def test_invocations_with_inputs_answer_like_predict(self, running: Server) -> None:
        body = {"inputs": [[text] for text in TEXTS]}
        answer = httpx.post(f"{running.url}/invocations", json=body).json()
        assert answer == httpx.post(f"{running.url}/predict", json=body).json()
        assert [row[0]["label"] for row in answer] == list(LABELS)


@pytest.fixture(scope="module")
def client(running: Server) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(running.url.removeprefix("http://")) as connected:
        yield connected


def texts_input(
    texts: list[str], name: str = "text", binary: bool = True, flat: bool = False
) -> triton.InferInput:
    values = np.array([text.encode() for text in texts], dtype=np.object_)
    values = values if flat else values.reshape(-1, 1)
    tensor = triton.InferInput(name, list(values.shape), "BYTES")
    tensor.set_data_from_numpy(values, binary_data=binary)
    return tensor


class TestTriton:
    def test_server_and_models_report_readiness(self, client: triton.InferenceServerClient) -> None:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready(TOPICS)
        assert client.is_model_ready(TOPICS, "2")
        assert not client.is_model_ready(TOPICS, "1")
        assert not client.is_model_ready("nothing")

    def test_the_server_names_its_extensions(self, client: triton.InferenceServerClient) -> None:
        described = client.get_server_metadata()
        assert described["name"]
        assert described["version"]
        assert {"binary_tensor_data", "classification"} <= set(described["extensions"])

    def test_metadata_describes_every_tensor(self, client: triton.InferenceServerClient) -> None:
        described = client.get_model_metadata(TOPICS)
        assert (described["name"], described["versions"]) == (TOPICS, ["2"])
        assert described["inputs"][0] == {"name": "text", "datatype": "BYTES", "shape": [-1, 1]}
        result = client.infer(TOPICS, [texts_input(TEXTS)])
        for output in described["outputs"]:
            values = result.as_numpy(output["name"])
            assert list(values.shape) == [len(TEXTS), output["shape"][1]]
            assert result.get_output(output["name"])["datatype"] == output["datatype"]

    def test_the_configuration_agrees_with_the_metadata(
        self, client: triton.InferenceServerClient
    ) -> None:
        described = client.get_model_metadata(TOPICS, "2")
        config = client.get_model_config(TOPICS, "2")
        assert config["max_batch_size"] >= 1
        assert [one["name"] for one in config["output"]] == [
            one["name"] for one in described["outputs"]
        ]
        assert config["input"][0]["data_type"] == "TYPE_STRING"
        assert [one["name"] for one in config["input"]] == [
            one["name"] for one in described["inputs"]
        ]

    @pytest.mark.parametrize("sent_binary", [True, False])
    @pytest.mark.parametrize("answered_binary", [True, False])
    @pytest.mark.parametrize("flat", [True, False])
    def test_infer_answers_like_classify(
        self,
        running: Server,
        client: triton.InferenceServerClient,
        sent_binary: bool,
        answered_binary: bool,
        flat: bool,
    ) -> None:
        expected = classify(running, TEXTS)
        names = ("label", "score", "probs", "heads", "budget", "macs")
        outputs = [triton.InferRequestedOutput(n, binary_data=answered_binary) for n in names]
        tensor = texts_input(TEXTS, binary=sent_binary, flat=flat)
        result = client.infer(TOPICS, [tensor], outputs=outputs, request_id="mine-7")
        answer = result.get_response()
        assert (answer["id"], answer["model_name"], answer["model_version"]) == (
            "mine-7", TOPICS, "2",
        )  # fmt: skip
        labels = result.as_numpy("label")
        assert labels.shape == ((len(TEXTS),) if flat else (len(TEXTS), 1))
        decoded = [v.decode() if isinstance(v, bytes) else v for v in labels.ravel()]
        assert decoded == [item["label"] for item in expected]
        np.testing.assert_allclose(
            result.as_numpy("probs"), [item["probs"] for item in expected], rtol=1e-5
        )
        for name, values in (
            ("score", [item["score"] for item in expected]),
            ("heads", [item["heads"]["used"] for item in expected]),
            ("budget", [item["heads"]["budget"] for item in expected]),
            ("macs", [item["macs"] for item in expected]),
        ):
            np.testing.assert_allclose(result.as_numpy(name).ravel(), values, rtol=1e-5)

    def test_unicode_and_empty_texts_are_classified(
        self, running: Server, client: triton.InferenceServerClient
    ) -> None:
        odd = ["", "Füchse 🦊 liefen", "漢字", "a\x00b"]
        expected = [item["probs"] for item in classify(running, odd)]
        for binary in (True, False):
            result = client.infer(TOPICS, [texts_input(odd, binary=binary)])
            np.testing.assert_allclose(result.as_numpy("probs"), expected, rtol=1e-4)

    def test_compressed_answers_are_read(
        self, running: Server, client: triton.InferenceServerClient
    ) -> None:
        expected = [item["probs"] for item in classify(running, TEXTS * 60)]
        outputs = [triton.InferRequestedOutput(n, binary_data=True) for n in ("label", "probs")]
        result = client.infer(
            TOPICS,
            [texts_input(TEXTS * 60)],
            outputs=outputs,
            response_compression_algorithm="gzip",
        )
        np.testing.assert_allclose(result.as_numpy("probs"), expected, rtol=1e-5)

    def test_pairs_are_classified(
        self, running: Server, client: triton.InferenceServerClient
    ) -> None:
        seconds = TEXTS[::-1]
        given = [{"text": a, "text_pair": b} for a, b in zip(TEXTS, seconds, strict=True)]
        expected = [item["probs"] for item in classify(running, given, model=PAIRS)]
        inputs = [texts_input(TEXTS), texts_input(seconds, name="text_pair")]
        result = client.infer(PAIRS, inputs, model_version="1")
        np.testing.assert_allclose(result.as_numpy("probs"), expected, rtol=1e-5)

    @pytest.mark.parametrize("kind", ["INT32", "INT64"])
    @pytest.mark.parametrize("binary", [True, False])
    def test_token_ids_are_classified(
        self, running: Server, client: triton.InferenceServerClient, kind: str, binary: bool
    ) -> None:
        expected = [item["probs"] for item in classify(running, TEXTS)]
        tokenized = httpx.post(f"{running.url}/tokenize", json={"input": TEXTS}).json()["data"]
        width = max(text["count"] for text in tokenized)
        ids = [text["ids"] + [0] * (width - text["count"]) for text in tokenized]
        mask = [[1] * text["count"] + [0] * (width - text["count"]) for text in tokenized]
        tensors = []
        for name, rows in (("input_ids", ids), ("attention_mask", mask)):
            values = np.array(rows, {"INT32": np.int32, "INT64": np.int64}[kind])
            tensors.append(triton.InferInput(name, list(values.shape), kind))
            tensors[-1].set_data_from_numpy(values, binary_data=binary)
        result = client.infer(TOPICS, tensors)
        np.testing.assert_allclose(result.as_numpy("probs"), expected, rtol=1e-4)
        assert result.as_numpy("label").shape == (len(TEXTS), 1)

    def test_the_classification_extension_returns_top_labels(
        self, client: triton.InferenceServerClient
    ) -> None:
        outputs = [triton.InferRequestedOutput("probs", class_count=2)]
        rows = client.infer(TOPICS, [texts_input(TEXTS)], outputs=outputs).as_numpy("probs")
        assert rows.shape == (len(TEXTS), 2)
        for row, label in zip(rows, LABELS, strict=True):
            score, index, name = row[0].decode().split(":")
            assert (name, LABELS[int(index)]) == (label, label)
            assert 0 < float(score) <= 1

    def test_parameters_set_the_budget(self, client: triton.InferenceServerClient) -> None:
        result = client.infer(TOPICS, [texts_input(TEXTS)], parameters={"heads": 3})
        assert result.as_numpy("heads").ravel().tolist() == [3 * LAYERS] * len(TEXTS)
        fast = client.infer(TOPICS, [texts_input(TEXTS)], parameters={"quality": "fast"})
        assert fast.as_numpy("budget").ravel().tolist() == [0] * len(TEXTS)

    @pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
    def test_compressed_requests_are_read(
        self, client: triton.InferenceServerClient, algorithm: str
    ) -> None:
        result = client.infer(
            TOPICS, [texts_input(TEXTS)],
            request_compression_algorithm=algorithm, response_compression_algorithm=algorithm,
        )  # fmt: skip
        assert [label.decode() for label in result.as_numpy("label").ravel()] == list(LABELS)

    def test_concurrent_requests_are_answered(self, client: triton.InferenceServerClient) -> None:
        waiting = [client.async_infer(TOPICS, [texts_input([text])]) for text in TEXTS * 3]
        labels = [one.get_result().as_numpy("label")[0, 0].decode() for one in waiting]
        assert labels == list(LABELS) * 3

    @pytest.mark.parametrize(
        ("change", "status", "message"),
        [
            ({"model_name": "nothing"}, "404", "no model 'nothing'"),
            ({"model_version": "7"}, "404", "not 7"),
            ({"inputs": [texts_input(TEXTS, name="words")]}, "422", "unknown input 'words'"),
            ({"outputs": [triton.InferRequestedOutput("x")]}, "422", "unknown output 'x'"),
            ({"parameters": {"quality": "superb"}}, "422", "quality"),
            ({"parameters": {"truncate": False}, "inputs": [texts_input([LONG])]}, "422",
             f"more than {MAX_TOKENS} tokens"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )  # fmt: skip
    def test_errors_raise_the_clients_exception(
        self,
        client: triton.InferenceServerClient,
        change: dict[str, Any],
        status: str,
        message: str,
    ) -> None:
        arguments = {"model_name": TOPICS, "inputs": [texts_input(TEXTS)]} | change
        with pytest.raises(InferenceServerException, match=message) as caught:
            client.infer(**arguments)
        assert caught.value.status() == status


class TestTritonRepository:
    def states(self, client: triton.InferenceServerClient) -> dict[tuple[str, str], str]:
        index = client.get_model_repository_index()
        return {(row["name"], row["version"]): row["state"] for row in index}

    def test_the_index_lists_every_version(self, client: triton.InferenceServerClient) -> None:
        states = self.states(client)
        assert states[TOPICS, "2"] == "READY"
        assert states[TOPICS, "1"] == "UNAVAILABLE"
        assert states[PAIRS, "1"] == "READY"

    def test_models_can_be_unloaded_and_loaded(self, client: triton.InferenceServerClient) -> None:
        client.unload_model(PAIRS, headers=dict(ADMIN))
        assert not client.is_model_ready(PAIRS)
        assert self.states(client)[PAIRS, "1"] == "UNAVAILABLE"
        client.load_model(PAIRS, headers=dict(ADMIN))
        assert client.is_model_ready(PAIRS)

    def test_without_the_admin_key_changes_are_refused(
        self, client: triton.InferenceServerClient
    ) -> None:
        for change in (client.load_model, client.unload_model):
            with pytest.raises(InferenceServerException, match="key") as caught:
                change(PAIRS)
            assert caught.value.status() == "401"
        assert client.is_model_ready(PAIRS)

    def test_load_with_a_configuration_is_refused(
        self, client: triton.InferenceServerClient
    ) -> None:
        with pytest.raises(InferenceServerException, match="no parameters"):
            client.load_model(PAIRS, headers=dict(ADMIN), config="{}")


def test_texts_of_these_clients_are_not_logged(running: Server) -> None:
    for path, body in (
        ("/predict", {"inputs": "xyzzy"}),
        ("/predict", {"inputs": ["xyzzy", 5]}),
        ("/invocations", {"inputs": ["xyzzy", "a", "b"]}),
        ("/v2/models/topics/infer", {"inputs": [{"name": "xyzzy"}]}),
    ):
        response = httpx.post(f"{running.url}{path}", json=body)
        assert response.status_code == 200 or "xyzzy" not in response.text
    assert "xyzzy" not in running.log.read_text()


def test_requests_are_counted_by_route(running: Server) -> None:
    before = running.scrape()
    httpx.post(f"{running.url}/predict", json={"inputs": TEXTS[0]})
    httpx.post(f"{running.url}/v2/models/topics/infer", json={})
    after = running.scrape()
    assert after.minus(before, "requests_total", route="/predict", outcome="ok") == 1
    infer = "/v2/models/{name}/infer"
    assert after.minus(before, "requests_total", route=infer, outcome="invalid") == 1
    assert after.minus(before, "items_total", model=TOPICS, version=2) == 1
