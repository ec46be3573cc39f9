"""The answers to the texts of a request, as columns.

Shapes: B texts, C labels, L layers, S steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import Any

import numpy as np

from budgetformer.model.tfidf import Array

FEW_TEXTS = 4
"""Up to so many texts are answered sooner with plain numbers than with calls of array functions."""
UNPREDICTED = -1
"""The prediction where the layers of a network decide for themselves."""


@dataclass(frozen=True, eq=False)
class Answers:
    """The answers to B texts.

    Attributes:
        logits: float32 [B, C].
        step: ladder step that answered, int32 [B].
        predicted: step that f_o expected to answer, int32 [B]; or `UNPREDICTED`.
        ran: whether each step was run, step 0 included, bool [B, S + 1].
        heads: heads computed, over all layers and steps, int32 [B].
        macs, dense_macs: multiply-adds spent, and those of the dense network, int64 [B].
        next_step: int32 [B]; above 0: the text has no answer yet, as it needs this step, which its
            engine does not compute.
        chosen: heads of each layer in the last pass by text, [B][L]; None: nobody asked for them.
        errors: by place, why a text failed alone; its other columns mean nothing.
        budget_seconds, queue_seconds, compute_seconds: of the stages, the slowest text's.
        quality: what decided the budgets: a level, or the points given up.
    """

    logits: Array
    step: Array
    predicted: Array
    ran: Array
    heads: Array
    macs: Array
    dense_macs: Array
    next_step: Array
    chosen: list[list[list[int]]] | None = None
    errors: Mapping[int, str] = field(default_factory=dict)
    budget_seconds: float = 0.0
    queue_seconds: float = 0.0
    compute_seconds: float = 0.0
    quality: str | float = "auto"

    def __len__(self) -> int:
        return len(self.step)

    @property
    def failed(self) -> Array:
        """Whether each text failed, bool [B]."""
        failed = np.zeros(len(self), bool)
        failed[list(self.errors)] = True
        return failed

    def step_columns(self) -> tuple[Array, Array]:
        """Return the steps that all texts have run, one text after another, and their bounds.

        The bounds are the place of each text's first step, and behind them the end: [B + 1].
        """
        ends = np.cumsum(self.ran.sum(-1))
        return np.nonzero(self.ran)[1], np.concatenate([[0], ends])

    def all_steps(self) -> list[list[int]]:
        """Return the steps that each text has run, in order."""
        if len(self) <= FEW_TEXTS:
            return [[step for step, ran in enumerate(row) if ran] for row in self.ran.tolist()]
        steps, bounds = (column.tolist() for column in self.step_columns())
        return [steps[begin:end] for begin, end in pairwise(bounds)]

    @classmethod
    def none(cls, like: Answers, count: int) -> Answers:
        """Return the columns of texts of which nothing was computed, shaped as others are."""
        columns: dict[str, Any] = {}
        for name in COLUMNS:
            column = getattr(like, name)
            columns[name] = np.zeros((count, *column.shape[1:]), column.dtype)
        return replace(like, **columns, chosen=like.chosen and [[]] * count, errors={})

    def with_later(self, places: list[int], later: Answers) -> Answers:
        """Return these answers with what was computed later of the texts at some places.

        What both ran and spent counts, and stages add up. The prediction stays the earlier one.
        """
        columns: dict[str, Any] = {name: getattr(self, name).copy() for name in COLUMNS}
        found = replace(
            self,
            **columns,
            chosen=self.chosen and list(self.chosen),
            errors={**self.errors, **{places[at]: error for at, error in later.errors.items()}},
            budget_seconds=self.budget_seconds + later.budget_seconds,
            queue_seconds=self.queue_seconds + later.queue_seconds,
            compute_seconds=self.compute_seconds + later.compute_seconds,
            quality=later.quality,
        )
        for name in ("logits", "step", "dense_macs", "next_step"):
            getattr(found, name)[places] = getattr(later, name)
        for name in ("heads", "macs"):
            getattr(found, name)[places] += getattr(later, name)
        found.ran[places] |= later.ran
        if found.chosen is not None and later.chosen is not None:
            for place, heads in zip(places, later.chosen, strict=True):
                found.chosen[place] = heads
        return found


COLUMNS = [column.name for column in fields(Answers)][:8]
"""The attributes that are arrays."""
