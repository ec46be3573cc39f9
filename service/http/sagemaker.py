"""GET /ping and POST /invocations: the API of a SageMaker container."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from service.http.authentication import needs
from service.http.bodies import describe_body, max_values, parse_object, read_json, validate
from service.http.classify import ALSO_ARROW, respond_to_classify
from service.http.direct import direct
from service.http.errors import CLASSIFYING, errors_as
from service.http.health import ready
from service.http.schemas import (
    ClassifyRequest,
    ClassifyResponse,
    ErrorResponse,
    InfinityResponse,
    LabelScore,
    PredictRequest,
)
from service.http.state import state_of
from service.http.tei import respond_to_predict

router = APIRouter(tags=["compatibility"], responses=errors_as(ErrorResponse))


@router.get("/ping", summary="Can it classify now? (SageMaker)")
async def ping(request: Request) -> Response:
    """Answer as `/health/ready` does."""
    return await ready(request)


@router.post(
    "/invocations",
    summary="Classify (SageMaker)",
    responses=errors_as(ErrorResponse, CLASSIFYING) | ALSO_ARROW,
    response_model=ClassifyResponse | InfinityResponse | list[LabelScore] | list[list[LabelScore]],
    dependencies=[needs("classify")],
    openapi_extra=describe_body(ClassifyRequest, PredictRequest),
)
@direct
async def invocations(request: Request) -> Response:
    """Take the body of POST /predict, if it has `inputs`, or else that of POST /classify."""
    state = state_of(request)
    body = await read_json(request, state.settings.max_body_bytes)
    value = parse_object(body, max_values(state))
    if "inputs" in value:
        return await respond_to_predict(request, validate(value, PredictRequest))
    return await respond_to_classify(request, validate(value, ClassifyRequest))
