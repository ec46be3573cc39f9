"""Answer tokenized texts: decide budgets, then answer by step 0 or send texts to an engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from opentelemetry.trace import Tracer

from budgetformer.checkpoint.store import Checkpoint
from budgetformer.inference.decider import Decider
from budgetformer.inference.policy import QualityName
from budgetformer.model.tfidf import Array
from service.ipc.answers import Answers
from service.ipc.engine_client import Engines, Submission
from service.pipeline.decision import DecidedTexts, DecisionBatcher
from service.pipeline.served_models import ServedModel
from service.scheduling.brownout import kept_above
from service.telemetry.counts import Counts
from service.telemetry.stages import stage_span

Waiting: TypeAlias = Callable[[], AbstractAsyncContextManager[None]]
"""Returns a context for the time in which a request waits for another thread or process."""


@dataclass(frozen=True)
class Answering:
    """Answer submissions.

    Attributes:
        engines: engines of the server.
        tracer: tracer for the span of the decision; None: tracing is off.
    """

    engines: Engines
    tracer: Tracer | None = None
    _deciding: DecisionBatcher = field(default_factory=DecisionBatcher)

    async def answer(
        self,
        submission: Submission,
        model: ServedModel,
        floor: QualityName,
        waiting: Waiting = nullcontext,
    ) -> Answers:
        """Return the answers to the texts of a submission.

        The engine decides the budgets if the network reads embeddings for that, or if the
        submission has a target time, for which the quality depends on the queue of the engine.

        Args:
            submission: texts and options.
            model: model that answers.
            floor: lowest level that overload may give to a submission of quality `auto`.
            waiting: context in which this waits for an engine.

        Raises:
            EngineDownError, NotLoadedError, RefusedError, DeadlineError, EngineFailedError: see
                `Engines.classify`.
        """
        if model.decider is None or submission.target is not None:
            async with waiting():
                return await self.engines.classify(submission)
        decided = await self._decide(submission, model.checkpoint, model.decider, floor)
        unanswered, engine_answers = decided.unanswered, None
        if unanswered:
            whole = replace(submission, quality=decided.quality, decided=decided.decided)
            async with waiting():
                engine_answers = await self.engines.classify(whole.part(unanswered))
        return decided.answer(submission.return_heads, engine_answers)

    async def _decide(
        self, submission: Submission, checkpoint: Checkpoint, decider: Decider, floor: QualityName
    ) -> DecidedTexts:
        started = time.monotonic()
        quality = submission.quality
        if quality == "auto":
            quality = kept_above(floor, self.engines.level)
        rule = checkpoint.rule(
            quality if checkpoint.calibrated else None, submission.heads, submission.max_heads
        )
        with stage_span(self.tracer, "budget") as span:
            decided = await self._deciding.decide(decider, rule, submission.texts.full_text)
            if span.is_recording():
                span.set_attribute("budgetformer.model", checkpoint.label)
                span.set_attribute("budgetformer.items", len(submission.texts))
                span.set_attribute("budgetformer.budget", int(decided.steps.max()))
        return DecidedTexts(
            submission.texts, decided, decider, rule, quality, time.monotonic() - started
        )


def count_answers(
    counts: Counts,
    checkpoint: Checkpoint,
    answers: Answers,
    lengths: Array,
    truncated: int,
    *,
    heads: int | None = None,
    max_heads: int | None = None,
    hits: Array | None = None,
    stages: Mapping[str, float] | None = None,
) -> None:
    """Count the answered texts and their cost; failed texts are left out.

    Args:
        counts: counts of this process.
        checkpoint: model that answered.
        answers: answers to B texts.
        lengths: number of tokens of each text, int32 [B].
        truncated: number of texts that have more tokens than the encoder reads.
        heads, max_heads: head limits of the request.
        hits: whether the cache answered each text, so it cost nothing, bool [B]; None: no cache.
        stages: seconds of each stage of the request; None: the texts are those of a job.
    """
    budgets, used, macs, dense = answers.step, answers.heads, answers.macs, answers.dense_macs
    if answers.errors or hits is not None:
        answered = ~answers.failed
        computed = answered if hits is None else answered & ~hits
        budgets, lengths = budgets[answered], lengths[answered]
        used, macs, dense = used[computed], macs[computed], dense[computed]
    quality = answers.quality if checkpoint.calibrated else None
    counts.classified(
        checkpoint.name,
        checkpoint.version,
        budgets=budgets,
        heads=used,
        tokens=lengths,
        macs=macs,
        dense_macs=dense,
        heads_of_one=checkpoint.num_layers * checkpoint.num_heads,
        expected=checkpoint.rule(quality, heads, max_heads).expected_budgets(),
        stages=stages or {},
        truncated=truncated,
    )
