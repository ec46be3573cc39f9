"""Shadow requests: have a candidate compute requests that were answered, and compare."""

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
"""Maximum number of texts that candidates compute at a time; others are skipped and counted."""

log = structlog.get_logger()


class SkippedError(Exception):
    """The server has no capacity for shadow texts; this does not count against the candidate."""


@dataclass(frozen=True)
class AnsweredRequest:
    """The answers of the served version to a request.

    Attributes:
        checkpoint: checkpoint of the served version.
        answers: answers to the texts of the request.
        computed: whether all answers were computed for this request, and none came from the cache.
    """

    checkpoint: Checkpoint
    answers: Answers
    computed: bool


class Shadows:
    """Have candidates compute requests in the background.

    Args:
        counts: counts to which the results of the comparisons are added.
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
        """Start the comparison of a candidate with the answers to a request.

        Args:
            candidate: version to compare.
            answered: answers of the served version.
            compute: computes the texts of the request with a version; it raises `SkippedError` if
                there is no capacity.
        """
        count = len(answered.answers)
        if self._texts + count > MAX_TEXTS:
            self._count(candidate, {"skipped": count})
            return
        self._texts += count
        self._background.start(self._compare(candidate, answered, compute))

    async def stop(self) -> None:
        """Cancel the comparisons that still run."""
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
        except Exception as error:  # each counts as a failure of the candidate
            log.debug("candidate failed", model=candidate.checkpoint.label, exc_info=error)
            self._count(candidate, {"failed": count})
            return
        finally:
            self._texts -= count
        pairs = zip(
            labels(candidate.checkpoint, answers), labels(answered.checkpoint, served), strict=True
        )
        outcomes = Counter(
            "failed" if index in answers.errors else "agreed" if label == expected else "differed"
            for index, (label, expected) in enumerate(pairs)
            if index not in served.errors
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
    """Return the label of each text; for a multi-label model, the set of its labels."""
    names = checkpoint.manifest.labels
    if checkpoint.multi_label:
        return [
            frozenset(name for name, logit in zip(names, row, strict=True) if logit > 0)
            for row in answers.logits.tolist()
        ]
    return [names[best] for best in answers.logits.argmax(-1).tolist()]


def _spent(answers: Answers) -> Spent:
    return Spent(answers.compute_seconds, int(answers.macs.sum()), int(answers.heads.sum()))
