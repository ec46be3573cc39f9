"""Have engines answer the rows of a job in chunks, and retry until they do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from budgetformer.bulk.chunks import Answered, Chunk
from budgetformer.checkpoint.store import Checkpoint
from budgetformer.errors import BudgetFormerError, TokenizerError
from budgetformer.inference.texts import Texts
from budgetformer.tokenization import Text, Tokens, characters
from service.ipc.answers import UNPREDICTED, Answers
from service.ipc.engine_client import (
    DeadlineError,
    EngineDownError,
    EngineFailedError,
    NotLoadedError,
    RefusedError,
    Submission,
)
from service.ipc.hub_client import HubLink
from service.job_store import JobDescription
from service.pipeline.answering import Answering, count_answers
from service.pipeline.scores import activate, activation_of
from service.pipeline.served_models import Models, ServedModel, UnknownModelError
from service.settings import Settings

MAX_ROWS, MIN_ROWS = 64, 4
"""Largest and smallest number of rows in a chunk."""
QUEUE_SHARE = 0.25
"""Largest queue delay that one chunk may cause, as a share of `brownout_queue_ms`."""
DEADLINE_SECONDS = 600.0
FIRST_WAIT, LONGEST_WAIT = 0.1, 5.0
MAX_FAILURES = 5
"""Number of engine errors after which a chunk, and its job, fails."""


class JobFailedError(BudgetFormerError):
    """A job cannot continue."""


class ChunkAnswering:
    """Answer chunks of rows, at most one for each engine at a time.

    Args:
        models: served models.
        hub: connection to the hub, which names the loading models and receives counts.
        answering: answers texts.
        settings: returns the settings in force.

    Attributes:
        rows: number of rows for the next chunk. Engines answer so many in a short time, so a job
            does not fill their queues.
        at_once: number of chunks that engines compute at the same time.
        waiting_for: reason why a chunk cannot be answered at present; None: there is none.
    """

    def __init__(
        self,
        models: Models,
        hub: HubLink,
        answering: Answering,
        settings: Callable[[], Settings],
    ) -> None:
        self.rows = MIN_ROWS
        self.waiting_for: str | None = None
        self.at_once = len(answering.engines.clients)
        self._models = models
        self._hub = hub
        self._answering = answering
        self._settings = settings
        self._room = asyncio.Semaphore(self.at_once)

    def model(self, label: str) -> ServedModel:
        """Return a served model version.

        Raises:
            NotLoadedError: it is being loaded.
            JobFailedError: it is no longer served.
        """
        try:
            return self._models.get(label)
        except UnknownModelError as error:
            if label in self._hub.catalog.loading:
                raise NotLoadedError from None
            message = f"{label}, for which the job was accepted, is not served: {error}"
            raise JobFailedError(message) from None

    async def checkpoint(self, label: str) -> Checkpoint:
        """Return the checkpoint of a model version; wait until it is served.

        Raises:
            JobFailedError: it is no longer served.
        """
        while True:
            try:
                return self.model(label).checkpoint
            except NotLoadedError:
                self.waiting_for = f"{label} is still loading"
                await asyncio.sleep(FIRST_WAIT)

    async def answer(self, job: JobDescription, chunk: Chunk) -> Answered:
        """Return the answers to a chunk; wait while engines cannot answer.

        Raises:
            JobFailedError: the model is no longer served, or engines failed repeatedly.
        """
        wait, failures = FIRST_WAIT, 0
        while True:
            try:
                model = self.model(job.model)
                with model.in_use():
                    answered = await self._answer(model, job, chunk)
                self.waiting_for = None
                return answered
            except NotLoadedError:
                self.waiting_for = f"{job.model} is still loading"
            except EngineDownError:
                self.waiting_for = "no engine is running"
            except (RefusedError, DeadlineError):
                self.waiting_for = "the queues of the engines are full"
            except EngineFailedError as error:
                failures += 1
                if failures >= MAX_FAILURES:
                    raise JobFailedError(f"the engines fail: {error}") from error
                self.waiting_for = str(error)
            await asyncio.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT)

    async def _answer(self, model: ServedModel, job: JobDescription, chunk: Chunk) -> Answered:
        errors: dict[int, str] = {}
        texts = self._texts(chunk, errors)
        tokens = await asyncio.to_thread(_tokenize, model, texts, errors)
        rows: list[dict[str, Any]] = [
            row | {"error": errors.get(index)} for index, row in enumerate(chunk.rows())
        ]
        if tokens:
            answers = await self._ask(model, job, list(tokens.values()))
            for index, columns in zip(tokens, _columns(model, answers), strict=True):
                read = {"tokens": len(tokens[index]), "truncated": tokens[index].truncated}
                rows[index] |= columns if "error" in columns else columns | read
            self._count(model, job, tokens, answers)
        if errors:
            name, version = model.checkpoint.name, model.checkpoint.version
            self._hub.counts.items_failed(name, version, len(errors))
        self._hub.counts.job_rows_answered(job.owner, len(rows))
        return Answered.of(rows)

    def _texts(self, chunk: Chunk, errors: dict[int, str]) -> dict[int, Text]:
        """Return the texts (or pairs) of a chunk by row; add an error for each that is too long."""
        pairs = chunk.pairs
        texts: list[Text] = (
            [*chunk.texts] if pairs is None else [*zip(chunk.texts, pairs, strict=True)]
        )
        limit = self._settings().max_text_characters
        for index, text in enumerate(texts):
            if characters(text) > limit:
                errors[index] = f"{characters(text)} characters, at most {limit} are taken"
        return {index: text for index, text in enumerate(texts) if index not in errors}

    async def _ask(self, model: ServedModel, job: JobDescription, tokens: list[Tokens]) -> Answers:
        checkpoint, settings = model.checkpoint, self._settings()
        async with self._room:
            started = time.monotonic()
            submission = Submission(
                model=checkpoint.name,
                version=checkpoint.version,
                texts=Texts.of(tokens),
                quality="auto" if job.quality is None else job.quality,
                deadline=started + DEADLINE_SECONDS,
                heads=job.heads,
                bulk=True,
            )
            answers = await self._answering.answer(
                submission, model, settings.floor_of(checkpoint.name)
            )
            seconds = max(time.monotonic() - started, 1e-3)
        fitting = len(tokens) / seconds * QUEUE_SHARE * settings.brownout_queue_ms / 1000
        self.rows = min(max((self.rows + round(fitting)) // 2, MIN_ROWS), MAX_ROWS)
        return answers

    def _count(
        self, model: ServedModel, job: JobDescription, tokens: dict[int, Tokens], answers: Answers
    ) -> None:
        checkpoint, counts = model.checkpoint, self._hub.counts
        if answers.errors:
            counts.items_failed(checkpoint.name, checkpoint.version, len(answers.errors))
        lengths = np.array([len(text) for text in tokens.values()], np.int32)
        truncated = sum(text.truncated for text in tokens.values())
        count_answers(counts, checkpoint, answers, lengths, truncated, heads=job.heads)


def _tokenize(
    model: ServedModel, texts: dict[int, Text], errors: dict[int, str]
) -> dict[int, Tokens]:
    """Return the tokens of texts by row; add an error for each that the tokenizer rejects."""
    remaining = dict(texts)
    while remaining:
        indices = list(remaining)
        try:
            return dict(zip(indices, model.encoder.encode(list(remaining.values())), strict=True))
        except TokenizerError as error:
            index = indices[error.place or 0]
            errors[index] = f"the tokenizer of {model.checkpoint.label} failed at this text"
            del remaining[index]
    return {}


def _columns(model: ServedModel, answers: Answers) -> list[dict[str, Any]]:
    """Return the output columns of each text, as `budgetformer classify` writes them."""
    checkpoint = model.checkpoint
    probs = activate(answers.logits, activation_of(checkpoint))
    best, labels = probs.argmax(-1).tolist(), checkpoint.manifest.labels
    rows: list[dict[str, Any]] = []
    for index, (scores, label, step, predicted, steps, heads, macs, dense) in enumerate(
        zip(
            probs.tolist(), best, answers.step.tolist(), answers.predicted.tolist(),
            answers.all_steps(), answers.heads.tolist(), answers.macs.tolist(),
            answers.dense_macs.tolist(), strict=True,
        )
    ):  # fmt: skip
        if index in answers.errors:
            rows.append({"error": answers.errors[index]})
            continue
        rows.append(
            {
                "label": labels[label],
                "score": scores[label],
                "probs": scores,
                "budget": step,
                "predicted": None if predicted == UNPREDICTED else predicted,
                "steps": steps,
                "heads": heads,
                "macs": macs,
                "dense_macs": dense,
            }
        )
    return rows
