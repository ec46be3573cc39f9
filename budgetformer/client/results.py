"""The answers of the service, typed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

_PLACE = re.compile(r"\binput\[(\d+)\]")


@dataclass(frozen=True)
class LabelScore:
    """A label and its score."""

    label: str
    score: float


@dataclass(frozen=True)
class Classification:
    """The answer for one text, and what it cost.

    Attributes:
        index: place of the text in what was given.
        label, score: the best label.
        probs: [C] in label order; logits, if these were asked for.
        labels: best first, as far as `top_k` and `threshold` leave them.
        budget: the ladder step that answered.
        predicted: the step that f_o expected to answer; None where every layer decides for itself.
        steps: all steps that ran, in order.
        heads, heads_total: attention heads computed, of all in the network.
        per_layer: which heads, by layer, if that was asked for.
        macs, dense_macs: multiply-adds executed, and those of the full network.
        tokens: tokens of the text that the encoder may read, special ones included.
        truncated: whether the text has more; step 0 may read them.
        quality: the quality that decided.
        model: `name:version` that answered.
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
    """Why a text failed alone, while the others were answered."""

    index: int
    message: str
    code: str


Result = Classification | Failure


def read_results(answer: dict[str, Any], start: int) -> list[Result]:
    """Read the body of an answer; its first item is the caller's text number `start`."""
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
    """Let places such as `input[3]` count from the caller's first text."""
    return _PLACE.sub(lambda found: f"input[{int(found[1]) + start}]", text)
