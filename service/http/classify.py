"""POST /classify, and the way from a request to its answers for all classification routes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response

from budgetformer.checkpoint.store import Checkpoint
from budgetformer.errors import PolicyError
from budgetformer.inference.texts import Texts
from budgetformer.model.tfidf import Array
from budgetformer.tokenization import Text, characters
from service.http import arrow_answer, infinity
from service.http.accept import ARROW, accepted, prefers_arrow
from service.http.answers import Answered
from service.http.authentication import needs
from service.http.bodies import describe_body, read_body, travelled
from service.http.classify_answer import classify_response
from service.http.direct import direct
from service.http.errors import CLASSIFYING, ApiError, ClientGoneError, errors_as
from service.http.kept_answers import look_up
from service.http.schemas import (
    ClassifyRequest,
    ClassifyResponse,
    ErrorResponse,
    InfinityResponse,
    Input,
)
from service.http.state import State, state_of, too_late
from service.ipc.answers import Answers
from service.ipc.engine_client import (
    DeadlineError,
    EngineDownError,
    EngineFailedError,
    NotLoadedError,
    RefusedError,
    Submission,
)
from service.pipeline.answer_cache import AnsweredTexts, Lookup
from service.pipeline.answering import Waiting, count_answers
from service.pipeline.served_models import ServedModel
from service.pipeline.shadow import AnsweredRequest, SkippedError
from service.settings import DEFAULT_QUALITY
from service.telemetry.stages import stage_span

router = APIRouter(
    tags=["classify"],
    dependencies=[needs("classify")],
    responses=errors_as(ErrorResponse, CLASSIFYING),
)

ALSO_ARROW: dict[int | str, dict[str, Any]] = {
    200: {"content": {ARROW: {"schema": {"type": "string", "format": "binary"}}}},
    406: {"model": ErrorResponse},
}
"""OpenAPI entries of routes that can answer with an Arrow stream."""

SHADOW_SECONDS = 30.0
"""Time limit for a candidate to compute a request for comparison."""


@router.post(
    "/classify",
    summary="Classify texts, each with the heads that it needs",
    response_model=ClassifyResponse | InfinityResponse,
    responses=ALSO_ARROW,
    openapi_extra=describe_body(ClassifyRequest),
)
@direct
async def classify(request: Request) -> Response:
    """Answer with labels, scores, and what they cost in heads and multiply-adds.

    A client whose Accept header prefers `application/vnd.apache.arrow.stream` to JSON gets columns.
    """
    body = await read_body(request, ClassifyRequest, state_of(request).settings.max_body_bytes)
    return await respond_to_classify(request, body)


async def respond_to_classify(request: Request, body: ClassifyRequest) -> Response:
    """Classify, and answer in our format (a superset of vLLM's), Arrow or Infinity's format.

    Raises:
        ApiError, ClientGoneError: as in `respond` and `arrow_answer.prepare`.
    """
    if prefers_arrow(accepted(request)):
        await arrow_answer.prepare(body)
        return await respond(request, body, partial(arrow_answer.arrow_response, request))
    if body.raw_scores is None:
        return await respond(request, body, partial(classify_response, request))
    if body.model == infinity.NO_MODEL:
        body.model = None
    return await respond(request, body, infinity.infinity_response)


async def respond(
    request: Request,
    body: ClassifyRequest,
    write: Callable[[Answered], Response],
    tokens: Texts | None = None,
) -> Response:
    """Classify the texts of a request; all classification routes call this.

    Args:
        request: request.
        body: texts and options.
        write: writes the response from the answers.
        tokens: tokens of the texts, valid for the model; None: the texts of `body` are tokenized.

    Raises:
        ApiError: see docs/api.md for all errors.
        ClientGoneError: the client closed the connection.
    """
    state = state_of(request)
    state.admission.refuse_if_draining()
    started = time.monotonic()
    texts: list[Text] | Texts
    if tokens is None:
        texts = check_texts(state, body.input)
    else:
        check_count(state, len(tokens))
        texts = tokens
    model = state.model(body.model, request.state.request_id)
    request.state.served = model.checkpoint
    size = travelled(request.scope["headers"])
    name, caller = model.checkpoint.name, request.state.caller
    seconds = _seconds(state, body, name)
    with model.in_use(), state.admission.texts(caller, name, len(texts), size, seconds):
        admitted = _Admitted(request, state, body, model, started + seconds)
        return await _respond(admitted, texts, write)


@dataclass(frozen=True)
class _Admitted:
    """An admitted request.

    Attributes:
        request, state, body: request, state of the frontend, and validated body.
        model: model that answers.
        deadline: deadline on the monotonic clock.
    """

    request: Request
    state: State
    body: ClassifyRequest
    model: ServedModel
    deadline: float

    def waiting(self) -> AbstractAsyncContextManager[None]:
        """Return a context for waiting, which is cancelled when the client disconnects."""
        return while_client_waits(self.request)


async def _respond(
    admitted: _Admitted, given: list[Text] | Texts, write: Callable[[Answered], Response]
) -> Response:
    started = time.monotonic()
    request, state, body, model = admitted.request, admitted.state, admitted.body, admitted.model
    quality = _quality(state, body, model)
    lookup = look_up(request, state, body, model, given, quality)
    if lookup is None:
        answered, seconds = await _compute(admitted, given, quality, range(len(given)))
    else:
        answered, seconds = await _complete(admitted, lookup)
    answers, lengths, truncated = answered.answers, answered.lengths, answered.truncated
    computed = time.monotonic()
    if answers.errors:
        checkpoint = model.checkpoint
        state.hub.counts.items_failed(checkpoint.name, checkpoint.version, len(answers.errors))
    # The response names the level that overload or `target_ms` chose, and otherwise the quality of
    # the request.
    default = body.target_ms is None and answers.quality == DEFAULT_QUALITY
    shown = quality if default else answers.quality
    response = write(
        Answered(request.state.request_id, model, body, shown, lengths, truncated, answers)
    )
    responded = time.monotonic()
    stages = {
        "tokenize": seconds,
        "budget": answers.budget_seconds,
        "queue": answers.queue_seconds,
        "compute": answers.compute_seconds,
    }
    hits = None if lookup is None or lookup.outcome == "miss" else lookup.hits
    count_answers(
        state.hub.counts, model.checkpoint, answers, lengths, int(truncated.sum()),
        heads=body.heads, max_heads=body.max_heads, hits=hits,
        stages=stages | {"respond": responded - computed},
    )  # fmt: skip
    stages["total"] = time.monotonic() - started
    if (candidate := state.models.shadow_of(model, request.state.request_id)) is not None:
        computed_all = lookup is None or lookup.outcome == "miss"
        served = AnsweredRequest(model.checkpoint, answers, computed_all)
        compute = partial(_compute_again, state, body, given, answers.quality)
        state.shadows.begin(candidate, served, compute)
    headers = response.headers
    headers.append("X-Quality", str(answers.quality))
    if lookup is not None:
        headers.append("X-Cache", lookup.outcome)
    timing = [f"{name};dur={seconds * 1000:.3f}" for name, seconds in stages.items()]
    headers.append("Server-Timing", ", ".join(timing))
    return response


async def _compute_again(
    state: State,
    body: ClassifyRequest,
    given: list[Text] | Texts,
    quality: str | float,
    model: ServedModel,
) -> Answers:
    """Return the answers of another version, computed in the bulk lane.

    Raises:
        SkippedError: there is no capacity, or the request has tokens instead of texts.
    """
    if isinstance(given, Texts):
        raise SkippedError("tokens may be those of another tokenizer")
    deadline = time.monotonic() + SHADOW_SECONDS
    texts, _ = await _tokenize(state, model, given, deadline, range(len(given)))
    name, version = model.checkpoint.name, model.checkpoint.version
    submission = Submission(
        name, version, texts, quality, deadline, body.heads, body.max_heads, bulk=True
    )
    try:
        return await state.answering.answer(submission, model, state.settings.floor_of(name))
    except (RefusedError, DeadlineError, NotLoadedError, EngineDownError) as error:
        raise SkippedError from error


async def _complete(admitted: _Admitted, lookup: Lookup) -> tuple[AnsweredTexts, float]:
    """Compute the texts that are not cached, and return the answers to all; see `_compute`."""
    if not admitted.body.truncate:
        _refuse_overlong(lookup.truncated, admitted.model, range(len(lookup.truncated)))
    if not lookup.misses:
        return lookup.complete(None), 0.0
    level = lookup.options.quality
    computed, seconds = await _compute(admitted, lookup.missing, level, lookup.misses)
    return lookup.complete(computed), seconds


async def _compute(
    admitted: _Admitted, given: list[Text] | Texts, quality: str | float, indices: Sequence[int]
) -> tuple[AnsweredTexts, float]:
    """Tokenize and answer texts; `indices` are their positions in the request.

    Returns the answers, and the duration of the tokenization in seconds.
    """
    started = time.monotonic()
    if isinstance(given, Texts):
        texts, truncated = given, np.zeros(len(given), bool)
    else:
        texts, truncated = await _tokenize(
            admitted.state, admitted.model, given, admitted.deadline, indices, admitted.waiting
        )
    if not admitted.body.truncate:
        _refuse_overlong(truncated, admitted.model, indices)
    seconds = time.monotonic() - started
    answers = await _answer(admitted, texts, quality)
    return AnsweredTexts(texts.window.lengths, truncated, answers), seconds


async def _tokenize(
    state: State,
    model: ServedModel,
    texts: list[Text],
    deadline: float,
    indices: Sequence[int],
    waiting: Waiting = nullcontext,
) -> tuple[Texts, Array]:
    """Return tokenized texts, and whether each has more tokens than the encoder reads, bool [B]."""
    with stage_span(state.tracer, "tokenize") as span:
        tokenized = await state.tokenize(model, texts, deadline, indices, waiting)
        if span.is_recording():
            span.set_attribute("budgetformer.items", len(tokenized))
            span.set_attribute("budgetformer.tokens", sum(map(len, tokenized)))
    truncated = np.fromiter((tokens.truncated for tokens in tokenized), bool, len(tokenized))
    return Texts.of(tokenized), truncated


async def _answer(admitted: _Admitted, texts: Texts, quality: str | float) -> Answers:
    """Return the answers to tokenized texts, and convert errors of engines to those of the API."""
    state, body, model = admitted.state, admitted.body, admitted.model
    submission = Submission(
        model=model.checkpoint.name,
        version=model.checkpoint.version,
        texts=texts,
        quality=quality,
        deadline=admitted.deadline,
        heads=body.heads,
        max_heads=body.max_heads,
        return_heads=body.return_heads,
        target=None if body.target_ms is None else body.target_ms / 1000,
    )
    try:
        return await state.answering.answer(
            submission, model, state.settings.floor_of(submission.model), admitted.waiting
        )
    except DeadlineError:
        raise too_late() from None
    except NotLoadedError:
        message = f"{submission.model} is still loading"
        raise ApiError(503, message, "model", "loading", retry_after=1) from None
    except EngineDownError:
        message = "no engine is running; it is being restarted"
        raise ApiError(503, message, code="engine_down", retry_after=1) from None
    except EngineFailedError as error:
        raise ApiError(503, str(error), code="engine_failed", retry_after=1) from None


def _seconds(state: State, body: ClassifyRequest, model: str) -> float:
    """Return the seconds to a request's deadline.

    Raises:
        ApiError: 422, `timeout_ms` or `target_ms` is above the server's limit.
    """
    limit = state.settings.max_timeout_ms
    for name in ("timeout_ms", "target_ms"):
        if (getattr(body, name) or 0) > limit:
            message = f"{name} may be at most {limit}, the server's max_timeout_ms"
            raise ApiError(422, message, name, "invalid_field")
    return (body.timeout_ms or state.settings.timeout_ms_of(model)) / 1000


def check_count(state: State, count: int) -> None:
    """Check the number of items of a request.

    Raises:
        ApiError: 413, there are too many items.
    """
    limit = state.settings.max_batch_items
    if count > limit:
        raise ApiError(413, f"{count} items, at most {limit} are taken", "input", "too_many_items")


def check_texts(state: State, given: Input) -> list[Text]:
    """Return the texts of a request, after a check of their number and lengths.

    Raises:
        ApiError: 413 too many items, 422 a text is too long.
    """
    items = given if isinstance(given, list) else [given]
    check_count(state, len(items))
    texts: list[Text] = [
        item
        if isinstance(item, str)
        else item.text
        if item.text_pair is None
        else (item.text, item.text_pair)
        for item in items
    ]
    limit = state.settings.max_text_characters
    for index, text in enumerate(texts):
        length = characters(text)
        if length > limit:
            message = f"input[{index}] has {length} characters, at most {limit} are taken"
            raise ApiError(422, message, f"input[{index}]", "text_too_long")
    return texts


def _quality(state: State, body: ClassifyRequest, model: ServedModel) -> str | float:
    if body.target_ms is not None and body.quality not in (None, "auto"):
        message = "target_ms lets the server choose a quality, so none can be named beside it"
        raise ApiError(422, message, "target_ms", "invalid_field")
    wanted = body.quality if body.target_ms is None else "auto"
    return quality_of(state, model.checkpoint, wanted, heads=body.heads, max_heads=body.max_heads)


def quality_of(
    state: State, checkpoint: Checkpoint, wanted: str | float | None, **heads: int | None
) -> str | float:
    """Return the quality for a request, after a check that the checkpoint offers it.

    Args:
        state: state of the frontend.
        checkpoint: checkpoint that answers.
        wanted: level or accuracy drop (percentage points); None: the default of the settings.
        heads: fields `heads` and `max_heads`.

    Raises:
        ApiError: 422, the checkpoint does not offer the quality or the number of heads.
    """
    quality = state.settings.quality_of(checkpoint.name) if wanted is None else wanted
    if not checkpoint.calibrated and wanted not in (None, "auto"):
        message = f"{checkpoint.label} is not calibrated: it has no quality levels"
        raise ApiError(422, message, "quality", "no_such_quality")
    try:
        named = DEFAULT_QUALITY if quality == "auto" else quality
        checkpoint.rule(named if checkpoint.calibrated else None)
    except PolicyError as error:
        raise ApiError(422, str(error), "quality", "no_such_quality") from None
    for name, value in heads.items():
        if value is not None:
            try:
                checkpoint.rule(None, **{name: value})
            except PolicyError as error:
                raise ApiError(422, str(error), name, "invalid_field") from None
    return quality


def _refuse_overlong(truncated: Array, model: ServedModel, indices: Sequence[int]) -> None:
    if truncated.any():
        index, limit = indices[int(truncated.argmax())], model.checkpoint.manifest.max_tokens
        message = f"input[{index}] has more than {limit} tokens, and truncate is false"
        raise ApiError(422, message, f"input[{index}]", "text_too_long")


@asynccontextmanager
async def while_client_waits(request: Request) -> AsyncIterator[None]:
    """Cancel the context when the client disconnects.

    Raises:
        ClientGoneError: the client has disconnected.
    """
    timeout = asyncio.timeout(None)
    watching = asyncio.ensure_future(_expire_on_disconnect(request, timeout))
    try:
        async with timeout:
            yield
    except TimeoutError:
        if not timeout.expired():
            raise
        raise ClientGoneError from None
    finally:
        watching.cancel()


async def _expire_on_disconnect(request: Request, timeout: asyncio.Timeout) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    timeout.reschedule(asyncio.get_running_loop().time())
