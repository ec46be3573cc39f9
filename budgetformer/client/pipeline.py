"""Answers in the shape of `transformers.pipeline("text-classification")`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from budgetformer.client.calls import Options, Text, is_one
from budgetformer.client.errors import ItemFailedError
from budgetformer.client.results import Classification, Failure, LabelScore, Result

Scored = dict[str, Any]
"""`label` and `score`."""
PipelineOutput = Scored | list[Scored] | list[list[Scored]]
Function = Literal["softmax", "sigmoid", "none"]


def asked(function: Function | None, options: Options) -> Options:
    """Return the options of a request whose scores are to be made by `function`."""
    if function is None:
        return options
    return {**options, "use_activation": False}


def shaped(
    inputs: Text | Sequence[Text],
    results: Iterable[Result],
    ranked: bool,
    function: Function | None,
) -> PipelineOutput:
    """Shape results as a pipeline does: for each text its best label, or a ranked list of them.

    One string is answered by a list even so, which is how the pipeline behaves too.

    Raises:
        ItemFailedError: an item failed alone.
    """
    rows = [_row(result, ranked, function) for result in results]
    alone = is_one(inputs)
    if ranked:
        return rows[0] if alone else rows
    best = [row[0] for row in rows]
    return best[0] if alone and not isinstance(inputs, str) else best


def _row(result: Result, ranked: bool, function: Function | None) -> list[Scored]:
    if isinstance(result, Failure):
        raise ItemFailedError(result.message)
    labels = result.labels if ranked else (LabelScore(result.label, result.score),)
    scores = [one.score for one in labels] if function is None else _activated(result, function)
    return [
        {"label": one.label, "score": score} for one, score in zip(labels, scores, strict=False)
    ]


def _activated(result: Classification, function: Function) -> list[float]:
    """Return what `function` makes of the logits [C], best first as the labels are."""
    logits = sorted(result.probs, reverse=True)
    if function == "none":
        return logits
    if function == "sigmoid":
        return [0.5 * (1 + math.tanh(0.5 * z)) for z in logits]
    powers = [math.exp(z - logits[0]) for z in logits]
    return [power / sum(powers) for power in powers]
