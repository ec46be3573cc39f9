"""The supported calls: each one as an HTTP request, and the HTTP response as a message."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from google.protobuf.json_format import ParseDict

from service.grpc.messages import HEALTH, INFERENCE, Message, messages_of
from service.grpc.tensors import pack, unpack
from service.http.errors import ApiError
from service.http.kserve import HEADER_LENGTH

OK = (200,)
READY_OR_NOT = (200, 503)
MODEL_READY_OR_NOT = (200, 404, 503)


@dataclass(frozen=True)
class HttpRequest:
    """A request to the application.

    Attributes:
        method, path, body, headers: parts of the HTTP request.
        refusal: error that is raised when the route reads the body; None: no error.
    """

    method: str
    path: str
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    refusal: ApiError | None = None


@dataclass(frozen=True)
class HttpResponse:
    """The application's response; header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """Return the decoded JSON body."""
        return msgspec.json.decode(self.body)


ToHttp = Callable[[Message, float | None], HttpRequest]
"""Converts a message, with the seconds to its deadline or None, to an HTTP request."""
Answer = Callable[[HttpResponse, Message], dict[str, Any] | Message]
"""Converts the HTTP response to a message to the gRPC response or its fields."""


@dataclass(frozen=True)
class Call:
    """A method of a service.

    Attributes:
        service, method: names in the .proto file.
        to_http: converts the request.
        answer: converts the response.
        statuses: HTTP statuses that `answer` converts; all others are errors.
    """

    service: str
    method: str
    to_http: ToHttp
    answer: Answer
    statuses: Sequence[int] = OK

    @property
    def label(self) -> str:
        """The name of the call in metrics and logs."""
        return f"grpc {self.method}"

    def encode(self, response: HttpResponse, message: Message) -> bytes:
        """Return the encoded gRPC response to a message."""
        answer = self.answer(response, message)
        if isinstance(answer, dict):
            _, kind = messages_of(self.service, self.method)
            answer = ParseDict(answer, kind())
        encoded: bytes = answer.SerializeToString()
        return encoded


def _get(path: str) -> ToHttp:
    return lambda _message, _seconds: HttpRequest("GET", path)


def _model(suffix: str = "") -> ToHttp:
    """Return a GET below the path of the model that a message names by `name` and `version`."""
    return lambda message, _seconds: HttpRequest(
        "GET", _path(message.name, message.version) + suffix
    )


def _path(name: str, version: str) -> str:
    """Return the path of a model; slashes in names are escaped."""
    if not name:
        raise ApiError(400, "the call names no model", "model", "missing_field")
    path = f"/v2/models/{_segment(name)}"
    return f"{path}/versions/{_segment(version)}" if version else path


def _segment(name: str) -> str:
    return name.replace("/", "%2F")


def _post(path: str, content: Any) -> HttpRequest:
    body = msgspec.json.encode(content)
    return HttpRequest("POST", path, body, {"content-type": "application/json"})


def _index(message: Message, _seconds: float | None) -> HttpRequest:
    return _post("/v2/repository/index", {"ready": message.ready})


def _change(action: str) -> ToHttp:
    """Load or unload the model that a message names; values of parameters are left out."""

    def to_http(message: Message, _seconds: float | None) -> HttpRequest:
        if not message.model_name:
            raise ApiError(400, "the call names no model", "model", "missing_field")
        path = f"/v2/repository/models/{_segment(message.model_name)}/{action}"
        return _post(path, {"parameters": dict.fromkeys(message.parameters)})

    return to_http


def _infer(message: Message, seconds: float | None) -> HttpRequest:
    parameters = _parameters(message.parameters)
    timeout = parameters.get("timeout", 0)
    if seconds is not None and type(timeout) is int:
        # Whole milliseconds, rounded down: the deadline in the server is never after the client's.
        left = max(1, int(seconds * 1000)) * 1000
        parameters["timeout"] = min(timeout, left) if timeout else left
    blobs = _input_contents(message)
    head = {
        "id": message.id,
        "inputs": [
            {
                "name": tensor.name,
                "datatype": tensor.datatype,
                "shape": list(tensor.shape),
                "parameters": {"binary_data_size": len(blob)},
            }
            for tensor, blob in zip(message.inputs, blobs, strict=True)
        ],
        "outputs": [
            {"name": one.name, "parameters": _parameters(one.parameters) | {"binary_data": True}}
            for one in message.outputs
        ],
        "parameters": parameters | {"binary_data_output": True},
    }
    text = msgspec.json.encode(head)
    path = _path(message.model_name, message.model_version)
    headers = {HEADER_LENGTH.lower(): str(len(text))}
    return HttpRequest("POST", f"{path}/infer", b"".join((text, *blobs)), headers)


def _parameters(given: Message) -> dict[str, Any]:
    parameters = {}
    for name, value in given.items():
        choice = value.WhichOneof("parameter_choice")
        parameters[name] = None if choice is None else getattr(value, choice)
    return parameters


def _input_contents(message: Message) -> list[bytes]:
    """Return the values of each input in binary form.

    Raises:
        ApiError: 422, the raw contents do not match the inputs.
    """
    raw, inputs = message.raw_input_contents, message.inputs
    if not raw:
        return [pack(tensor.datatype, tensor.contents) for tensor in inputs]
    if len(raw) != len(inputs) or any(tensor.HasField("contents") for tensor in inputs):
        problem = f"there are {len(inputs)} inputs and {len(raw)} raw_input_contents"
        message = f"{problem}: give every input raw contents, or every input typed ones"
        raise ApiError(422, message, "raw_input_contents", "invalid_field")
    return list(raw)


def _inferred(response: HttpResponse, message: Message) -> Message:
    """Return the outputs in the form of the inputs, raw or typed."""
    length = int(response.headers[HEADER_LENGTH.lower()])
    head = msgspec.json.decode(response.body[:length])
    rest = memoryview(response.body)[length:]
    _, kind = messages_of(INFERENCE, "ModelInfer")
    answer = kind(
        id=head.get("id", ""), model_name=head["model_name"], model_version=head["model_version"]
    )
    for described in head["outputs"]:
        size = described["parameters"]["binary_data_size"]
        name, datatype = described["name"], described["datatype"]
        output = answer.outputs.add(name=name, datatype=datatype, shape=described["shape"])
        if message.raw_input_contents:
            answer.raw_output_contents.append(bytes(rest[:size]))
        else:
            unpack(datatype, rest[:size], output.contents)
        rest = rest[size:]
    return answer


def _health(message: Message, _seconds: float | None) -> HttpRequest:
    if message.service not in ("", INFERENCE, HEALTH):
        raise ApiError(404, "there is no such service", "service", "unknown_service")
    return HttpRequest("GET", "/v2/health/ready")


def _ready(response: HttpResponse, _message: Message) -> dict[str, Any]:
    return {"ready": response.status == 200}


CALLS = (
    Call(INFERENCE, "ServerLive", _get("/v2/health/live"), lambda *_: {"live": True}),
    Call(
        INFERENCE,
        "ServerReady",
        _get("/v2/health/ready"),
        _ready,
        READY_OR_NOT,
    ),
    Call(
        INFERENCE,
        "ModelReady",
        _model("/ready"),
        _ready,
        MODEL_READY_OR_NOT,
    ),
    Call(INFERENCE, "ServerMetadata", _get("/v2"), lambda response, _: response.json()),
    Call(INFERENCE, "ModelMetadata", _model(), lambda response, _: response.json()),
    Call(
        INFERENCE, "ModelConfig", _model("/config"), lambda response, _: {"config": response.json()}
    ),
    Call(INFERENCE, "ModelInfer", _infer, _inferred),
    Call(INFERENCE, "RepositoryIndex", _index, lambda response, _: {"models": response.json()}),
    Call(INFERENCE, "RepositoryModelLoad", _change("load"), lambda *_: {}),
    Call(INFERENCE, "RepositoryModelUnload", _change("unload"), lambda *_: {}),
    Call(
        HEALTH,
        "Check",
        _health,
        lambda response, _: {"status": "SERVING" if response.status == 200 else "NOT_SERVING"},
        READY_OR_NOT,
    ),
)
