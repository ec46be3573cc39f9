"""What came back for a request, before a route writes it in the shape that its clients read.

Shapes: B texts, C labels.
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import msgspec
import numpy as np

from budgetformer.checkpoint.store import Checkpoint
from budgetformer.model.tfidf import Array
from service.http.errors import ApiError
from service.http.schemas import ClassifyRequest
from service.ipc.answers import FEW_TEXTS, Answers
from service.pipeline.scores import Activation, activate, activation_of
from service.pipeline.served_models import ServedModel


class Scored(msgspec.Struct, frozen=True, gc=False):  # it cannot be part of a cycle
    """A label and its score."""

    label: str
    score: float


@dataclass(frozen=True)
class Answered:
    """A request and the answers to its texts.

    Attributes:
        request_id: of the header X-Request-Id.
        model: that answered.
        body: the request.
        quality: to be named in the answer.
        lengths: tokens that the encoder may read of each text, int32 [B].
        truncated: whether a text has more, bool [B].
        answers: to the texts.
    """

    request_id: str
    model: ServedModel
    body: ClassifyRequest
    quality: str | float
    lengths: Array
    truncated: Array
    answers: Answers

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint that answered."""
        return self.model.checkpoint

    @property
    def tokens(self) -> int:
        """Tokens of all texts."""
        return int(self.lengths.sum())

    @property
    def id(self) -> str:
        """The id of an answer to POST /classify."""
        return f"classify-{self.body.request_id or self.request_id}"

    def failure(self, place: int) -> ApiError | None:
        """Return why a text failed alone; None: it did not."""
        reason = self.answers.errors.get(place)
        if reason is None:
            return None
        param = f"input[{place}]"
        return ApiError(500, f"{param}: {reason}", param, "item_failed")

    def report_failures(self, scope: MutableMapping[str, Any]) -> None:
        """Note in a request's scope that some texts failed, where a shape has a place for that.

        Raises:
            ApiError: 500, all of them did.
        """
        errors = self.answers.errors
        if len(errors) == len(self.answers):
            raise ApiError(500, f"input[0]: {errors[0]}", "input", "item_failed")
        if errors:
            scope["outcome"] = "partial"

    def refuse_failures(self) -> None:
        """Refuse what a shape has no place for: the failure of some texts.

        Raises:
            ApiError: 500, a text failed.
        """
        if self.answers.errors:
            failure = self.failure(min(self.answers.errors))
            assert failure is not None
            raise failure

    @property
    def activation(self) -> Activation:
        """What makes scores of logits in the checkpoint's kind of problem."""
        return activation_of(self.checkpoint)

    @cached_property
    def scores(self) -> Array:
        """The scores of the checkpoint's kind of problem, float64 [B, C]."""
        if len(self.answers) <= FEW_TEXTS:
            return np.array(self.score_rows)
        return activate(self.answers.logits, self.activation)

    @cached_property
    def score_rows(self) -> list[list[float]]:
        """The same as plain numbers, to the last bit."""
        if len(self.answers) > FEW_TEXTS:
            rows: list[list[float]] = self.scores.tolist()
            return rows
        return [_activate_one(row, self.activation) for row in self.answers.logits.tolist()]

    def ranked(self, function: Activation | None, most: int | None = None) -> list[list[Scored]]:
        """Name the scores of all texts by their labels, the best of each text first.

        Args:
            function: makes scores of logits; None: that of the checkpoint's kind of problem.
            most: labels of each text; None: all.
        """
        labels = self.checkpoint.manifest.labels
        if len(self.answers) <= FEW_TEXTS:
            rows = self.score_rows
            if function is not None:
                rows = [_activate_one(row, function) for row in self.answers.logits.tolist()]
            return [_rank_one(row, labels, most) for row in rows]
        scores = self.scores if function is None else activate(self.answers.logits, function)
        order = best_first(scores)[:, :most]
        names = np.array(labels, object)[order]
        values = np.take_along_axis(scores, order, -1)
        return [
            list(map(Scored, own_names, own_values))
            for own_names, own_values in zip(names.tolist(), values.tolist(), strict=True)
        ]


def _rank_one(scores: list[float], labels: Sequence[str], most: int | None) -> list[Scored]:
    order = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)
    return [Scored(labels[i], scores[i]) for i in order[:most]]


def _activate_one(logits: list[float], function: Activation) -> list[float]:
    if function == "none":
        return logits
    if function == "sigmoid":
        return [0.5 * (1 + math.tanh(0.5 * z)) for z in logits]
    top = max(logits)
    powers = [math.exp(z - top) for z in logits]
    total = sum(powers)
    return [power / total for power in powers]


def best_first(scores: Array) -> Array:
    """Return the places of scores [B, C] in each row, highest score first."""
    order: Array = np.argsort(-scores, axis=-1, kind="stable")
    return order
