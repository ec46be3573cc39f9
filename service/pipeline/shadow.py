"""Compute requests with a candidate, too, after they were answered, and compare."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Hashable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import structlog

from budgetformer.checkpoint.store import Checkpoint
from service.background import Background
from service.ipc.answers import Answers
from service.pipeline.served_models import ServedModel
from service.telemetry.counts import Counts, Spent

MAX_TEXTS = 512
"""Texts that a frontend has candidates compute at a time; more are skipped, and counted."""

log = structlog.get_logger()


class SkippedError(Exception):
    """The server had no room for texts that nobody waits for: it is not the candidate's fault."""


@dataclass(frozen=True)
class AnsweredRequest:
    """What the served version answered to a request.

    Attributes:
        checkpoint: of the version.
        answers: to its texts.
        computed: whether all of them were computed for this request, and none kept.
    """

    checkpoint: Checkpoint
    answers: Answers
    computed: bool


class Shadows:
    """Have candidates compute requests in the background.

    Args:
        counts: what comes out is counted there.
    """

    def __init__(self, counts: Counts) -> None:
        self._counts = counts
        self._texts = 0
        self._background = Background()

    def begin(
        self,
        candidate: ServedModel,
        answered: AnsweredRequest,
        compute: Callable[[ServedModel], Awaitable[Answers]],
    ) -> None:
        """Have a candidate compute what was answered.

        Args:
            candidate: the version.
            answered: the answers that it is compared with.
            compute: answers the texts of the request; it raises `SkippedError` if there is no room.
        """
        count = len(answered.answers)
        if self._texts + count > MAX_TEXTS:
            self._count(candidate, {"skipped": count})
            return
        self._texts += count
        self._background.start(self._compare(candidate, answered, compute))

    async def stop(self) -> None:
        """Compute nothing more."""
        await self._background.stop()

    async def _compare(
        self,
        candidate: ServedModel,
        answered: AnsweredRequest,
        compute: Callable[[ServedModel], Awaitable[Answers]],
    ) -> None:
        served, count = answered.answers, len(answered.answers)
        try:
            with candidate.in_use():
                answers = await compute(candidate)
        except SkippedError:
            self._count(candidate, {"skipped": count})
            return
        except Exception as error:  # whatever it is, the candidate has no answer
            log.debug("candidate failed", model=candidate.checkpoint.label, exc_info=error)
            self._count(candidate, {"failed": count})
            return
        finally:
            self._texts -= count
        mine, theirs = labels(candidate.checkpoint, answers), labels(answered.checkpoint, served)
        outcomes = Counter(
            "failed" if at in answers.errors else "agreed" if own == other else "differed"
            for at, (own, other) in enumerate(zip(mine, theirs, strict=True))
            if at not in served.errors
        )
        spent = {"served": _spent(served), "candidate": _spent(answers)}
        self._count(candidate, outcomes, spent if answered.computed else {})

    def _count(
        self,
        candidate: ServedModel,
        outcomes: Mapping[str, int],
        spent: Mapping[str, Spent] = MappingProxyType({}),
    ) -> None:
        checkpoint = candidate.checkpoint
        self._counts.shadowed(checkpoint.name, checkpoint.version, outcomes, spent)


def labels(checkpoint: Checkpoint, answers: Answers) -> list[Hashable]:
    """Return what each text was labelled: its best label, or all that hold where several may."""
    names = checkpoint.manifest.labels
    if checkpoint.manifest.problem_type == "multi_label_classification":
        return [
            frozenset(name for name, logit in zip(names, row, strict=True) if logit > 0)
            for row in answers.logits.tolist()
        ]
    return [names[best] for best in answers.logits.argmax(-1).tolist()]


def _spent(answers: Answers) -> Spent:
    return Spent(answers.compute_seconds, int(answers.macs.sum()), int(answers.heads.sum()))
