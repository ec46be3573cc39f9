"""The answers of the service as dataclasses."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

_INDEX = re.compile(r"\binput\[(\d+)\]")


@dataclass(frozen=True)
class LabelScore:
    """A label and its score."""

    label: str
    score: float


@dataclass(frozen=True)
class Classification:
    """The answer for one text, and its cost.

    Attributes:
        index: index of the text in the caller's list.
        label: the best label.
        score: score of the best label.
        probs: probabilities in label order, [C]; logits with `use_activation=False`.
        labels: labels that `top_k` and `threshold` select, best first.
        budget: ladder step of the answer.
        predicted: step at which f_o expected the answer; None if each layer decides its budget.
        steps: all steps that ran, in order.
        heads: attention heads computed, summed over layers and passes.
        heads_total: attention heads of the network.
        per_layer: computed heads of each layer, with `return_heads=True`.
        macs: multiply-adds computed.
        dense_macs: multiply-adds of the full network.
        tokens: tokens of the text that the encoder reads, including special tokens.
        truncated: whether the text has more tokens than that; step 0 may read them.
        quality: quality that was used.
        model: `name:version` of the model.
    """

    index: int
    label: str
    score: float
    probs: tuple[float, ...]
    labels: tuple[LabelScore, ...]
    budget: int
    predicted: int | None
    steps: tuple[int, ...]
    heads: int
    heads_total: int
    per_layer: tuple[tuple[int, ...], ...] | None
    macs: int
    dense_macs: int
    tokens: int
    truncated: bool
    quality: str | float
    model: str


@dataclass(frozen=True)
class Failure:
    """The error of one text; the other texts of the request were answered."""

    index: int
    message: str
    code: str


Result = Classification | Failure


def read_results(answer: dict[str, Any], start: int) -> list[Result]:
    """Read the body of an answer; its first item has the index `start` in the caller's list."""
    return [_result(item, start, answer["model"]) for item in answer["data"]]


def _result(item: dict[str, Any], start: int, model: str) -> Result:
    index = item["index"] + start
    if "error" in item:
        error = item["error"]
        return Failure(index, shift(error["message"], start), error["code"])
    heads = item["heads"]
    layers = heads["per_layer"]
    return Classification(
        index=index,
        label=item["label"],
        score=item["score"],
        probs=tuple(item["probs"]),
        labels=tuple(LabelScore(one["label"], one["score"]) for one in item["labels"]),
        budget=heads["budget"],
        predicted=heads["predicted"],
        steps=tuple(heads["steps"]),
        heads=heads["used"],
        heads_total=heads["total"],
        per_layer=None if layers is None else tuple(map(tuple, layers)),
        macs=item["macs"],
        dense_macs=item["dense_macs"],
        tokens=item["tokens"],
        truncated=item["truncated"],
        quality=item["quality"],
        model=model,
    )


def shift(text: str, start: int) -> str:
    """Add `start` to indices such as `input[3]`, to give those of the caller's list."""
    return _INDEX.sub(lambda match: f"input[{int(match[1]) + start}]", text)
