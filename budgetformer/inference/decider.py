"""Decide the budgets of texts before the encoder runs, in NumPy.

This module does not import torch; it reads only tokens, step 0's table and f_o's weights, a few
megabytes. Networks whose f_o or layers read embeddings decide in the pass instead.

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
    """The decision about B texts before the encoder runs.

    Attributes:
        steps: ladder step that each text runs first, [B]; 0: step 0's answer is final.
        asked: whether the rule uses step 0's answer, [B]; a fixed budget does not.
        s: f_o's output, float32 [B]; 0 where the rule does not use f_o.
        exit_logits: step 0's logits, float32 [B, C]; None: the network has no step 0.
    """

    steps: Array
    asked: Array
    s: Array
    exit_logits: Array | None

    def part(self, places: Array | slice) -> Decided:
        """Return the decision about the texts with these indices."""
        logits = None if self.exit_logits is None else self.exit_logits[places]
        return Decided(self.steps[places], self.asked[places], self.s[places], logits)


@dataclass(frozen=True)
class Decider:
    """Step 0 and f_o of one network, and the sizes that determine its multiply-adds.

    Attributes:
        sizes: sizes of the network.
        step0: step 0 and f_o; None: the network has a single budget, so nothing is decided.
    """

    sizes: Sizes
    step0: StepZero | None

    def decide(self, texts: TokenColumns, rule: BudgetRule) -> Decided:
        """Decide the budgets of B texts from their full texts."""
        if self.step0 is None:
            s = np.ones(len(texts), np.float32)
            return Decided(*rule.first_steps(s), s, None)
        columns = texts.ids, texts.types, texts.lengths
        if rule.uses_f_o:
            logits, s = self.step0.decide(*columns)
        else:
            logits, s = self.step0.logits(*columns), np.zeros(len(texts), np.float32)
        confidences = confidence(logits, self.step0.problem_type)
        return Decided(*rule.first_steps(s, confidences), s, logits)

    @cached_property
    def macs(self) -> Callable[[int], tuple[int, int]]:
        """Function that maps a number of tokens to the multiply-adds of decision and dense pass."""
        return lru_cache(maxsize=4096)(self._count)

    def _count(self, tokens: int) -> tuple[int, int]:
        return decision_macs(self.sizes, tokens), dense_macs(self.sizes, tokens)
