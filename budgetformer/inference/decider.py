"""Decide the budgets of texts before the encoder runs, with NumPy alone.

Tokens, step 0's table and f_o's weights are all that this needs: a few megabytes, and no torch.
Networks whose f_o or layers read embeddings decide during their pass instead.

Shapes: B texts, C labels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from budgetformer.cost.macs import Sizes, decision_macs, dense_macs
from budgetformer.inference.policy import BudgetRule
from budgetformer.inference.texts import TokenColumns
from budgetformer.model.tfidf import Array, StepZero, confidence


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

    def decide(self, texts: TokenColumns, rule: BudgetRule) -> Decided:
        """Decide B texts at once, by all that step 0 reads of them."""
        if self.step0 is None:
            s = np.ones(len(texts), np.float32)
            return Decided(*rule.first_steps(s), s, None)
        given = texts.ids, texts.types, texts.lengths
        if rule.asks_f_o:
            logits, s = self.step0.decide(*given)
        else:
            logits, s = self.step0.logits(*given), np.zeros(len(texts), np.float32)
        confidences = confidence(logits, self.step0.problem_type)
        return Decided(*rule.first_steps(s, confidences), s, logits)

    @cached_property
    def macs(self) -> Callable[[int], tuple[int, int]]:
        """Count the multiply-adds of a text's decision and of the dense network, by its tokens."""
        return lru_cache(maxsize=4096)(self._count)

    def _count(self, tokens: int) -> tuple[int, int]:
        return decision_macs(self.sizes, tokens), dense_macs(self.sizes, tokens)
