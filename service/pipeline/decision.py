"""Decide the budgets of a request's texts in the frontend, and answer those that step 0 answers.

The other texts go to an engine, which only runs passes for them.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import numpy as np

from budgetformer.inference.decider import Decided, Decider
from budgetformer.inference.policy import BudgetRule
from budgetformer.inference.texts import Texts, TokenColumns
from service.ipc.answers import Answers

FEW_TEXTS = 16
"""A request of as many texts is decided by itself: more at once would hardly be faster."""


class Deciding:
    """Decide the texts of all requests that come in one turn of the event loop at once.

    Most of what it takes to decide one text, it takes to decide many.
    """

    def __init__(self) -> None:
        self._waiting: dict[tuple[int, int], _Waiting] = {}

    async def decide(self, decider: Decider, rule: BudgetRule, texts: TokenColumns) -> Decided:
        """Return what is decided of the texts of one request, by all that step 0 reads of them."""
        if len(texts) >= FEW_TEXTS:
            return decider.decide(texts, rule)
        loop = asyncio.get_running_loop()
        if not self._waiting:
            loop.call_soon(self._decide_all)
        key = id(decider), id(rule)
        waiting = self._waiting.setdefault(key, _Waiting(decider, rule, [], []))
        asking: asyncio.Future[Decided] = loop.create_future()
        waiting.asking.append((len(texts), asking))
        waiting.texts.append(texts)
        return await asking

    def _decide_all(self) -> None:
        groups, self._waiting = self._waiting, {}
        for group in groups.values():
            try:
                texts = TokenColumns.join(group.texts)
                decided = group.decider.decide(texts, group.rule)
            except Exception as error:  # whatever it is, nobody may wait for ever
                for _, asking in group.asking:
                    if not asking.done():
                        asking.set_exception(error)
                continue
            begin = 0
            for count, asking in group.asking:
                if not asking.done():
                    asking.set_result(decided.part(slice(begin, begin + count)))
                begin += count


@dataclass(frozen=True)
class _Waiting:
    """Texts for one decider and one rule, and who waits for how many of them."""

    decider: Decider
    rule: BudgetRule
    texts: list[TokenColumns]
    asking: list[tuple[int, asyncio.Future[Decided]]]


@dataclass(frozen=True)
class DecidedTexts:
    """The texts of a request, after their budgets were decided.

    Attributes:
        texts: their tokens.
        decided: what was decided of them.
        decider: of the model.
        rule: by which it was decided.
        quality: level, or points given up, for which it was decided.
        seconds: that the decision took.
    """

    texts: Texts
    decided: Decided
    decider: Decider
    rule: BudgetRule
    quality: str | float
    seconds: float

    @property
    def unanswered(self) -> list[int]:
        """The places of the texts that step 0 does not answer."""
        places: list[int] = np.flatnonzero(self.decided.steps).tolist()
        return places

    def answer(self, return_heads: bool, engine: Answers | None) -> Answers:
        """Put the answers of step 0 and those of an engine together, in the order of the texts.

        Args:
            return_heads: name the heads that were computed.
            engine: the answers to the `unanswered` texts; None: there were none.
        """
        decided, sizes, count = self.decided, self.decider.sizes, len(self.texts)
        macs = [self.decider.macs(tokens) for tokens in self.texts.window.lengths.tolist()]
        spent, dense = (np.array([own[at] for own in macs], np.int64) for at in (0, 1))
        logits = decided.exit_logits
        none = np.zeros(count, np.int32)
        ran = np.zeros((count, self.rule.num_steps + 1), bool)
        ran[:, 0] = decided.asked
        answers = Answers(
            logits=np.zeros((count, sizes.classes), np.float32) if logits is None else logits,
            step=none,
            predicted=decided.steps,
            ran=ran,
            heads=none,
            macs=spent,
            dense_macs=dense,
            next_step=none,
            chosen=[[[] for _ in range(sizes.layers)]] * count if return_heads else None,
            budget_seconds=self.seconds,
            quality=self.quality,
        )
        return answers if engine is None else answers.with_later(self.unanswered, engine)
