"""The JSON response to POST /classify."""

from __future__ import annotations

import time
from typing import Any

import msgspec
from fastapi import Request, Response

from service.http.answers import Answered, Scored
from service.http.responses import json_response
from service.ipc.answers import UNPREDICTED


class _Heads(msgspec.Struct, frozen=True):
    used: int
    total: int
    budget: int
    predicted: int | None
    steps: list[int]
    per_layer: list[list[int]] | None


class _Item(msgspec.Struct, frozen=True):
    index: int
    label: str
    score: float
    probs: list[float]
    num_classes: int
    labels: list[Scored]
    heads: _Heads
    macs: int
    dense_macs: int
    tokens: int
    truncated: bool
    quality: str | float


class _Failed(msgspec.Struct, frozen=True):
    index: int
    error: dict[str, Any]


def classify_response(request: Request, answered: Answered) -> Response:
    """Return the response to POST /classify, with failed items among the others.

    Raises:
        ApiError: 500, every item failed.
    """
    answered.report_failures(request.scope)
    answers, body = answered.answers, answered.body
    total = answered.checkpoint.num_layers * answered.checkpoint.num_heads
    activated = body.use_activation is not False
    probs = answered.score_rows if activated else answers.logits.tolist()
    classes, threshold = answers.logits.shape[1], body.threshold
    columns = zip(
        answered.lengths.tolist(),
        answered.truncated.tolist(),
        answered.ranked(None, body.top_k),
        probs,
        answers.heads.tolist(),
        answers.step.tolist(),
        answers.predicted.tolist(),
        answers.all_steps(),
        answers.macs.tolist(),
        answers.dense_macs.tolist(),
        strict=True,
    )
    data: list[_Item | _Failed] = []
    heads_used = 0
    for index, (
        tokens, truncated, ranked, shown, used, step, predicted, steps, macs, dense,
    ) in enumerate(columns):  # fmt: skip
        if failure := answered.failure(index):
            data.append(_Failed(index, failure.body()))
            continue
        heads_used += used
        heads = _Heads(
            used,
            total,
            step,
            None if predicted == UNPREDICTED else predicted,
            steps,
            None if answers.chosen is None else answers.chosen[index],
        )
        best = ranked[0]
        labels = ranked if threshold is None else [one for one in ranked if one.score >= threshold]
        data.append(
            _Item(
                index, best.label, best.score, shown, classes, labels, heads, macs, dense,
                tokens, truncated, answered.quality,
            )
        )  # fmt: skip
    return json_response(
        {
            "id": answered.id,
            "object": "list",
            "created": int(time.time()),
            "model": answered.checkpoint.label,
            "data": data,
            "usage": {
                "prompt_tokens": answered.tokens,
                "total_tokens": answered.tokens,
                "heads_used": heads_used,
                "heads_total": total * (len(data) - len(answers.errors)),
            },
        }
    )
