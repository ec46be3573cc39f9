"""Routes of models: list, describe, load, unload, tokenize."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import ConfigDict, Field

from budgetformer.checkpoint.manifest import MAX_VERSION
from budgetformer.checkpoint.store import Checkpoint
from service.http.authentication import needs
from service.http.bodies import describe_body, read_body, travelled
from service.http.classify import check_texts, while_client_waits
from service.http.errors import ApiError, errors_as
from service.http.responses import json_response
from service.http.schemas import ErrorResponse, RequestBody, TokenizeRequest, TokenizeResponse
from service.http.state import from_hub, state_of
from service.ipc.control_messages import (
    ChangeFailed,
    ChangeModel,
    ChangeRollOut,
    FromHub,
    ModelChanged,
)
from service.pipeline.served_models import Candidate

router = APIRouter(tags=["models"], responses=errors_as(ErrorResponse))

MAX_LOAD_BYTES = 4096
CHANGE_STATUS = {
    "unknown_model": 404,
    "broken_checkpoint": 422,
    "engine_down": 503,
    "load_timeout": 504,
    "busy": 503,
    "conflict": 409,
    "already_served": 422,
    "state_not_kept": 503,
}


class LoadRequest(RequestBody):
    """Body of a load: the version, by default the highest."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"version": 1}]})

    version: Annotated[int, Field(ge=1, le=MAX_VERSION)] | None = None


@router.get("/v1/models", summary="Models that are served", dependencies=[needs("classify")])
async def list_models(request: Request) -> Response:
    """List the served models, as OpenAI's API does; `default` is used for requests without a model.

    `candidate` is the version that is being rolled out beside `version`, or null.
    """
    state = state_of(request)
    data = [
        {
            "id": name,
            "object": "model",
            "owned_by": "budgetformer",
            "version": served.checkpoint.version,
            "default": name == state.models.default,
            "candidate": _candidate(state.models.candidates.get(name)),
        }
        for name, served in sorted(state.models.served.items())
    ]
    return json_response({"object": "list", "data": data})


@router.get("/models/{name}", summary="One model's card", dependencies=[needs("classify")])
async def show_model(request: Request, name: str) -> Response:
    """Show labels, sizes, versions, the chain of steps, and each level's quality and cost.

    `measure` says what a level was calibrated for: `accuracy`, the share of right answers, or
    `agreement`, the share of answers equal to the full network's. `chain`, `entry` (f_o's bands)
    and `exit_margin` (how far step 0's confidence must exceed a level's threshold) are null for
    checkpoints whose levels have rules of their own.
    """
    state = state_of(request)
    checkpoint = state.model(name).checkpoint
    key = (checkpoint.name, checkpoint.version)
    versions = await asyncio.to_thread(state.models.versions, checkpoint.name)
    return json_response(
        _card(checkpoint) | {"versions": versions, "ready": key in state.engines.models}
    )


@router.post(
    "/models/{name}/load",
    summary="Load a version and serve it",
    dependencies=[needs("admin")],
    openapi_extra=describe_body(LoadRequest, required=False),
)
async def load_model(request: Request, name: str) -> Response:
    """Verify, load and warm up a version in every engine, then serve it.

    If an engine fails, nothing changes.
    """
    body = await read_body(request, LoadRequest, MAX_LOAD_BYTES, default=LoadRequest())
    label = await load(request, name, body.version)
    return json_response({"model": label, "status": "loaded"})


async def load(request: Request, name: str, version: int | None) -> str:
    """Load a version (None: the highest) and serve it; the version before is freed.

    Returns:
        The version that is served now, as `name:version`.

    Raises:
        ApiError: 404 the store has no such version, 422 it is damaged, 503 no engine is running or
            too many changes wait, 504 the load takes too long.
    """
    return await _change(request, ChangeModel(0, "load", name, version))


async def unload(request: Request, name: str) -> str:
    """Stop serving a model, and free it after its requests in progress.

    Returns:
        The version that was served, as `name:version`.

    Raises:
        ApiError: 404 the model is not served.
    """
    return await _change(request, ChangeModel(0, "unload", name))


async def _change(request: Request, wanted: ChangeModel) -> str:
    answer = await request_change(request, wanted)
    assert isinstance(answer, ModelChanged)
    return answer.label


async def request_change(request: Request, wanted: ChangeModel | ChangeRollOut) -> FromHub:
    """Have the hub make a change of the served models, and return its answer.

    Raises:
        ApiError: the change failed, see `CHANGE_STATUS`.
    """
    answer = await from_hub(state_of(request).hub.change(wanted))
    if isinstance(answer, ChangeFailed):
        status = CHANGE_STATUS[answer.reason]
        param, retry_after = (None, 1) if status == 503 else ("model", None)
        raise ApiError(status, answer.message, param, answer.reason, retry_after)
    return answer


@router.post("/models/{name}/unload", summary="Stop serving a model", dependencies=[needs("admin")])
async def unload_model(request: Request, name: str) -> Response:
    """Stop serving a model; requests in progress are answered, then its memory is freed."""
    label = await unload(request, name)
    return json_response({"model": label, "status": "unloaded"})


@router.post(
    "/tokenize",
    summary="Tokens of a text",
    dependencies=[needs("classify")],
    response_model=TokenizeResponse,
    openapi_extra=describe_body(TokenizeRequest),
)
async def tokenize(request: Request) -> Response:
    """Return the tokens that a model's encoder would read, and their number."""
    state = state_of(request)
    body = await read_body(request, TokenizeRequest, state.settings.max_body_bytes)
    texts = check_texts(state, body.input)
    model = state.model(body.model)
    name, size = model.checkpoint.name, travelled(request.scope["headers"])
    seconds = state.settings.timeout_ms_of(name) / 1000
    deadline = time.monotonic() + seconds
    with (
        model.in_use(),
        state.admission.texts(request.state.caller, name, len(texts), size, seconds),
    ):
        waiting = partial(while_client_waits, request)
        tokenized = await state.tokenize(model, texts, deadline, waiting=waiting)
    data = [
        {
            "index": index,
            "tokens": model.encoder.words(tokens.ids),
            "ids": tokens.ids,
            "count": len(tokens),
            "truncated": tokens.truncated,
        }
        for index, tokens in enumerate(tokenized)
    ]
    return json_response({"model": model.checkpoint.label, "data": data})


def _candidate(candidate: Candidate | None) -> dict[str, Any] | None:
    """Return the version that is being rolled out as JSON; None: there is none."""
    if candidate is None:
        return None
    version = candidate.model.checkpoint.version
    return {"version": version, "weight": candidate.weight, "shadow": candidate.shadow}


def _card(checkpoint: Checkpoint) -> dict[str, Any]:
    manifest = checkpoint.manifest
    return {
        "name": checkpoint.name,
        "version": checkpoint.version,
        "labels": manifest.labels,
        "problem_type": manifest.problem_type,
        "max_tokens": manifest.max_tokens,
        "exit_tokens": manifest.whole_tokens,
        "layers": checkpoint.num_layers,
        "heads_per_layer": checkpoint.num_heads,
        "hidden_size": checkpoint.config["hidden_size"],
        "ladder": checkpoint.ladder,
        "step_0": checkpoint.has_exit,
        "quality_levels": {
            name: level.model_dump(mode="json", exclude={"name"})
            for name, level in manifest.named_levels.items()
        },
        "measure": manifest.measure,
        "chain": manifest.policy and manifest.policy.chain,
        "exit_margin": manifest.policy and manifest.policy.exit_margin,
        "entry": manifest.policy and [band.model_dump() for band in manifest.policy.entry],
        "operating_points": [level.model_dump(mode="json") for level in manifest.levels],
        "frontier": [step.model_dump(mode="json") for step in manifest.frontier],
        "metrics": manifest.metrics,
        "provenance": manifest.provenance.model_dump(mode="json"),
    }
