"""The answers to the texts of a request, as columns.

Shapes: B texts, C labels, L layers, S steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np

from budgetformer.model.tfidf import Array

FEW_TEXTS = 4
"""Maximum number of texts for which plain Python is faster than array functions."""
UNPREDICTED = -1
"""Value of `predicted` for networks whose layers decide for themselves."""


@dataclass(frozen=True, eq=False)
class Answers:
    """The answers to B texts.

    Attributes:
        logits: float32 [B, C].
        step: ladder step that gave the answer, int32 [B].
        predicted: step that f_o predicted, int32 [B], or `UNPREDICTED`.
        ran: whether each step was run, including step 0, bool [B, S + 1].
        heads: number of computed heads, over all layers and steps, int32 [B].
        macs, dense_macs: multiply-adds of the text, and those of the dense network, int64 [B].
        next_step: int32 [B]; above 0: the text has no answer yet, because it needs this step, which
            the engine does not compute.
        chosen: indices of the heads of each layer in the last pass, [B][L][heads]; None: not asked.
        errors: reason by index of each text that failed; its columns are meaningless.
        budget_seconds, queue_seconds, compute_seconds: duration of each stage, of the slowest text.
        quality: quality level or accuracy drop (percentage points) that decided the budgets.
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
        """Return the steps that all texts have run, concatenated, and text offsets, [B + 1]."""
        ends = np.cumsum(self.ran.sum(-1))
        return np.nonzero(self.ran)[1], np.concatenate([[0], ends])

    def all_steps(self) -> list[list[int]]:
        """Return the steps that each text has run, in order."""
        if len(self) <= FEW_TEXTS:
            return [[step for step, ran in enumerate(row) if ran] for row in self.ran.tolist()]
        steps, offsets = (column.tolist() for column in self.step_columns())
        return [steps[begin:end] for begin, end in pairwise(offsets)]

    @classmethod
    def none(cls, like: Answers, count: int) -> Answers:
        """Return zeros for `count` texts that are not computed yet, with the columns of `like`."""
        shapes = {name: (count, *getattr(like, name).shape[1:]) for name in COLUMNS}
        columns: dict[str, Any] = {name: np.zeros(shapes[name], COLUMNS[name]) for name in COLUMNS}
        return replace(like, **columns, chosen=like.chosen and [[]] * count, errors={})

    def with_later(self, places: list[int], later: Answers) -> Answers:
        """Return these answers, updated by a later pass over some of the texts.

        Costs, steps and durations add up. The prediction stays the earlier one.

        Args:
            places: indices of the texts of the later pass.
            later: answers of the later pass.
        """
        columns: dict[str, Any] = {name: getattr(self, name).copy() for name in COLUMNS}
        merged = replace(
            self,
            **columns,
            chosen=self.chosen and list(self.chosen),
            errors={**self.errors, **{places[row]: error for row, error in later.errors.items()}},
            budget_seconds=self.budget_seconds + later.budget_seconds,
            queue_seconds=self.queue_seconds + later.queue_seconds,
            compute_seconds=self.compute_seconds + later.compute_seconds,
            quality=later.quality,
        )
        for name in ("logits", "step", "dense_macs", "next_step"):
            getattr(merged, name)[places] = getattr(later, name)
        for name in ("heads", "macs"):
            getattr(merged, name)[places] += getattr(later, name)
        merged.ran[places] |= later.ran
        if merged.chosen is not None and later.chosen is not None:
            for place, heads in zip(places, later.chosen, strict=True):
                merged.chosen[place] = heads
        return merged


COLUMNS = {
    "logits": "<f4", "step": "<i4", "predicted": "<i4", "ran": "?", "heads": "<i4",
    "macs": "<i8", "dense_macs": "<i8", "next_step": "<i4",
}  # fmt: skip
"""Types of the attributes of `Answers` that are arrays, by name."""
