"""Messages of KServe's gRPC protocol: equal to the public definitions, decoded within limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from grpc_health.v1 import health_pb2
from grpc_tools import protoc
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import model_config_pb2, service_pb2

from service.grpc import messages
from service.grpc.calls import CALLS
from service.grpc.server import STATUSES
from service.http.errors import CLASSIFYING, CLIENT_GONE, REASONS, ApiError

INFER, _ = messages.messages_of(messages.INFERENCE, "ModelInfer")


def test_the_compiled_messages_are_current(tmp_path: Path) -> None:
    folder, made = Path(messages.__file__).parent, tmp_path / "messages.binpb"
    arguments = [f"--proto_path={folder}", f"--descriptor_set_out={made}"]
    assert protoc.main(["protoc", *arguments, "inference.proto", "health.proto"]) == 0
    assert made.read_bytes() == (folder / "messages.binpb").read_bytes()


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.method)
def test_fields_equal_those_of_the_public_protocol(call: Any) -> None:
    public = health_pb2 if call.service == messages.HEALTH else service_pb2
    service = public.DESCRIPTOR.services_by_name[call.service.rpartition(".")[2]]
    method = service.methods_by_name[call.method]
    request, response = messages.messages_of(call.service, call.method)
    assert_same_fields(request.DESCRIPTOR, method.input_type)
    assert_same_fields(response.DESCRIPTOR, method.output_type)


def test_datatypes_equal_those_of_the_public_protocol() -> None:
    _, kind = messages.messages_of(messages.INFERENCE, "ModelConfig")
    config = kind.DESCRIPTOR.fields_by_name["config"].message_type
    ours = config.fields_by_name["input"].message_type.fields_by_name["data_type"].enum_type
    public = dict(model_config_pb2.DataType.items())
    assert {value.name: public[value.name] for value in ours.values} == {
        value.name: value.number for value in ours.values
    }


def test_every_http_error_has_a_grpc_status() -> None:
    assert set(STATUSES) >= {*CLASSIFYING, 500}
    assert set(STATUSES) <= {*REASONS, CLIENT_GONE}


def assert_same_fields(ours: Any, public: Any) -> None:
    assert ours.full_name == public.full_name
    for field in ours.fields:
        other = public.fields_by_name[field.name]
        assert (field.number, field.type, field.is_repeated) == (
            other.number, other.type, other.is_repeated,
        ), field.full_name  # fmt: skip
        if field.message_type is not None:
            assert_same_fields(field.message_type, other.message_type)


@given(st.binary(max_size=200))
def test_any_bytes_are_decoded_or_refused(data: bytes) -> None:
    try:
        message = messages.decode(INFER, data, max_values=20)
    except ApiError:
        return
    assert message == INFER.FromString(data)


@given(st.integers(1, 50), st.data())
def test_too_many_values_are_refused(count: int, data: st.DataObject) -> None:
    fields = data.draw(
        st.sampled_from(
            [
                {"inputs": [{}] * count},
                {"raw_input_contents": [b"a"] * count},
                {"inputs": [{"contents": {"int_contents": [300] * count}}]},
                {"inputs": [{"contents": {"fp32_contents": [1.0] * count}}]},
                {"inputs": [{"contents": {"bytes_contents": [b"a"] * count}}]},
                {"parameters": {str(i): {"int64_param": i} for i in range(count)}},
            ]
        )
    )
    encoded = INFER(**fields).SerializeToString()
    assert messages.decode(INFER, encoded, max_values=len(encoded)).ByteSize() == len(encoded)
    assert messages.decode(INFER, encoded, max_values=5 * count + 3).ByteSize() == len(encoded)
    with pytest.raises(ApiError, match="more than"):
        messages.decode(INFER, encoded, max_values=count - 1)


def test_an_endless_varint_is_refused() -> None:
    with pytest.raises(ApiError, match="not a valid ModelInferRequest"):
        messages.decode(INFER, b"\xff" * 10**7, max_values=20)
