"""What came back for a request, before a route writes it in the shape that its clients read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from budgetformer.checkpoint.store import Checkpoint
from budgetformer.tokenization import Tokens
from service.http.errors import ApiError
from service.http.schemas import ClassifyRequest
from service.ipc.engine_messages import Answer, ItemAnswer
from service.pipeline.served_models import ServedModel

Activation = Literal["softmax", "sigmoid", "none"]


@dataclass(frozen=True)
class Answered:
    """A request and the engines' answer to it."""

    request_id: str
    model: ServedModel
    body: ClassifyRequest
    quality: str | float
    tokenized: list[Tokens]
    answer: Answer

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint that answered."""
        return self.model.checkpoint

    @property
    def tokens(self) -> int:
        """Tokens of all items."""
        return sum(map(len, self.tokenized))

    def failure(self, index: int) -> ApiError | None:
        """Return why an item failed alone; None: it did not."""
        reason = self.answer.items[index].error
        if not reason:
            return None
        place = f"input[{index}]"
        return ApiError(500, f"{place}: {reason}", place, "item_failed")

    def whole(self) -> list[ItemAnswer]:
        """Return the answers of all items, for a shape that has no place for a failed one.

        Raises:
            ApiError: 500, an item failed.
        """
        failures = map(self.failure, range(len(self.answer.items)))
        if failure := next(filter(None, failures), None):
            raise failure
        return self.answer.items

    def activate(self, item: ItemAnswer, function: Activation | None = None) -> list[float]:
        """Return an item's scores [C]; by default those of the checkpoint's kind of problem."""
        if function is None:
            function = "sigmoid" if self.checkpoint.multi_label else "softmax"
        return activate(item.logits, function)

    def best_first(self, scores: Sequence[float]) -> list[dict[str, Any]]:
        """Name scores [C] by their labels, best first."""
        names = self.checkpoint.manifest.labels
        return [{"label": names[i], "score": scores[i]} for i in best_first(scores)]


def best_first(scores: Sequence[float]) -> list[int]:
    """Return the indices of scores, highest score first."""
    return sorted(range(len(scores)), key=lambda i: -scores[i])


def activate(logits: Sequence[float], function: Activation) -> list[float]:
    """Turn logits [C] into scores [C]."""
    if function == "none":
        return list(logits)
    if function == "sigmoid":
        return [0.5 * (1 + math.tanh(0.5 * z)) for z in logits]
    top = max(logits)
    powers = [math.exp(z - top) for z in logits]
    total = sum(powers)
    return [power / total for power in powers]
