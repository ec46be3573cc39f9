"""Route that reloads the settings of a running server (scope `admin`)."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict

from service.http.authentication import needs
from service.http.errors import ApiError, errors_as
from service.http.responses import json_response
from service.http.schemas import ErrorResponse
from service.http.state import from_hub, state_of
from service.ipc.control_messages import ReloadSettings, SettingsRejected, SettingsReloaded

router = APIRouter(tags=["operations"], responses=errors_as(ErrorResponse))

STATUS = {"invalid_settings": 422, "not_supported": 501}


class ReloadResponse(BaseModel):
    """The result of a reload.

    Attributes:
        changed: settings that have changed.
        needs_restart: settings that differ, but are applied only after a restart.
        waiting_for: processes that have not applied the change yet; they apply it when they can.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"changed": ["log_level"], "needs_restart": ["port"], "waiting_for": ["frontend-2"]}
            ]
        }
    )

    changed: list[str]
    needs_restart: list[str]
    waiting_for: list[str]


@router.post(
    "/settings/reload",
    summary="Read the settings again",
    dependencies=[needs("admin")],
    response_model=ReloadResponse,
)
async def reload_settings(request: Request) -> Response:
    """Read the settings file and the certificates again, as SIGHUP does.

    Flags and environment variables take precedence over the file. The answer is sent when every
    process has applied the new settings, or after 5 s with the names of those that have not. If the
    file is invalid, nothing changes.
    """
    answer = await from_hub(state_of(request).hub.change(ReloadSettings(0)))
    if isinstance(answer, SettingsRejected):
        raise ApiError(STATUS[answer.reason], answer.message, code=answer.reason)
    assert isinstance(answer, SettingsReloaded)
    return json_response({name: getattr(answer, name) for name in ReloadResponse.model_fields})
