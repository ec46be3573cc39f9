"""Routes of jobs: files of texts that are classified in the background, after all requests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from importlib.util import find_spec
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote

import msgspec
from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse
from pydantic import BaseModel, ConfigDict

from service.http.authentication import needs
from service.http.bodies import read_body, validate
from service.http.classify import quality_of
from service.http.errors import ApiError, ClientGoneError, errors_as
from service.http.responses import json_response
from service.http.schemas import ErrorResponse, JobOptions, JobRequest
from service.http.state import State, state_of
from service.ipc.control_messages import ProblemReport
from service.job_store import (
    JobDescription,
    JobProgress,
    Kind,
    Status,
    StoredJob,
    StoreFullError,
    Upload,
    new_id,
)
from service.settings import DEFAULT_QUALITY
from service.source_urls import is_allowed, without_query

router = APIRouter(
    tags=["jobs"],
    dependencies=[needs("jobs")],
    responses=errors_as(ErrorResponse, (401, 403, 404, 501, 503)),
)

PATH = "/jobs"
KINDS: dict[str, Kind] = {
    "text/csv": "csv",
    "application/x-ndjson": "jsonl",
    "application/jsonl": "jsonl",
    "application/vnd.apache.parquet": "parquet",
}
"""File format of uploads by media type."""
MEDIA_TYPES: dict[Kind, str] = {
    "csv": "text/csv; charset=utf-8",
    "jsonl": "application/x-ndjson",
    "parquet": "application/vnd.apache.parquet",
}
SUFFIXES: dict[str, Kind] = {
    ".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet",
}  # fmt: skip
MIN_BYTES_PER_SECOND = 100_000
"""Minimum average rate of an upload, after the first `receive_seconds`."""
WRITE_BYTES, CHECK_BYTES = 2**20, 2**26
"""Bytes of an upload between writes to the disk, and between checks of `max_jobs_bytes`."""
FULL_SECONDS = 60


class JobResponse(BaseModel):
    """A job.

    Attributes:
        id: id of the job.
        status: queued, running, finished, failed, or cancelled (by this request).
        model: `name:version`, chosen when the job was accepted.
        quality: quality level or accuracy drop (percentage points); null: the model has no levels.
        heads: fixed number of heads per layer; null: f_o decides.
        input, format: file formats of the input and of the result.
        source: URL of the input; null: it was uploaded.
        created, started, ended: times in seconds since 1970.
        rows, failed_rows: number of answered rows, and of those that failed.
        read_share: share of the input that was read, 0..1.
        rows_per_second, seconds_left: rate since the last start, and remaining time at this rate.
        labels: number of rows by label.
        mean_heads: mean number of computed heads per row, summed over layers.
        macs_share: computed multiply-adds as a share of the dense network's.
        waiting_for: reason why the job cannot continue now; null: it can.
        error: reason why the job failed; null: it did not.
    """

    model_config = ConfigDict(protected_namespaces=())

    id: str
    object: str = "job"
    status: Status
    model: str
    quality: str | float | None
    heads: int | None
    input: Kind
    format: Kind
    source: str | None
    created: float
    started: float | None
    ended: float | None
    rows: int
    failed_rows: int
    read_share: float
    rows_per_second: float
    seconds_left: float | None
    labels: dict[str, int]
    mean_heads: float
    macs_share: float
    waiting_for: str | None
    error: str | None


class JobList(BaseModel):
    """Jobs, newest first."""

    object: str = "list"
    data: list[JobResponse]


_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": {"$ref": "#/components/schemas/JobRequest"}},
            **{
                kind: {"schema": {"type": "string", "format": "binary", "minLength": 1}}
                for kind in KINDS
            },
        },
    },
    "parameters": [
        {"name": name, "in": "query", "schema": {"type": kind}}
        for name, kind in (
            ("model", "string"), ("quality", "string"), ("heads", "integer"), ("format", "string"),
        )
    ],
}  # fmt: skip


@router.post(
    PATH,
    summary="Classify a file in the background",
    status_code=202,
    response_model=JobResponse,
    responses=errors_as(ErrorResponse, (400, 408, 413, 415, 422, 429)),
    openapi_extra=_BODY,
)
async def submit(request: Request) -> Response:
    """Accept a file of texts as the body, or its URL in a JSON body.

    A file is CSV, JSONL or Parquet with a column `text` and optionally `text_pair`; its options are
    query parameters. The answer is sent when the file is stored.
    """
    state = state_of(request)
    if state.settings.cluster:
        message = "jobs are not supported on a Ray cluster; send the texts to /classify"
        raise ApiError(501, message, code="not_supported")
    state.admission.refuse_if_draining()
    options: JobOptions
    source: str | None = None
    if _media_type(request) == "application/json":
        options = body = await read_body(request, JobRequest, state.settings.max_body_bytes)
        source, kind = body.source, _kind_of_source(state, body.source)
    else:
        kind = _kind(request)
        options = validate(_query(request), JobOptions)
    description = _describe(request, state, options, kind, source)
    size = 0 if source else _declared(request, state.settings.max_job_bytes)
    async with _storing(state, description, size) as upload:
        if source is None:
            await _receive(request, state, upload)
        job = await asyncio.to_thread(upload.accept, description)
    location = f"{request.scope.get('root_path', '')}{PATH}/{description.id}"
    return json_response(_job_response(job, JobProgress()), 202, {"Location": location})


@router.get(PATH, summary="Jobs", response_model=JobList)
async def list_jobs(request: Request) -> Response:
    """List the caller's jobs, newest first; all jobs, for a key with the scope `admin`."""
    jobs = await asyncio.to_thread(state_of(request).jobs.jobs)
    own = [job for job in jobs if _may_see(request, job)]
    data = await asyncio.to_thread(lambda: [_job_response(job, job.progress()) for job in own])
    return json_response({"object": "list", "data": data})


@router.get(PATH + "/{job}", summary="One job", response_model=JobResponse)
async def show_job(request: Request, job: str) -> Response:
    """Return the state and progress of a job."""
    found = await _find(request, job)
    return json_response(_job_response(found, await asyncio.to_thread(found.progress)))


@router.get(
    PATH + "/{job}/result",
    summary="The result of a job",
    response_class=FileResponse,
    responses=errors_as(ErrorResponse, (409,)),
)
async def job_result(request: Request, job: str) -> Response:
    """Return the file with the answers, in the order of the input; 409 until it is complete."""
    found = await _find(request, job)
    progress = await asyncio.to_thread(found.progress)
    if progress.status != "finished":
        message = f"the job is {progress.status}; it has a result once it is finished"
        if progress.error:
            message = f"the job failed, so it has no result: {progress.error}"
        raise ApiError(409, message, code="no_result")
    kind = found.description.result_kind
    return FileResponse(
        found.result, media_type=MEDIA_TYPES[kind], filename=f"{found.description.id}.{kind}"
    )


@router.delete(PATH + "/{job}", summary="Cancel or remove a job", response_model=JobResponse)
async def remove_job(request: Request, job: str) -> Response:
    """Remove a job and its files; a job that has not ended is cancelled."""
    state = state_of(request)
    found = await _find(request, job)
    progress = await asyncio.to_thread(found.progress)
    with _reported(state):
        await asyncio.to_thread(state.jobs.remove, found)
    if progress.unfinished:
        progress = msgspec.structs.replace(progress, status="cancelled", seconds_left=None)
    return json_response(_job_response(found, progress))


def _media_type(request: Request) -> str:
    given = request.headers.get("content-type", "")
    return given.partition(";")[0].strip().lower()


def _kind(request: Request) -> Kind:
    kind = KINDS.get(_media_type(request))
    if kind is None or request.headers.get("content-encoding", "identity").lower() != "identity":
        known = ", ".join((*KINDS, "application/json"))
        message = f"the body must be uncompressed, with one of the content types {known}"
        raise ApiError(415, message, code="unsupported_media_type")
    return kind


def _query(request: Request) -> dict[str, Any]:
    """Return the query parameters, with `heads` and `quality` as numbers if they are numbers."""
    given: dict[str, Any] = dict(request.query_params)
    for name, number in (("heads", int), ("quality", float)):
        try:
            given[name] = number(given[name])
        except (KeyError, ValueError):
            continue  # missing, a quality level, or invalid, which `validate` reports
    return given


def _kind_of_source(state: State, url: str) -> Kind:
    """Return the file format of the file at a URL, after a check that jobs may read it."""
    try:
        allowed = is_allowed(url, state.settings.job_sources)
    except ValueError as error:
        raise ApiError(422, str(error), "source", "invalid_field") from None
    if not allowed:
        message = (
            "the server's setting job_sources does not allow this URL; upload the file instead"
        )
        raise ApiError(422, message, "source", "source_not_allowed")
    kind = SUFFIXES.get(PurePosixPath(unquote(without_query(url))).suffix.lower())
    if kind is None:
        message = f"the file name in source must end in {', '.join(SUFFIXES)}"
        raise ApiError(422, message, "source", "invalid_field")
    return kind


def _describe(
    request: Request, state: State, options: JobOptions, kind: Kind, source: str | None
) -> JobDescription:
    """Return the description of a new job, after a check of its options.

    Raises:
        ApiError: 404, the model is unknown; 422, it does not offer the quality or heads; 415,
            pyarrow is missing.
    """
    checkpoint = state.model(options.model).checkpoint
    quality = quality_of(state, checkpoint, options.quality, heads=options.heads)
    result = options.format or kind
    if "parquet" in (kind, result) and find_spec("pyarrow") is None:
        message = (
            "Parquet needs pyarrow on the server (pip install 'budgetformer-serving[parquet]'); "
            "use CSV or JSONL"
        )
        raise ApiError(415, message, code="unsupported_media_type")
    # A job has no deadline, so overload does not lower its quality.
    level = DEFAULT_QUALITY if quality == "auto" else quality
    return JobDescription(
        id=new_id(),
        owner=request.state.caller.name,
        created=time.time(),
        model=checkpoint.label,
        quality=level if checkpoint.calibrated else None,
        heads=options.heads,
        kind=kind,
        result_kind=result,
        source=source,
    )


def _declared(request: Request, limit: int) -> int:
    """Return the Content-Length of the body; 0: it has none.

    Raises:
        ApiError: 413, the body is too large.
    """
    declared = request.headers.get("content-length", "")
    size = int(declared) if declared.isdecimal() else 0
    if size > limit:
        raise _too_large(limit)
    return size


def _too_large(limit: int) -> ApiError:
    message = f"the file is larger than {limit} bytes, the server's max_job_bytes; split it"
    return ApiError(413, message, code="body_too_large")


@asynccontextmanager
async def _storing(state: State, description: JobDescription, size: int) -> AsyncIterator[Upload]:
    """Open an upload, which is removed when the context closes, unless it was accepted.

    Raises:
        ApiError: 429, the limit of jobs is reached; 503, the folder cannot be written.
    """
    settings = state.settings
    with _reported(state):
        limits = settings.max_jobs, settings.max_jobs_bytes, size
        await asyncio.to_thread(state.jobs.check_room, *limits)
        upload = await asyncio.to_thread(state.jobs.receive, description.id, description.kind)
        try:
            yield upload
        finally:
            upload.close()


async def _receive(request: Request, state: State, upload: Upload) -> None:
    """Write the body to the disk while it is received.

    Raises:
        ApiError: 400 the body is empty, 408 it is sent too slowly, 413 it is too large.
        StoreFullError, OSError: the limit of the store is reached, or the disk is full.
        ClientGoneError: the client closed its connection.
    """
    settings, loop = state.settings, asyncio.get_running_loop()
    started, size, checked = loop.time(), 0, 0
    held, more = bytearray(), True
    while more:
        until = started + settings.receive_seconds + size / MIN_BYTES_PER_SECOND
        try:
            async with asyncio.timeout_at(until):
                part = await request.receive()
        except TimeoutError:
            message = (
                f"the upload is slower than {MIN_BYTES_PER_SECOND} bytes per second; send it faster"
            )
            raise ApiError(408, message, code="request_timeout") from None
        if part["type"] == "http.disconnect":
            raise ClientGoneError
        held += part.get("body", b"")
        size += len(part.get("body", b""))
        more = part.get("more_body", False)
        if size > settings.max_job_bytes:
            raise _too_large(settings.max_job_bytes)
        if len(held) >= WRITE_BYTES or not more:
            await asyncio.to_thread(upload.write, bytes(held))
            held.clear()
        if size - checked >= CHECK_BYTES:
            checked = size
            await asyncio.to_thread(state.jobs.check_bytes, settings.max_jobs_bytes)
    if not size:
        raise ApiError(400, "the body is empty; send the file as the body", code="invalid_shape")


@contextmanager
def _reported(state: State) -> Iterator[None]:
    """Convert errors of the store to errors of the API, and report them to `/health`.

    Raises:
        ApiError: 429, the limit of jobs is reached; 503, the folder cannot be written.
    """
    try:
        yield
    except StoreFullError as error:
        raise ApiError(429, str(error), code="too_many_jobs", retry_after=FULL_SECONDS) from None
    except OSError as error:
        reason = error.strerror or type(error).__name__
        state.hub.send(
            ProblemReport("storing jobs", f"{state.jobs.folder} cannot be written: {reason}")
        )
        message = f"the server cannot store jobs: {reason}; try again later"
        raise ApiError(503, message, code="jobs_unavailable", retry_after=FULL_SECONDS) from None
    state.hub.send(ProblemReport("storing jobs", None))


async def _find(request: Request, job_id: str) -> StoredJob:
    """Return a job of the caller.

    Raises:
        ApiError: 404, there is no job with this id, or it belongs to another key.
    """
    job = await asyncio.to_thread(state_of(request).jobs.get, job_id)
    if job is None or not _may_see(request, job):
        raise ApiError(404, "there is no such job; GET /jobs lists your jobs", "job", "unknown_job")
    return job


def _may_see(request: Request, job: StoredJob) -> bool:
    caller = request.state.caller
    return caller.name == job.description.owner or "admin" in caller.scopes


def _job_response(job: StoredJob, progress: JobProgress) -> dict[str, Any]:
    """Return a job as plain data of `JobResponse`."""
    described = job.description
    source = described.source and without_query(described.source)
    shown = {
        "id": described.id, "object": "job", "status": progress.status, "model": described.model,
        "quality": described.quality, "heads": described.heads, "input": described.kind,
        "format": described.result_kind, "source": source, "created": described.created,
    }  # fmt: skip
    return shown | {
        name: value
        for name, value in msgspec.structs.asdict(progress).items()
        if name not in ("status", "starts")
    }
