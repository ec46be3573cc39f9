"""POST / and POST /predict: the API of Text Embeddings Inference and of Hugging Face's clients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from service.http.answers import Answered
from service.http.authentication import needs
from service.http.bodies import describe_body, read_body
from service.http.classify import respond
from service.http.direct import direct
from service.http.errors import CLASSIFYING, ApiError, errors_as
from service.http.responses import json_response
from service.http.schemas import (
    ClassifyRequest,
    LabelScore,
    PipelineParameters,
    PredictError,
    PredictRequest,
    TextPair,
)
from service.http.state import state_of

router = APIRouter(
    tags=["compatibility"],
    dependencies=[needs("classify")],
    responses=errors_as(PredictError, CLASSIFYING),
)


_PREDICT: dict[str, Any] = {
    "response_model": list[LabelScore] | list[list[LabelScore]],
    "openapi_extra": describe_body(PredictRequest),
}


@router.post("/predict", summary="Classify, as Text Embeddings Inference does", **_PREDICT)
@router.post("/", summary="Classify, as Hugging Face's clients ask for it", **_PREDICT)
@direct
async def predict(request: Request) -> Response:
    """Answer with labels and scores, best first.

    One text is answered by a list of them, a batch by a list of lists. With `parameters`, as
    Hugging Face's clients send them, the answer is always a list of lists.
    """
    body = await read_body(request, PredictRequest, state_of(request).settings.max_body_bytes)
    return await respond_to_predict(request, body)


async def respond_to_predict(request: Request, body: PredictRequest) -> Response:
    """Classify, and answer in the format of Text Embeddings Inference.

    Raises:
        ApiError: as in `respond`, and 422 for invalid `inputs` or `truncation_direction`.
    """
    given, batched = _items(body)
    _check_direction(body, request)
    parameters = body.parameters or PipelineParameters()
    activation = "none" if body.raw_scores else parameters.function_to_apply
    classify_body = ClassifyRequest.model_construct(
        input=given,
        model=body.model,
        truncate=False not in (body.truncate, parameters.truncation),
        quality=body.quality,
        timeout_ms=body.timeout_ms,
    )

    def write(answered: Answered) -> Response:
        answered.refuse_failures()
        rows = answered.ranked(activation, parameters.top_k)
        return json_response(rows if batched or body.parameters is not None else rows[0])

    return await respond(request, classify_body, write)


def _items(body: PredictRequest) -> tuple[list[str | TextPair], bool]:
    """Return the items of a request, and whether they are a batch."""
    inputs = body.inputs
    if not isinstance(inputs, list):
        return [inputs], False
    if body.parameters is None and isinstance(inputs[0], str):
        return [_pair(inputs, "inputs")], False
    items = [
        _pair(part, f"inputs[{index}]") if isinstance(part, list) else part
        for index, part in enumerate(inputs)
    ]
    if body.parameters is None and any(isinstance(item, str) for item in inputs):
        raise _refusal("inputs")
    return items, True


def _pair(parts: Sequence[object], place: str) -> str | TextPair:
    match parts:
        case [str() as text]:
            return text
        case [str() as text, str() as text_pair]:
            return TextPair(text=text, text_pair=text_pair)
        case _:
            raise _refusal(place)


def _refusal(place: str) -> ApiError:
    message = f"field {place!r} {PredictRequest.hints['inputs']}"
    return ApiError(422, message, place, "invalid_field")


def _check_direction(body: PredictRequest, request: Request) -> None:
    model = state_of(request).model(body.model, request.state.request_id)
    side = model.checkpoint.manifest.truncation_side
    if body.truncation_direction is not None and body.truncation_direction.lower() != side:
        message = f"this model cuts texts on the {side}, as it was trained"
        raise ApiError(422, message, "truncation_direction", "invalid_field")
