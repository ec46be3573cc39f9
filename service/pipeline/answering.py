"""From tokens to answers: budgets are decided, step 0 answers some texts, an engine the others."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from opentelemetry.trace import Tracer

from budgetformer.checkpoint.store import Checkpoint
from budgetformer.inference.decider import Decider
from budgetformer.inference.policy import QualityName
from budgetformer.model.tfidf import Array
from service.ipc.answers import Answers
from service.ipc.engine_client import Engines, Submission
from service.pipeline.decision import DecidedTexts, Deciding
from service.pipeline.served_models import ServedModel
from service.scheduling.brownout import kept_above
from service.telemetry.counts import Counts
from service.telemetry.stages import stage_span


@dataclass(frozen=True)
class Answering:
    """Answer the texts of jobs.

    Attributes:
        engines: that run passes.
        tracer: of spans; None: nobody traces.
    """

    engines: Engines
    tracer: Tracer | None = None
    _deciding: Deciding = field(default_factory=Deciding)

    async def answer(
        self, submission: Submission, model: ServedModel, floor: QualityName
    ) -> Answers:
        """Return the answers to the texts of a submission.

        A model whose network reads embeddings to decide leaves that to the engine; so does a
        submission with a target, for which the engine's queue chooses the quality.

        Args:
            submission: texts to classify.
            model: that is to answer.
            floor: lowest level that overload may make of the quality `auto`.

        Raises:
            EngineDownError, NotLoadedError, RefusedError, DeadlineError, EngineFailedError: see
                `Engines.classify`.
        """
        if model.decider is None or submission.target is not None:
            return await self.engines.classify(submission)
        decided = await self._decide(submission, model.checkpoint, model.decider, floor)
        places, ran = decided.unanswered, None
        if places:
            asked = replace(submission, quality=decided.quality, decided=decided.decided).part(
                places
            )
            ran = await self.engines.classify(asked)
        return decided.answer(submission.return_heads, ran)

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
    """Count what answers took; of texts that failed nothing is counted.

    Args:
        counts: where.
        checkpoint: that answered.
        answers: to B texts.
        lengths: tokens of each text, int32 [B].
        truncated: texts that have more than the encoder reads.
        heads, max_heads: as they were asked for.
        hits: the texts for which nothing was computed, as a cache answered them, bool [B]; None:
            nobody asked it.
        stages: seconds of each stage; None: the texts are of no request that somebody waits for.
    """
    budgets, used, macs, dense = answers.step, answers.heads, answers.macs, answers.dense_macs
    if answers.errors or hits is not None:
        whole = ~answers.failed
        computed = whole if hits is None else whole & ~hits
        budgets, lengths = budgets[whole], lengths[whole]
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
