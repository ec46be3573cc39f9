"""Count texts as a frontend does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from service.telemetry.counts import Counts


class Spent(NamedTuple):
    """The cost of one answered text: its ladder step, heads, tokens and multiply-adds."""

    budget: int
    heads: int
    tokens: int
    macs: int
    dense_macs: int


def columns(texts: Iterable[Spent]) -> dict[str, list[int]]:
    """Return columns of texts, with the parameter names of `Counts.classified`."""
    names = ("budgets", *Spent._fields[1:])
    return {name: [text[at] for text in texts] for at, name in enumerate(names)}


def count_texts(
    counts: Counts,
    *texts: Spent,
    model: str = "topics",
    version: int = 1,
    expected: Mapping[int, float] | None = None,
    stages: Mapping[str, float] | None = None,
    truncated: int = 0,
) -> None:
    """Count the texts of one request; the dense network has 8 heads."""
    counts.classified(
        model,
        version,
        **columns(texts),
        heads_of_one=8,
        expected=expected,
        stages=stages or {},
        truncated=truncated,
    )
