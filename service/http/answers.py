"""The answers to a request, before a route writes them in the format of its API.

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


class Scored(msgspec.Struct, frozen=True, gc=False):  # never part of a reference cycle
    """A label and its score."""

    label: str
    score: float


@dataclass(frozen=True)
class Answered:
    """A request and the answers to its texts.

    Attributes:
        request_id: value of the header X-Request-Id.
        model: model that answered.
        body: body of the request.
        quality: quality level or accuracy drop (percentage points) that the response names.
        lengths: number of tokens of each text that the encoder may read, int32 [B].
        truncated: whether a text has more tokens than that, bool [B].
        answers: answers to the texts.
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

    @cached_property
    def tokens(self) -> int:
        """Number of tokens of all texts."""
        return int(self.lengths.sum())

    @property
    def id(self) -> str:
        """The id of the response to POST /classify."""
        return f"classify-{self.body.request_id or self.request_id}"

    def failure(self, index: int) -> ApiError | None:
        """Return the error of a text; None: it did not fail."""
        reason = self.answers.errors.get(index)
        if reason is None:
            return None
        param = f"input[{index}]"
        return ApiError(500, f"{param}: {reason}", param, "item_failed")

    def report_failures(self, scope: MutableMapping[str, Any]) -> None:
        """Set the outcome of a request some of whose texts failed, for formats that can say so.

        Raises:
            ApiError: 500, all texts failed.
        """
        errors = self.answers.errors
        if len(errors) == len(self.answers):
            raise ApiError(500, f"input[0]: {errors[0]}", "input", "item_failed")
        if errors:
            scope["outcome"] = "partial"

    def refuse_failures(self) -> None:
        """Raise the error of the first failed text, for formats that cannot report it.

        Raises:
            ApiError: 500, a text failed.
        """
        if self.answers.errors:
            failure = self.failure(min(self.answers.errors))
            assert failure is not None
            raise failure

    @property
    def activation(self) -> Activation:
        """The activation for the problem type of the checkpoint."""
        return activation_of(self.checkpoint)

    @cached_property
    def scores(self) -> Array:
        """The scores by `activation`, float64 [B, C]."""
        if len(self.answers) <= FEW_TEXTS:
            return np.array(self.score_rows)
        return activate(self.answers.logits, self.activation)

    @cached_property
    def score_rows(self) -> list[list[float]]:
        """The same scores as Python floats, [B][C]."""
        if len(self.answers) > FEW_TEXTS:
            rows: list[list[float]] = self.scores.tolist()
            return rows
        return [_activate_one(row, self.activation) for row in self.answers.logits.tolist()]

    def ranked(self, function: Activation | None, top_k: int | None = None) -> list[list[Scored]]:
        """Return the labels and scores of each text, highest score first.

        Args:
            function: activation; None: that of the checkpoint.
            top_k: maximum number of labels per text; None: all.
        """
        labels = self.checkpoint.manifest.labels
        if len(self.answers) <= FEW_TEXTS:
            rows = self.score_rows
            if function is not None:
                rows = [_activate_one(row, function) for row in self.answers.logits.tolist()]
            return [_rank_one(row, labels, top_k) for row in rows]
        scores = self.scores if function is None else activate(self.answers.logits, function)
        order = best_first(scores)[:, :top_k]
        names = np.array(labels, object)[order]
        values = np.take_along_axis(scores, order, -1)
        return [
            list(map(Scored, text_names, text_scores))
            for text_names, text_scores in zip(names.tolist(), values.tolist(), strict=True)
        ]


def _rank_one(scores: list[float], labels: Sequence[str], top_k: int | None) -> list[Scored]:
    order = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)
    return [Scored(labels[i], scores[i]) for i in order[:top_k]]


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
    """Return the indices that sort each row of scores [B, C], highest score first."""
    order: Array = np.argsort(-scores, axis=-1, kind="stable")
    return order
