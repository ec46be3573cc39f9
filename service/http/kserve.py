"""/v2: the Open Inference Protocol (KServe v2) with the extensions that Triton's client uses."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response

import budgetformer
from budgetformer.checkpoint.store import Checkpoint
from budgetformer.model.tfidf import Array
from service.http.answers import Answered, best_first
from service.http.authentication import needs
from service.http.bodies import describe_body, max_values, parse, read_body, read_bytes, validate
from service.http.classify import respond
from service.http.errors import CLASSIFYING, ApiError, errors_as, shorten
from service.http.health import ready
from service.http.kserve_inputs import INPUTS, TOKENS, read_inputs
from service.http.model_routes import MAX_LOAD_BYTES, load, unload
from service.http.responses import json_response
from service.http.schemas import (
    ClassifyRequest,
    IndexRequest,
    InferError,
    InferOutput,
    InferParameters,
    InferRequest,
    RepositoryRequest,
)
from service.http.state import State, state_of
from service.http.tensors import Tensor, split_body, write_body

HEADER_LENGTH = "Inference-Header-Content-Length"
EXTENSIONS = ["binary_tensor_data", "classification", "model_configuration", "model_repository"]
PLATFORM = "budgetformer"
MAX_TOKEN_VALUES = 2**16
"""Additional number of JSON values that a request may have for its token ids."""
_TYPES = {
    "BYTES": "TYPE_STRING", "BOOL": "TYPE_BOOL", "FP32": "TYPE_FP32", "INT32": "TYPE_INT32",
    "INT64": "TYPE_INT64",
}  # fmt: skip


router = APIRouter(
    prefix="/v2",
    tags=["compatibility"],
    responses=errors_as(InferError),
)
_CALLERS: dict[str, Any] = {"dependencies": [needs("classify")]}
_ADMINS: dict[str, Any] = {"dependencies": [needs("admin")]}


@dataclass(frozen=True)
class Output:
    """An output tensor.

    Attributes:
        name, datatype: as in the protocol.
        values: returns the values of the texts.
        columns: returns the number of values per text for a model; None: one value.
    """

    name: str
    datatype: str
    values: Callable[[Answered], Array | list[str]]
    columns: Callable[[Checkpoint], int] | None = None

    def width(self, checkpoint: Checkpoint) -> int:
        """Return the number of values per text."""
        return 1 if self.columns is None else self.columns(checkpoint)


def _width(name: str) -> int:
    """Return the number of values per item of an input; -1: one per token."""
    return -1 if name in TOKENS else 1


def _labels(checkpoint: Checkpoint) -> int:
    return len(checkpoint.manifest.labels)


def _steps(checkpoint: Checkpoint) -> int:
    return len(checkpoint.ladder) + 1


def _best(answered: Answered) -> list[str]:
    names = answered.checkpoint.manifest.labels
    return [names[i] for i in answered.scores.argmax(-1).tolist()]


OUTPUTS = {
    output.name: output
    for output in (
        Output("label", "BYTES", _best),
        Output("score", "FP32", lambda answered: answered.scores.max(-1)),
        Output("probs", "FP32", lambda answered: answered.scores, _labels),
        Output("heads", "INT32", lambda answered: answered.answers.heads),
        Output("budget", "INT32", lambda answered: answered.answers.step),
        Output("predicted", "INT32", lambda answered: answered.answers.predicted),
        Output("steps", "BOOL", lambda answered: answered.answers.ran, _steps),
        Output("macs", "INT64", lambda answered: answered.answers.macs),
    )
}


@router.get("", summary="Name, version and extensions of the server", **_CALLERS)
async def server_metadata() -> Response:
    """Return the name of the server and the extensions of the protocol that it supports."""
    content = {
        "name": "budgetformer-serving",
        "version": budgetformer.__version__,
        "extensions": EXTENSIONS,
    }
    return json_response(content)


@router.get("/health/live", summary="Is the process alive? (KServe)")
async def server_live() -> Response:
    """Answer as `/health/live` does."""
    return json_response({"live": True})


@router.get("/health/ready", summary="Can it classify now? (KServe)")
async def server_ready(request: Request) -> Response:
    """Answer as `/health/ready` does."""
    await ready(request)
    return json_response({"ready": True})


@router.get(
    "/models/{name}/versions/{version}/ready", summary="Is this version served?", **_CALLERS
)
@router.get("/models/{name}/ready", summary="Is this model served?", **_CALLERS)
async def model_ready(request: Request, name: str, version: str | None = None) -> Response:
    """Answer 200 if an engine has the model, 503 while it is loading, 404 if it is not served."""
    state = state_of(request)
    checkpoint = state.model(_spec(name, version)).checkpoint
    if (checkpoint.name, checkpoint.version) not in state.engines.models:
        message = f"{checkpoint.label} is still loading"
        raise ApiError(503, message, "model", "loading", retry_after=1)
    return json_response({"name": checkpoint.name, "ready": True})


@router.get(
    "/models/{name}/versions/{version}", summary="Inputs and outputs of this version", **_CALLERS
)
@router.get("/models/{name}", summary="Inputs and outputs of a model", **_CALLERS)
async def model_metadata(request: Request, name: str, version: str | None = None) -> Response:
    """Describe the tensors: inputs are texts or tokens; outputs are labels, scores and costs."""
    checkpoint = state_of(request).model(_spec(name, version)).checkpoint
    content = {
        "name": checkpoint.name,
        "versions": [str(checkpoint.version)],
        "platform": PLATFORM,
        "inputs": [
            {"name": name, "datatype": kinds[0], "shape": [-1, _width(name)]}
            for name, kinds in INPUTS.items()
        ],
        "outputs": [
            {"name": o.name, "datatype": o.datatype, "shape": [-1, o.width(checkpoint)]}
            for o in OUTPUTS.values()
        ],
    }
    return json_response(content)


@router.get(
    "/models/{name}/versions/{version}/config", summary="Triton's view of this version", **_CALLERS
)
@router.get("/models/{name}/config", summary="Triton's view of a model", **_CALLERS)
async def model_config(request: Request, name: str, version: str | None = None) -> Response:
    """Describe the model as a Triton model configuration."""
    state = state_of(request)
    checkpoint = state.model(_spec(name, version)).checkpoint
    content = {
        "name": checkpoint.name,
        "platform": PLATFORM,
        "backend": PLATFORM,
        "version_policy": {"specific": {"versions": [checkpoint.version]}},
        "max_batch_size": state.settings.max_batch_items,
        "input": [
            {
                "name": name,
                "data_type": _TYPES[kinds[0]],
                "dims": [_width(name)],
                "optional": True,
            }
            for name, kinds in INPUTS.items()
        ],
        "output": [
            {"name": o.name, "data_type": _TYPES[o.datatype], "dims": [o.width(checkpoint)]}
            for o in OUTPUTS.values()
        ],
    }
    return json_response(content)


_INFER: dict[str, Any] = _CALLERS | {
    "responses": errors_as(InferError, CLASSIFYING),
    "openapi_extra": describe_body(InferRequest),
}


@router.post("/models/{name}/versions/{version}/infer", summary="Classify with it", **_INFER)
@router.post("/models/{name}/infer", summary="Classify with a model", **_INFER)
async def infer(request: Request, name: str, version: str | None = None) -> Response:
    """Classify texts or tokens; inputs and outputs may be JSON or binary.

    The inputs are `text` and optionally `text_pair`; or `input_ids` and optionally `attention_mask`
    and `token_type_ids`.
    """
    state = state_of(request)
    body = await read_bytes(request, state.settings.max_body_bytes)
    text, binary = split_body(body, request.headers.get(HEADER_LENGTH))
    infer_body = parse(text, InferRequest, max_values(state) + MAX_TOKEN_VALUES)
    parameters = validate(infer_body.parameters, InferParameters)
    checkpoint = state.model(_spec(name, version), request.state.request_id).checkpoint
    inputs = read_inputs(infer_body.inputs, binary, checkpoint)
    outputs = _outputs(infer_body.outputs or [InferOutput(name=name) for name in OUTPUTS])
    classify_body = ClassifyRequest.model_construct(
        input=inputs.texts,
        model=_spec(name, version),
        quality=parameters.quality,
        heads=parameters.heads,
        max_heads=parameters.max_heads,
        truncate=parameters.truncate,
        timeout_ms=math.ceil(parameters.timeout / 1000) or None,
    )

    def write(answered: Answered) -> Response:
        head = {"id": infer_body.id} if infer_body.id else {}
        return infer_response(answered, head, outputs, inputs.shape, parameters.binary_data_output)

    return await respond(request, classify_body, write, inputs.tokens)


def infer_response(
    answered: Answered,
    head: dict[str, Any],
    outputs: list[tuple[Output, InferOutput]],
    shape: list[int],
    binary: bool,
) -> Response:
    """Return the response in the format of the protocol.

    Args:
        answered: answers to the request.
        head: first entries of the JSON.
        outputs: outputs to return, as requested.
        shape: shape of the outputs with one value per item.
        binary: whether outputs are binary by default.

    Raises:
        ApiError: 500, an item failed.
    """
    answered.refuse_failures()
    tensors = [
        (_tensor(answered, output, requested.top_classes, shape), requested.binary(default=binary))
        for output, requested in outputs
    ]
    checkpoint = answered.checkpoint
    head = head | {"model_name": checkpoint.name, "model_version": str(checkpoint.version)}
    content, length = write_body(head, tensors)
    if length is None:
        return Response(content, media_type="application/json")
    headers = {HEADER_LENGTH: str(length)}
    return Response(content, headers=headers, media_type="application/octet-stream")


def _outputs(requested: list[InferOutput]) -> list[tuple[Output, InferOutput]]:
    outputs = []
    for one in requested:
        if one.name not in OUTPUTS:
            message = f"unknown output {shorten(one.name)!r}; the outputs are {', '.join(OUTPUTS)}"
            raise ApiError(422, message, "outputs", "invalid_field")
        if one.top_classes and one.name != "probs":
            message = f"the parameter classification is for output 'probs', not for {one.name!r}"
            raise ApiError(422, message, "outputs", "invalid_field")
        outputs.append((OUTPUTS[one.name], one))
    return outputs


def _tensor(answered: Answered, output: Output, top: int, shape: list[int]) -> Tensor:
    values = output.values(answered)
    count = len(answered.answers)
    if top:
        order = best_first(answered.scores)[:, :top]
        return Tensor(output.name, "BYTES", order.shape, _ranked(answered, order))
    dims = tuple(shape) if output.columns is None else (count, output.width(answered.checkpoint))
    return Tensor(output.name, output.datatype, dims, values)


def _ranked(answered: Answered, order: Array) -> list[str]:
    """Return classes as in Triton's classification extension, score:index:label."""
    names, scores = answered.checkpoint.manifest.labels, answered.scores
    return [
        f"{scores[row, i]:f}:{i}:{names[i]}"
        for row, indices in enumerate(order.tolist())
        for i in indices
    ]


@router.post(
    "/repository/index",
    summary="What the model store holds",
    **_CALLERS,
    openapi_extra=describe_body(IndexRequest, required=False),
)
async def repository_index(request: Request) -> Response:
    """List every version in the store, and whether it is ready."""
    state = state_of(request)
    body = await read_body(request, IndexRequest, MAX_LOAD_BYTES, default=IndexRequest())
    stored = await asyncio.to_thread(state.models.stored)
    rows = [_index_row(state, name, version) for name, version in stored]
    return json_response([row for row in rows if not body.ready or row["state"] == "READY"])


def _index_row(state: State, name: str, version: int) -> dict[str, str]:
    model = state.models.served.get(name)
    served = model is not None and model.checkpoint.version == version
    phase, reason = "UNAVAILABLE", "not served"
    if served or f"{name}:{version}" in state.hub.catalog.loading:
        loaded = served and (name, version) in state.engines.models
        phase, reason = "READY" if loaded else "LOADING", ""
    return {"name": name, "version": str(version), "state": phase, "reason": reason}


@router.post(
    "/repository/models/{name}/load",
    summary="Load the highest version and serve it (Triton)",
    **_ADMINS,
    openapi_extra=describe_body(RepositoryRequest, required=False),
)
async def repository_load(request: Request, name: str) -> Response:
    """Load a model as `/models/{name}/load` does."""
    body = await read_body(request, RepositoryRequest, MAX_LOAD_BYTES, RepositoryRequest())
    if body.parameters:
        message = (
            "load takes no parameters, since the checkpoint has its configuration; remove them"
        )
        raise ApiError(422, message, "parameters", "invalid_field")
    await load(request, name, None)
    return json_response({})


@router.post(
    "/repository/models/{name}/unload",
    summary="Stop serving a model (Triton)",
    **_ADMINS,
    openapi_extra=describe_body(RepositoryRequest, required=False),
)
async def repository_unload(request: Request, name: str) -> Response:
    """Unload a model as `/models/{name}/unload` does."""
    await read_body(request, RepositoryRequest, MAX_LOAD_BYTES, RepositoryRequest())
    await unload(request, name)
    return json_response({})


def _spec(name: str, version: str | None) -> str:
    return name if version is None else f"{name}:{version}"
