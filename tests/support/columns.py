"""Columns of texts and answers, for tests that replace a part of the service."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from budgetformer.inference.texts import Texts, TokenColumns
from service.ipc.answers import COLUMNS, Answers


def texts_of(*ids: Sequence[int]) -> Texts:
    """Return texts with the same tokens for the encoder and step 0."""
    window = TokenColumns.of(ids)
    return Texts(window, window)


def answers_to(count: int, **columns: Any) -> Answers:
    """Return answers with two labels and three steps; the default is step 1."""
    kinds = {"logits": np.float32, "macs": np.int64, "dense_macs": np.int64, "ran": bool}
    values: dict[str, Any] = {
        "logits": [[0.0, 1.0]] * count,
        "step": [1] * count,
        "predicted": [1] * count,
        "ran": [[False, True, False, False]] * count,
        "heads": [2] * count,
        "macs": [10] * count,
        "dense_macs": [100] * count,
        "next_step": [0] * count,
    }
    values |= columns
    for name in COLUMNS:
        values[name] = np.array(values[name], kinds.get(name, np.int32))
    return Answers(**values)


def rows(answers: Answers) -> list[dict[str, Any]]:
    """Return the answer to each text as plain values."""
    names = [name for name in COLUMNS if name != "ran"]
    return [
        {name: getattr(answers, name)[place].tolist() for name in names}
        | {
            "steps": answers.all_steps()[place],
            "chosen": None if answers.chosen is None else answers.chosen[place],
            "error": answers.errors.get(place, ""),
        }
        for place in range(len(answers))
    ]
