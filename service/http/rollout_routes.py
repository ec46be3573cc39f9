"""Two versions of a model side by side (with the scope `admin`)."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Request, Response
from pydantic import ConfigDict, Field

from budgetformer.checkpoint.manifest import MAX_VERSION
from service.http.authentication import needs
from service.http.bodies import describe_body, read_body
from service.http.errors import errors_as
from service.http.model_routes import MAX_LOAD_BYTES, ask_for_change
from service.http.schemas import ErrorResponse, RequestBody
from service.ipc.control_messages import ChangeRollOut, Shown

router = APIRouter(
    tags=["roll-outs"], responses=errors_as(ErrorResponse), dependencies=[needs("admin")]
)

_Share = Annotated[float, Field(ge=0, le=1)]


class RollOutRequest(RequestBody):
    """Which version to roll out, and how; what is not given stays as it is, or as the settings say.

    Attributes:
        version: by default the one that is being rolled out, or the highest.
        weight: share of the requests that it answers.
        shadow: share of the other requests that it computes too, without its answers being
            returned.
        min_agreement: share of shadow texts with the same label, below which it stops.
        max_error_rate: share of failed requests above the served version's, beyond which it stops.
        max_latency_ratio: of its latency to the served version's, beyond which it stops.
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
    """Load a version, serve it beside the other one, and measure both; or change what is running.

    It stops by itself beyond its bounds. The answer is the report of the roll-out.
    """
    body = await read_body(request, RollOutRequest, MAX_LOAD_BYTES, default=RollOutRequest())
    given = body.model_dump(exclude={"version"}, exclude_unset=True)
    return await _shown(request, ChangeRollOut(0, "begin", name, body.version, given))


@router.get("/models/{name}/rollout", summary="What a roll-out has measured")
async def show(request: Request, name: str) -> Response:
    """Show the last roll-out of a model: versions, bounds, figures of both, why it ended."""
    return await _shown(request, ChangeRollOut(0, "show", name))


@router.post("/models/{name}/promote", summary="Serve the new version alone")
async def promote(request: Request, name: str) -> Response:
    """End a roll-out with the new version served; requests on their way are answered first."""
    return await _shown(request, ChangeRollOut(0, "promote", name))


@router.post("/models/{name}/rollback", summary="Go back to the version before")
async def roll_back(request: Request, name: str) -> Response:
    """End a roll-out with the new version gone; after a promotion, load the version before it."""
    return await _shown(request, ChangeRollOut(0, "rollback", name))


async def _shown(request: Request, wanted: ChangeRollOut) -> Response:
    answer = await ask_for_change(request, wanted)
    assert isinstance(answer, Shown)
    return Response(answer.content, media_type=answer.media_type)
