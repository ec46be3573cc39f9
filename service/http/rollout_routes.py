"""Routes of roll-outs: serve two versions of a model side by side (scope `admin`)."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Request, Response
from pydantic import ConfigDict, Field

from budgetformer.checkpoint.manifest import MAX_VERSION
from service.http.authentication import needs
from service.http.bodies import describe_body, read_body
from service.http.errors import errors_as
from service.http.model_routes import MAX_LOAD_BYTES, request_change
from service.http.schemas import ErrorResponse, RequestBody
from service.ipc.control_messages import ChangeRollOut, ContentReply

router = APIRouter(
    tags=["roll-outs"], responses=errors_as(ErrorResponse), dependencies=[needs("admin")]
)

_Share = Annotated[float, Field(ge=0, le=1)]


class RollOutRequest(RequestBody):
    """Body of a roll-out; omitted fields keep their value, or have that of the settings.

    Attributes:
        version: candidate; by default the one that is being rolled out, or the highest version.
        weight: share of the requests that the candidate answers.
        shadow: share of the other requests that the candidate also computes, for comparison.
        min_agreement: share of shadow texts with the same label, below which the roll-out stops.
        max_error_rate: excess of the candidate's error rate over the served version's, above which
            the roll-out stops.
        max_latency_ratio: ratio of the candidate's latency to the served version's, above which the
            roll-out stops.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"version": 4, "weight": 0.1, "shadow": 0.5, "min_agreement": 0.98}]
        }
    )

    version: Annotated[int, Field(ge=1, le=MAX_VERSION)] | None = None
    weight: _Share | None = None
    shadow: _Share | None = None
    min_agreement: _Share | None = None
    max_error_rate: _Share | None = None
    max_latency_ratio: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None


@router.post(
    "/models/{name}/rollout",
    summary="Roll a version out beside the served one",
    openapi_extra=describe_body(RollOutRequest, required=False),
)
async def begin(request: Request, name: str) -> Response:
    """Load a version, serve it beside the current one, and compare both; or change a roll-out.

    The roll-out stops by itself when it exceeds a bound. The answer is its report.
    """
    body = await read_body(request, RollOutRequest, MAX_LOAD_BYTES, default=RollOutRequest())
    given = body.model_dump(exclude={"version"}, exclude_unset=True)
    return await _change_rollout(request, ChangeRollOut(0, "begin", name, body.version, given))


@router.get("/models/{name}/rollout", summary="What a roll-out has measured")
async def show(request: Request, name: str) -> Response:
    """Return the report of the last roll-out: versions, bounds, measurements, reason of its end."""
    return await _change_rollout(request, ChangeRollOut(0, "show", name))


@router.post("/models/{name}/promote", summary="Serve the new version alone")
async def promote(request: Request, name: str) -> Response:
    """End a roll-out and serve the candidate alone; requests in progress are answered first.

    Engines that lack the candidate, for example soon after a restart, load it before.
    """
    return await _change_rollout(request, ChangeRollOut(0, "promote", name))


@router.post("/models/{name}/rollback", summary="Go back to the version before")
async def roll_back(request: Request, name: str) -> Response:
    """End a roll-out without the candidate; after a promotion, load the version before it."""
    return await _change_rollout(request, ChangeRollOut(0, "rollback", name))


async def _change_rollout(request: Request, wanted: ChangeRollOut) -> Response:
    answer = await request_change(request, wanted)
    assert isinstance(answer, ContentReply)
    return Response(answer.content, media_type=answer.media_type)
