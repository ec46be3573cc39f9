"""KServe over gRPC gives the same answers as HTTP, with the same limits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from tritonclient.grpc import InferRequestedOutput, model_config_pb2, service_pb2
from tritonclient.utils import InferenceServerException

from budgetformer.tokenization import Text
from service.grpc.calls import CALLS
from service.http.kserve import OUTPUTS
from service.telemetry.counts import OUTCOMES
from tests.support.calling import SERVICE, Calling, calling, refused, tensor, texts_input
from tests.support.serving import ADMIN, Service, held, service
from tests.support.stores import LABELS, PAIRS, TOPICS, sentences
from tests.support.waiting import until
from tests.unit.service.test_keys import key

pytestmark = pytest.mark.asyncio(loop_scope="session")

TEXTS = [sentences(label)[7] for label in LABELS]
BODY_BYTES = 500_000  # of the shared service
HEALTH = "/grpc.health.v1.Health/Check"
TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest_asyncio.fixture(loop_scope="session")
async def caller(shared: Service) -> AsyncIterator[Calling]:
    async with calling(shared) as it:
        yield it


@asynccontextmanager
async def alone(store: Path, **settings: Any) -> AsyncIterator[tuple[Service, Calling]]:
    """Run a service for one test, with its gRPC server."""
    chosen = {"models": [TOPICS], "quality_floor": "balanced"} | settings
    async with service(store, **chosen) as running, calling(running) as caller:
        yield running, caller


async def http_infer(
    running: Service, inputs: list[dict[str, Any]], model: str = TOPICS, **fields: Any
) -> dict[str, dict[str, Any]]:
    """Return the outputs of the HTTP answer, by name."""
    body = {"inputs": inputs, **fields}
    response = await running.client.post(f"/v2/models/{model}/infer", json=body)
    assert response.status_code == 200, response.text
    return {output["name"]: output for output in response.json()["outputs"]}


def http_texts(texts: list[str], name: str = "text") -> dict[str, Any]:
    return {"name": name, "datatype": "BYTES", "shape": [len(texts), 1], "data": texts}


def check_same(result: Any, expected: dict[str, dict[str, Any]]) -> None:
    """Check that an answer has the same outputs as that of HTTP."""
    assert [output.name for output in result.get_response().outputs] == list(expected)
    for name, output in expected.items():
        got = result.as_numpy(name)
        assert result.get_output(name).datatype == output["datatype"]
        assert list(got.shape) == output["shape"]
        values = [v.decode() if isinstance(v, bytes) else v for v in got.ravel().tolist()]
        assert values == near(output["data"]), name


def near(values: list[Any]) -> Any:
    """Return what equals these values up to the rounding of FP32."""
    return values if isinstance(values[0], (str, bytes)) else pytest.approx(values, rel=1e-6)


def request_of(**fields: Any) -> Any:
    return service_pb2.ModelInferRequest(model_name=TOPICS, **fields)


def typed_tensor(name: str, datatype: str, shape: list[int], **contents: Any) -> Any:
    kind = service_pb2.ModelInferRequest.InferInputTensor
    return kind(name=name, datatype=datatype, shape=shape, contents=contents)


def text_tensor(texts: list[str]) -> Any:
    encoded = [text.encode() for text in texts]
    return typed_tensor("text", "BYTES", [len(texts), 1], bytes_contents=encoded)


class TestInfer:
    @pytest.mark.parametrize("flat", [False, True])
    async def test_texts_are_answered_as_over_http(
        self, shared: Service, caller: Calling, flat: bool
    ) -> None:
        given = http_texts(TEXTS) | ({"shape": [len(TEXTS)]} if flat else {})
        expected = await http_infer(shared, [given])
        assert set(expected) == set(OUTPUTS)
        given = [texts_input(TEXTS, flat=flat)]
        check_same(await caller.triton.infer(TOPICS, given), expected)

    async def test_unicode_and_empty_texts(self, shared: Service, caller: Calling) -> None:
        odd = ["", "Füchse 🦊 liefen", "漢字", "a\x00b"]
        expected = await http_infer(shared, [http_texts(odd)])
        check_same(await caller.triton.infer(TOPICS, [texts_input(odd)]), expected)

    async def test_pairs_are_answered_as_over_http(self, shared: Service, caller: Calling) -> None:
        texts, pairs = ["The otter slept", "A young fox"], ["A young fox ran", ""]
        given = [http_texts(texts), http_texts(pairs, "text_pair")]
        expected = await http_infer(shared, given, PAIRS)
        given = [texts_input(texts), texts_input(pairs, "text_pair")]
        check_same(await caller.triton.infer(PAIRS, given), expected)

    @pytest.mark.parametrize("datatype", ["INT32", "INT64"])
    async def test_tokens_are_answered_like_their_texts(
        self, shared: Service, caller: Calling, datatype: str
    ) -> None:
        texts: list[Text] = ["The otter slept", ("A young fox", "ran past the old mill")]
        model = shared.app.state.shared.models.get(PAIRS)
        tokens = model.encoder.encode(texts)
        width = max(map(len, tokens))
        arrays = {name: np.zeros((2, width), datatype.lower()) for name in (
            "input_ids", "attention_mask", "token_type_ids",
        )}  # fmt: skip
        for place, one in enumerate(tokens):
            arrays["input_ids"][place, : len(one)] = one.ids
            arrays["attention_mask"][place, : len(one)] = 1
            arrays["token_type_ids"][place, : len(one)] = one.type_ids or 0
        given = [http_texts(["The otter slept", "A young fox"])]
        given.append(http_texts(["", "ran past the old mill"], "text_pair"))
        expected = await http_infer(shared, given, PAIRS)
        inputs = [tensor(name, values, datatype) for name, values in arrays.items()]
        check_same(await caller.triton.infer(PAIRS, inputs), expected)
        fields = {"INT32": "int_contents", "INT64": "int64_contents"}
        message = service_pb2.ModelInferRequest(
            model_name=PAIRS,
            inputs=[
                typed_tensor(
                    name, datatype, [2, width], **{fields[datatype]: values.ravel().tolist()}
                )
                for name, values in arrays.items()
            ],
        )
        answer = await send_infer(caller, message)
        assert answer.outputs[2].contents.fp32_contents == pytest.approx(expected["probs"]["data"])

    async def test_typed_contents_are_answered_by_typed_contents(
        self, shared: Service, caller: Calling
    ) -> None:
        expected = await http_infer(shared, [http_texts(TEXTS)], id="mine")
        answer = await send_infer(caller, request_of(id="mine", inputs=[text_tensor(TEXTS)]))
        assert (answer.id, answer.model_name, answer.model_version) == ("mine", TOPICS, "2")
        assert not answer.raw_output_contents
        assert [output.name for output in answer.outputs] == list(expected)
        fields = {"BYTES": "bytes", "FP32": "fp32", "INT32": "int", "INT64": "int64"}
        fields["BOOL"] = "bool"
        for output in answer.outputs:
            one = expected[output.name]
            assert (output.datatype, list(output.shape)) == (one["datatype"], one["shape"])
            values = getattr(output.contents, f"{fields[output.datatype]}_contents")
            decoded = [v.decode() if isinstance(v, bytes) else v for v in values]
            assert decoded == near(one["data"])

    async def test_requested_outputs_and_class_counts(
        self, shared: Service, caller: Calling
    ) -> None:
        outputs = [{"name": "label"}, {"name": "probs", "parameters": {"classification": 2}}]
        expected = await http_infer(shared, [http_texts(TEXTS)], outputs=outputs)
        asked = [InferRequestedOutput("label"), InferRequestedOutput("probs", class_count=2)]
        check_same(await caller.triton.infer(TOPICS, [texts_input(TEXTS)], outputs=asked), expected)

    async def test_parameters_have_the_same_effect_as_over_http(
        self, shared: Service, caller: Calling
    ) -> None:
        given = {"quality": "fast"}, {"quality": 1.5}, {"heads": 2}, {"max_heads": 4}
        for parameters in given:
            expected = await http_infer(shared, [http_texts(TEXTS)], parameters=parameters)
            result = await caller.triton.infer(
                TOPICS, [texts_input(TEXTS)], parameters=parameters, model_version="2"
            )
            check_same(result, expected)

    async def test_trailing_metadata_has_request_id_quality_and_times(
        self, caller: Calling
    ) -> None:
        call = caller.channel.unary_unary(f"{SERVICE}/ModelInfer")(
            request_of(inputs=[text_tensor(TEXTS)]).SerializeToString(),
            metadata=[("x-request-id", "mine-1")],
        )
        await call
        told = dict(await call.trailing_metadata())
        assert told["x-request-id"] == "mine-1"
        assert told["x-quality"] == "balanced"
        assert "total;dur=" in told["server-timing"]

    @pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
    async def test_compressed_messages_are_accepted(self, caller: Calling, algorithm: str) -> None:
        given = [texts_input(TEXTS)]
        result = await caller.triton.infer(TOPICS, given, compression_algorithm=algorithm)
        assert result.as_numpy("label").shape == (len(TEXTS), 1)


async def send_infer(caller: Calling, message: Any, **options: Any) -> Any:
    data = await caller.send("ModelInfer", message.SerializeToString(), **options)
    return service_pb2.ModelInferResponse.FromString(data)


class TestOtherCalls:
    async def test_metadata_and_configuration_equal_those_over_http(
        self, shared: Service, caller: Calling
    ) -> None:
        async def http(path: str) -> Any:
            return (await shared.client.get(f"/v2{path}")).json()

        server = await caller.triton.get_server_metadata(as_json=True)
        assert server == await http("")
        model = await caller.triton.get_model_metadata(TOPICS)
        described = await http(f"/models/{TOPICS}/versions/2")
        assert (model.name, list(model.versions), model.platform) == (
            described["name"], described["versions"], described["platform"],
        )  # fmt: skip
        for kind in ("inputs", "outputs"):
            assert [(t.name, t.datatype, list(t.shape)) for t in getattr(model, kind)] == [
                (t["name"], t["datatype"], t["shape"]) for t in described[kind]
            ]
        config = (await caller.triton.get_model_config(TOPICS, "2")).config
        described = await http(f"/models/{TOPICS}/config")
        assert (config.backend, config.max_batch_size) == ("budgetformer", 64)
        assert list(config.version_policy.specific.versions) == [2]
        assert all(one.optional for one in config.input)
        types = model_config_pb2.DataType.Name
        for kind in ("input", "output"):
            assert [(t.name, types(t.data_type), list(t.dims)) for t in getattr(config, kind)] == [
                (t["name"], t["data_type"], t["dims"]) for t in described[kind]
            ]

    async def test_readiness_of_server_models_and_versions(self, caller: Calling) -> None:
        triton = caller.triton
        assert await triton.is_server_live()
        assert await triton.is_server_ready()
        assert await triton.is_model_ready(TOPICS)
        assert await triton.is_model_ready(TOPICS, "2")
        assert not await triton.is_model_ready(TOPICS, "1")
        assert not await triton.is_model_ready("nothing")

    async def test_a_server_without_an_engine_is_not_ready(self, model_store: Path) -> None:
        async with alone(model_store, engines=0) as (_, caller):
            assert await caller.triton.is_server_live()
            assert not await caller.triton.is_server_ready()
            assert await health(caller) == health_pb2.HealthCheckResponse.NOT_SERVING
            given = [texts_input(TEXTS)]
            metadata = await refused(caller.triton.infer(TOPICS, given), "UNAVAILABLE")
            assert int(metadata["retry-after"]) >= 1

    async def test_the_standard_health_service(self, caller: Calling) -> None:
        for name in ("", "inference.GRPCInferenceService"):
            assert await health(caller, name) == health_pb2.HealthCheckResponse.SERVING
        await refused(health(caller, "another.Service"), "NOT_FOUND")

    async def test_loading_and_unloading_through_the_repository(self, model_store: Path) -> None:
        async with alone(model_store, models=[TOPICS, PAIRS]) as (_, caller):
            triton, admin = caller.triton, {"authorization": ADMIN["Authorization"]}
            assert await served(caller) == {(PAIRS, "1"), (TOPICS, "2")}
            await triton.unload_model(PAIRS, headers=admin)
            assert not await triton.is_model_ready(PAIRS)
            assert await served(caller) == {(TOPICS, "2")}
            await triton.load_model(PAIRS, headers=admin)
            assert await triton.is_model_ready(PAIRS)
            await refused(triton.load_model(PAIRS), "UNAUTHENTICATED", "admin")
            await refused(triton.load_model("nothing", headers=admin), "NOT_FOUND")
            asking = triton.unload_model("", headers=admin)
            await refused(asking, "INVALID_ARGUMENT", "names no model")
            asking = triton.load_model(TOPICS, config="{}", headers=admin)
            await refused(asking, "INVALID_ARGUMENT", "load takes no parameters")

    async def test_unknown_calls_are_unimplemented(self, caller: Calling) -> None:
        await refused(caller.triton.get_inference_statistics(), "UNIMPLEMENTED")
        await refused(caller.send("Nothing", b""), "UNIMPLEMENTED")
        await refused(caller.send("/another.Service/Nothing", b""), "UNIMPLEMENTED")


async def health(caller: Calling, name: str = "") -> int:
    asked = health_pb2.HealthCheckRequest(service=name)
    answer = await caller.send(HEALTH, asked.SerializeToString())
    return int(health_pb2.HealthCheckResponse.FromString(answer).status)


async def served(caller: Calling) -> set[tuple[str, str]]:
    index = await caller.triton.get_model_repository_index()
    return {(one.name, one.version) for one in index.models if one.state == "READY"}


class TestErrors:
    @pytest.mark.parametrize(
        ("message", "status", "match"),
        [
            (request_of(), "INVALID_ARGUMENT", "inputs"),
            (request_of(inputs=[text_tensor(TEXTS)], model_version="1"), "NOT_FOUND", "topics"),
            (service_pb2.ModelInferRequest(), "INVALID_ARGUMENT", "names no model"),
            (
                service_pb2.ModelInferRequest(
                    model_name="topics/versions/2", inputs=[text_tensor(TEXTS)]
                ),
                "NOT_FOUND",
                "topics",
            ),
            (
                request_of(inputs=[typed_tensor("text", "BYTES", [2, 1], bytes_contents=[b"a"])]),
                "INVALID_ARGUMENT",
                "its shape requires 2",
            ),
            (
                request_of(inputs=[typed_tensor("text", "BYTES", [1], bytes_contents=[b"\xff"])]),
                "INVALID_ARGUMENT",
                "is not UTF-8",
            ),
            (
                request_of(inputs=[typed_tensor("text", "FP64", [1], fp64_contents=[1.0])]),
                "INVALID_ARGUMENT",
                "datatype",
            ),
            (
                request_of(inputs=[typed_tensor("text", "BYTES", [-1], bytes_contents=[b"a"])]),
                "INVALID_ARGUMENT",
                "shape",
            ),
            (
                request_of(inputs=[text_tensor(TEXTS)], raw_input_contents=[b""]),
                "INVALID_ARGUMENT",
                "raw_input_contents",
            ),
            (
                request_of(
                    inputs=[{"name": "text", "datatype": "BYTES", "shape": [1]}],
                    raw_input_contents=[b"\x09\x00\x00\x00a"],
                ),
                "INVALID_ARGUMENT",
                "end within an element",
            ),
            (
                request_of(inputs=[text_tensor(TEXTS)], outputs=[{"name": "odd"}]),
                "INVALID_ARGUMENT",
                "unknown output",
            ),
            (
                request_of(
                    inputs=[text_tensor(TEXTS)], parameters={"quality": {"string_param": "odd"}}
                ),
                "INVALID_ARGUMENT",
                "quality",
            ),
            (
                request_of(
                    inputs=[text_tensor(TEXTS)], parameters={"timeout": {"string_param": "odd"}}
                ),
                "INVALID_ARGUMENT",
                "timeout",
            ),
            (request_of(inputs=[text_tensor(["a"] * 65)]), "RESOURCE_EXHAUSTED", "65 items"),
            (request_of(inputs=[text_tensor(["a" * 10_001])]), "INVALID_ARGUMENT", "characters"),
        ],
    )  # fmt: skip
    async def test_invalid_requests_are_refused_without_affecting_others(
        self, caller: Calling, message: Any, status: str, match: str
    ) -> None:
        sound = [texts_input(TEXTS)]
        others = asyncio.gather(*(caller.triton.infer(TOPICS, sound) for _ in range(4)))
        await refused(send_infer(caller, message, timeout=30), status, match)
        for other in await others:
            assert len(other.as_numpy("label")) == len(TEXTS)

    @pytest.mark.parametrize("call", CALLS, ids=lambda call: call.method)
    async def test_bytes_that_are_no_message_are_refused(self, caller: Calling, call: Any) -> None:
        method = f"/{call.service}/{call.method}"
        await refused(caller.send(method, b"\x0a\xff\xff"), "INVALID_ARGUMENT", "is not a valid ")

    async def test_a_call_takes_exactly_one_message(self, caller: Calling) -> None:
        message = request_of(inputs=[text_tensor(TEXTS)]).SerializeToString()
        call = caller.channel.stream_unary(f"{SERVICE}/ModelInfer")
        await refused(call(iter([])), "INVALID_ARGUMENT", "no message")
        answer = service_pb2.ModelInferResponse.FromString(await call(iter([message, message])))
        assert answer.model_name == TOPICS

    @pytest.mark.parametrize("compression", [grpc.Compression.NoCompression, grpc.Compression.Gzip])
    async def test_too_large_messages_are_refused(
        self, caller: Calling, compression: grpc.Compression
    ) -> None:
        message = request_of(inputs=[text_tensor(["a" * BODY_BYTES])])
        asking = send_infer(caller, message, compression=compression)
        await refused(asking, "RESOURCE_EXHAUSTED")
        assert await caller.triton.is_server_ready()

    @pytest.mark.parametrize(
        "message",
        [
            request_of(inputs=[{} for _ in range(80_000)]),
            request_of(raw_input_contents=[b""] * 80_000),
            request_of(inputs=[typed_tensor("input_ids", "INT32", [1], int_contents=[1] * 80_000)]),
            request_of(inputs=[typed_tensor("input_ids", "FP32", [1], fp32_contents=[1] * 80_000)]),
            request_of(inputs=[typed_tensor("text", "BYTES", [1], bytes_contents=[b""] * 80_000)]),
        ],
    )
    async def test_messages_with_too_many_values_are_refused(
        self, caller: Calling, message: Any
    ) -> None:
        asking = send_infer(caller, message)
        await refused(asking, "RESOURCE_EXHAUSTED", "the message has more than")

    async def test_too_large_metadata_is_refused(self, caller: Calling) -> None:
        asking = caller.triton.is_server_live(headers={"x-long": "a" * 40_000})
        await refused(asking, "RESOURCE_EXHAUSTED")
        assert await caller.triton.is_server_live()

    async def test_a_message_must_arrive_in_time(self, model_store: Path) -> None:
        async with alone(model_store, receive_seconds=0.2) as (_, caller):
            call = caller.channel.stream_unary(f"{SERVICE}/ModelInfer")()
            await refused(call, "DEADLINE_EXCEEDED", "the message did not arrive in 0.2 s")


class TestLimitsAndTelemetry:
    async def test_calls_are_counted_by_method_and_outcome(
        self, shared: Service, caller: Calling
    ) -> None:
        before = await shared.scrape()
        await caller.triton.infer(TOPICS, [texts_input(TEXTS)])
        await refused(caller.triton.infer("nothing", [texts_input(TEXTS)]), "NOT_FOUND")
        await refused(caller.send("ModelConfig", b"\xff"), "INVALID_ARGUMENT")
        await caller.triton.is_server_live()

        async def grown() -> bool:
            now = await shared.scrape()
            counted = {
                (method, outcome): now.minus(
                    before, "requests_total", route=f"grpc {method}", outcome=outcome
                )
                for method in ("ModelInfer", "ModelConfig", "ServerLive")
                for outcome in OUTCOMES
            }
            items = now.minus(before, "items_total", model=TOPICS)
            return items == len(TEXTS) and {k: v for k, v in counted.items() if v} == {
                ("ModelInfer", "ok"): 1,
                ("ModelInfer", "invalid"): 1,
                ("ModelConfig", "invalid"): 1,
                ("ServerLive", "ok"): 1,
            }

        await until(grown, "the counts of calls")

    async def test_keys_scopes_and_rate_limits(self, model_store: Path) -> None:
        keys = {"web": key("web-secret"), "few": key("few-secret", texts_per_second=1, burst=4)}
        async with alone(model_store, keys=keys, admin_key=None) as (_, caller):
            triton, given = caller.triton, [texts_input(TEXTS)]
            await refused(triton.infer(TOPICS, given), "UNAUTHENTICATED", "a key with the scope")
            await refused(caller.send("ModelInfer", b"\xff"), "UNAUTHENTICATED")
            wrong = triton.infer(TOPICS, given, headers={"authorization": "Bearer wrong"})
            await refused(wrong, "UNAUTHENTICATED", "the key is wrong")
            web = {"x-api-key": "web-secret"}
            for headers in (web, {"authorization": "Bearer web-secret"}):
                result = await triton.infer(TOPICS, given, headers=headers)
                assert len(result.as_numpy("label")) == len(TEXTS)
            await refused(
                triton.load_model(TOPICS, headers=web), "PERMISSION_DENIED", "lacks the scope"
            )
            few = {"x-api-key": "few-secret"}
            await triton.infer(TOPICS, given, headers=few)
            asking = triton.infer(TOPICS, given, headers=few)
            metadata = await refused(asking, "RESOURCE_EXHAUSTED", "rate limit of this key")
            assert int(metadata["retry-after"]) >= 1
            assert await triton.is_server_ready()
            assert await health(caller) == health_pb2.HealthCheckResponse.SERVING

    async def test_a_full_queue_refuses_calls(self, model_store: Path) -> None:
        async with alone(model_store, max_queue_items=4) as (running, caller):
            with held(running.core):
                first = asyncio.ensure_future(infer_beyond_step_0(caller, TEXTS))
                await until(lambda: texts_held(running) == len(TEXTS), "texts")
                metadata = await refused(
                    infer_beyond_step_0(caller, TEXTS),
                    "RESOURCE_EXHAUSTED",
                    "as many texts as it can queue",
                )
                assert int(metadata["retry-after"]) >= 1
            assert len((await first).as_numpy("label")) == len(TEXTS)

    async def test_max_connections_limits_concurrent_calls(self, model_store: Path) -> None:
        async with alone(model_store, max_connections=1) as (running, caller):
            with held(running.core):
                first = asyncio.ensure_future(infer_beyond_step_0(caller))
                await until(lambda: texts_held(running) == 1, "a text")
                await refused(infer_beyond_step_0(caller), "RESOURCE_EXHAUSTED")
            assert len((await first).as_numpy("label")) == 1

    async def test_limits_beyond_the_range_of_grpc_are_accepted(self, model_store: Path) -> None:
        options = {"max_body_bytes": 2**40, "receive_seconds": 1e9}
        async with alone(model_store, **options) as (_, caller):
            assert len((await infer_beyond_step_0(caller)).as_numpy("label")) == 1

    async def test_the_earlier_of_both_deadlines_applies(self, model_store: Path) -> None:
        async with alone(model_store, timeout_ms=60_000) as (running, caller):
            with held(running.core):
                await refused(infer_beyond_step_0(caller, client_timeout=0.3), "DEADLINE_EXCEEDED")
                await until(lambda: texts_held(running) == 0, "the end of a text")
                asking = infer_beyond_step_0(caller, timeout=200_000)
                await refused(asking, "DEADLINE_EXCEEDED", "the deadline passed")
                asking = infer_beyond_step_0(caller, timeout=200_000, client_timeout=60)
                await refused(asking, "DEADLINE_EXCEEDED", "the deadline passed")

    async def test_deadlines_are_capped_at_the_maximum(self, model_store: Path) -> None:
        options = {"timeout_ms": 200, "max_timeout_ms": 300}
        async with alone(model_store, **options) as (running, caller):
            with held(running.core):
                asking = infer_beyond_step_0(caller, client_timeout=60)
                await refused(asking, "DEADLINE_EXCEEDED", "the deadline passed")

    async def test_cancelled_calls_are_dropped(self, model_store: Path) -> None:
        async with alone(model_store) as (running, caller):
            with held(running.core):
                asking = asyncio.ensure_future(infer_beyond_step_0(caller))
                await until(lambda: running.in_flight() > 0, "a text in the engine")
                asking.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await asking
                await until(lambda: texts_held(running) == 0, "the end of its texts")
            await until(lambda: running.in_flight() == 0, "nothing in the engine")

            async def counted() -> bool:
                found = await running.scrape()
                calls = found.by("outcome", "requests_total", route="grpc ModelInfer")
                return calls == {"cancelled": 1}

            await until(counted, "the count of the call")

    async def test_draining_finishes_running_calls_and_refuses_new_ones(
        self, model_store: Path
    ) -> None:
        async with alone(model_store) as (running, caller):
            with held(running.core):
                asking = asyncio.ensure_future(infer_beyond_step_0(caller))
                await until(lambda: running.in_flight() > 0, "a text in the engine")
                running.app.state.shared.admission.draining = True
                await refused(infer_beyond_step_0(caller), "UNAVAILABLE", "shutting down")
                assert not await caller.triton.is_server_ready()
                stopping = asyncio.ensure_future(caller.server.stop())
                await until(lambda: unavailable(caller), "the end of the server's port")
                assert not stopping.done()
            assert len((await asking).as_numpy("label")) == 1
            await stopping

    async def test_the_trace_of_the_caller_is_continued(self, model_store: Path) -> None:
        exporter, provider = InMemorySpanExporter(), TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        async with alone(model_store, tracer_provider=provider) as (_, caller):
            await infer_beyond_step_0(caller, headers={"traceparent": TRACEPARENT})

            def outer() -> list[ReadableSpan]:
                spans = exporter.get_finished_spans()
                return [span for span in spans if span.parent and span.parent.is_remote]

            await until(lambda: bool(outer()), "the span of the call")
        (span,) = outer()
        assert dict(span.attributes or {})["budgetformer.call"] == "grpc ModelInfer"
        spans = exporter.get_finished_spans()
        assert {"tokenize", "budget"} <= {span.name for span in spans}
        assert {span.context and span.context.trace_id for span in spans} == {
            int(TRACEPARENT[3:35], 16)
        }


async def infer_beyond_step_0(
    caller: Calling, texts: Sequence[str] = TEXTS[:1], **options: Any
) -> Any:
    """Classify texts with 4 heads, so that step 0 alone cannot answer."""
    parameters, given = {"heads": 4}, [texts_input(texts)]
    return await caller.triton.infer(TOPICS, given, parameters=parameters, **options)


def texts_held(running: Service) -> int:
    return int(running.app.state.shared.admission.shedding.texts)


async def unavailable(caller: Calling) -> bool:
    try:
        await caller.triton.is_server_live()
    except InferenceServerException as error:
        return error.status() == "StatusCode.UNAVAILABLE"
    return False
