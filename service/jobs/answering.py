"""The answers of the server's engines to chunks of rows, however long these take to come."""

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
"""Rows of a chunk."""
QUEUE_SHARE = 0.25
"""Share of the queue delay that begins a brown-out which one chunk may take in an engine."""
DEADLINE_SECONDS = 600.0
FIRST_WAIT, LONGEST_WAIT = 0.1, 5.0
MAX_FAILURES = 5
"""Errors of engines in a row after which a chunk is given up."""


class JobFailedError(BudgetFormerError):
    """A job cannot go on."""


class ChunkAnswering:
    """Answer chunks of rows, of which there is at most one for each engine at a time.

    Args:
        models: that are served.
        hub: says what is loading, and counts.
        answering: of texts.
        settings: returns those in force.

    Attributes:
        rows: of the next chunk: as many as engines answer in a short time, so that a job never
            makes a queue.
        at_once: chunks that engines compute at a time.
        waiting_for: what keeps a chunk from being answered; None: nothing does.
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
        """Return a model version that is served.

        Raises:
            NotLoadedError: it may be served soon.
            JobFailedError: it is not served any more.
        """
        try:
            return self._models.get(label)
        except UnknownModelError as error:
            if label in self._hub.serving.loading:
                raise NotLoadedError from None
            message = f"{label}, for which the job was accepted, is not served: {error}"
            raise JobFailedError(message) from None

    async def checkpoint(self, label: str) -> Checkpoint:
        """Return the checkpoint of a model version, once it is served.

        Raises:
            JobFailedError: it is not served any more.
        """
        while True:
            try:
                return self.model(label).checkpoint
            except NotLoadedError:
                self.waiting_for = f"{label} is still loading"
                await asyncio.sleep(FIRST_WAIT)

    async def answer(self, asked: JobDescription, chunk: Chunk) -> Answered:
        """Return the answers to a chunk; while engines cannot answer, wait.

        Raises:
            JobFailedError: its model is not served any more, or engines fail at it.
        """
        wait, failures = FIRST_WAIT, 0
        while True:
            try:
                model = self.model(asked.model)
                with model.in_use():
                    answered = await self._answer(model, asked, chunk)
                self.waiting_for = None
                return answered
            except NotLoadedError:
                self.waiting_for = f"{asked.model} is still loading"
            except EngineDownError:
                self.waiting_for = "no engine is running"
            except (RefusedError, DeadlineError):
                self.waiting_for = "the engines have no room"
            except EngineFailedError as error:
                failures += 1
                if failures >= MAX_FAILURES:
                    raise JobFailedError(f"the engines fail: {error}") from error
                self.waiting_for = str(error)
            await asyncio.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT)

    async def _answer(self, model: ServedModel, asked: JobDescription, chunk: Chunk) -> Answered:
        errors: dict[int, str] = {}
        texts = self._texts(chunk, errors)
        tokens = await asyncio.to_thread(_tokenize, model, texts, errors)
        rows: list[dict[str, Any]] = [
            row | {"error": errors.get(place)} for place, row in enumerate(chunk.rows())
        ]
        if tokens:
            answers = await self._ask(model, asked, list(tokens.values()))
            for place, columns in zip(tokens, _columns(model, answers), strict=True):
                read = {"tokens": len(tokens[place]), "truncated": tokens[place].truncated}
                rows[place] |= columns if "error" in columns else columns | read
            self._count(model, asked, tokens, answers)
        if errors:
            name, version = model.checkpoint.name, model.checkpoint.version
            self._hub.counts.items_failed(name, version, len(errors))
        self._hub.counts.job_rows_answered(asked.owner, len(rows))
        return Answered.of(rows)

    def _texts(self, chunk: Chunk, errors: dict[int, str]) -> dict[int, Text]:
        """Return the texts of a chunk by place, without those that are too long for any request."""
        pairs = chunk.pairs
        both: list[Text] = (
            [*chunk.texts] if pairs is None else [*zip(chunk.texts, pairs, strict=True)]
        )
        most = self._settings().max_text_characters
        for place, text in enumerate(both):
            if characters(text) > most:
                errors[place] = f"{characters(text)} characters, at most {most} are taken"
        return {place: text for place, text in enumerate(both) if place not in errors}

    async def _ask(
        self, model: ServedModel, asked: JobDescription, tokens: list[Tokens]
    ) -> Answers:
        checkpoint, settings = model.checkpoint, self._settings()
        async with self._room:
            started = time.monotonic()
            submission = Submission(
                model=checkpoint.name,
                version=checkpoint.version,
                texts=Texts.of(tokens),
                quality="auto" if asked.quality is None else asked.quality,
                deadline=started + DEADLINE_SECONDS,
                heads=asked.heads,
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
        self, model: ServedModel, asked: JobDescription, tokens: dict[int, Tokens], answers: Answers
    ) -> None:
        checkpoint, counts = model.checkpoint, self._hub.counts
        if answers.errors:
            counts.items_failed(checkpoint.name, checkpoint.version, len(answers.errors))
        lengths = np.array([len(one) for one in tokens.values()], np.int32)
        truncated = sum(one.truncated for one in tokens.values())
        count_answers(counts, checkpoint, answers, lengths, truncated, heads=asked.heads)


def _tokenize(
    model: ServedModel, texts: dict[int, Text], errors: dict[int, str]
) -> dict[int, Tokens]:
    """Return the tokens of texts by place; those at which the tokenizer fails get an error."""
    left = dict(texts)
    while left:
        places = list(left)
        try:
            return dict(zip(places, model.encoder.encode(list(left.values())), strict=True))
        except TokenizerError as error:
            place = places[error.place or 0]
            errors[place] = f"the tokenizer of {model.checkpoint.label} fails at it"
            del left[place]
    return {}


def _columns(model: ServedModel, answers: Answers) -> list[dict[str, Any]]:
    """Return the columns of each text, as `budgetformer classify` writes them."""
    checkpoint = model.checkpoint
    probs = activate(answers.logits, activation_of(checkpoint))
    best, labels = probs.argmax(-1).tolist(), checkpoint.manifest.labels
    rows: list[dict[str, Any]] = []
    for place, (scores, label, step, predicted, steps, heads, macs, dense) in enumerate(
        zip(
            probs.tolist(), best, answers.step.tolist(), answers.predicted.tolist(),
            answers.all_steps(), answers.heads.tolist(), answers.macs.tolist(),
            answers.dense_macs.tolist(), strict=True,
        )
    ):  # fmt: skip
        if place in answers.errors:
            rows.append({"error": answers.errors[place]})
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
