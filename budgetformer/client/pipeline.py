"""Answers in the format of `transformers.pipeline("text-classification")`."""

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


def request_options(function: Function | None, options: Options) -> Options:
    """Return the options of a request; they ask for logits if `function` computes the scores."""
    if function is None:
        return options
    return {**options, "use_activation": False}


def shaped(
    inputs: Text | Sequence[Text],
    results: Iterable[Result],
    ranked: bool,
    function: Function | None,
) -> PipelineOutput:
    """Format results as a pipeline does: the best label of each text, or a ranked list.

    As in the pipeline, a single string without `top_k` gives a list with one element.

    Args:
        inputs: the argument of the call: one or several texts.
        results: results of the texts.
        ranked: whether to return a list of labels for each text.
        function: computes scores from logits; None: the results have scores.

    Raises:
        ItemFailedError: a text failed.
    """
    rows = [_row(result, ranked, function) for result in results]
    single = is_one(inputs)
    if ranked:
        return rows[0] if single else rows
    best = [row[0] for row in rows]
    return best[0] if single and not isinstance(inputs, str) else best


def _row(result: Result, ranked: bool, function: Function | None) -> list[Scored]:
    if isinstance(result, Failure):
        raise ItemFailedError(result.message)
    labels = result.labels if ranked else (LabelScore(result.label, result.score),)
    scores = [one.score for one in labels] if function is None else _activated(result, function)
    return [
        {"label": one.label, "score": score} for one, score in zip(labels, scores, strict=False)
    ]


def _activated(result: Classification, function: Function) -> list[float]:
    """Return the scores [C] that `function` computes from the logits, highest first."""
    logits = sorted(result.probs, reverse=True)
    if function == "none":
        return logits
    if function == "sigmoid":
        return [0.5 * (1 + math.tanh(0.5 * z)) for z in logits]
    powers = [math.exp(z - logits[0]) for z in logits]
    return [power / sum(powers) for power in powers]
