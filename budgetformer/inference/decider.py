"""Decide the budgets of texts before the encoder runs, with NumPy alone.

Tokens, step 0's table and f_o's weights are all that this needs: a few megabytes, and no torch.
Networks whose f_o or layers read embeddings decide during their pass instead.

Shapes: B texts, C labels.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from budgetformer.cost.macs import Sizes, decision_macs, dense_macs
from budgetformer.inference.policy import BudgetRule
from budgetformer.model.tfidf import Array, StepZero, confidence
from budgetformer.tokenization import Tokens


@dataclass(frozen=True)
class Decided:
    """What is known of B texts before the encoder runs.

    Attributes:
        steps: ladder step that each text runs first, [B]; 0: step 0's answer stands.
        asked: whether step 0 was asked for an answer, [B]; with a fixed budget it is not.
        s: f_o's verdict, float32 [B]; 0 where the rule does not ask f_o.
        exit_logits: step 0's logits, float32 [B, C]; None: the network has no step 0.
    """

    steps: Array
    asked: Array
    s: Array
    exit_logits: Array | None

    def part(self, places: Array | slice) -> Decided:
        """Return the texts at some places."""
        logits = None if self.exit_logits is None else self.exit_logits[places]
        return Decided(self.steps[places], self.asked[places], self.s[places], logits)


@dataclass(frozen=True)
class Decider:
    """Step 0 and f_o of one network, and what multiply-adds depend on.

    Attributes:
        sizes: of the network.
        step0: step 0 and f_o; None: the network has one budget, so nothing is decided.
    """

    sizes: Sizes
    step0: StepZero | None

    def decide(self, texts: Sequence[Tokens], rule: BudgetRule) -> Decided:
        """Decide B texts at once."""
        if self.step0 is None:
            s = np.ones(len(texts), np.float32)
            return Decided(*rule.first_steps(s), s, None)
        ids = _column([text.ids if text.whole is None else text.whole for text in texts])
        lengths = [len(text.ids if text.whole is None else text.whole) for text in texts]
        kinds = [text.type_ids if text.whole is None else text.whole_type_ids for text in texts]
        segments = None
        if any(own and any(own) for own in kinds):
            segments = _column([own or [0] * n for own, n in zip(kinds, lengths, strict=True)])
        if rule.asks_f_o:
            logits, s = self.step0.decide(ids, segments, lengths)
        else:
            logits = self.step0.logits(ids, segments, lengths)
            s = np.zeros(len(texts), np.float32)
        confidences = confidence(logits, self.step0.problem_type)
        return Decided(*rule.first_steps(s, confidences), s, logits)

    @cached_property
    def macs(self) -> Callable[[int], tuple[int, int]]:
        """Count the multiply-adds of a text's decision and of the dense network, by its tokens."""
        return lru_cache(maxsize=4096)(self._count)

    def _count(self, tokens: int) -> tuple[int, int]:
        return decision_macs(self.sizes, tokens), dense_macs(self.sizes, tokens)


def _column(texts: Sequence[Sequence[int]]) -> Array:
    """Put the ids of texts one after another, int32 [N]."""
    numbers = array("i")
    for text in texts:
        numbers.extend(text)
    return np.frombuffer(numbers, np.int32)
