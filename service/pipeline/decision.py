"""Decide the budgets of texts in the frontend, and answer the texts for which step 0 is enough.

An engine computes the other texts, with the budgets that were decided here.
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
"""Number of texts from which a request is decided alone: larger batches are hardly faster."""


class DecisionBatcher:
    """Decide the texts of all requests of one turn of the event loop together.

    Most of the time of a decision does not depend on the number of texts.
    """

    def __init__(self) -> None:
        self._waiting: dict[tuple[int, int], _Batch] = {}

    async def decide(self, decider: Decider, rule: BudgetRule, texts: TokenColumns) -> Decided:
        """Return the decision about the texts of one request.

        Args:
            decider: decider of the model.
            rule: rule for the budgets.
            texts: full texts, as step 0 reads them.
        """
        if len(texts) >= FEW_TEXTS:
            return decider.decide(texts, rule)
        loop = asyncio.get_running_loop()
        if not self._waiting:
            loop.call_soon(self._decide_all)
        key = id(decider), id(rule)
        batch = self._waiting.setdefault(key, _Batch(decider, rule, []))
        future: asyncio.Future[Decided] = loop.create_future()
        batch.requests.append((texts, future))
        return await future

    def _decide_all(self) -> None:
        batches, self._waiting = self._waiting, {}
        for batch in batches.values():
            try:
                columns = TokenColumns.join([texts for texts, _ in batch.requests])
                decided = batch.decider.decide(columns, batch.rule)
            except Exception as error:  # no request may wait forever
                for _, future in batch.requests:
                    if not future.done():
                        future.set_exception(error)
                continue
            begin = 0
            for texts, future in batch.requests:
                if not future.done():
                    future.set_result(decided.part(slice(begin, begin + len(texts))))
                begin += len(texts)


@dataclass(frozen=True)
class _Batch:
    """The texts of the requests that wait for one decider and one rule."""

    decider: Decider
    rule: BudgetRule
    requests: list[tuple[TokenColumns, asyncio.Future[Decided]]]


@dataclass(frozen=True)
class DecidedTexts:
    """The texts of a request and the decision about them.

    Attributes:
        texts: B texts.
        decided: decision about the texts.
        decider: decider of the model.
        rule: rule of the decision.
        quality: quality level or accuracy drop (percentage points) of the decision.
        seconds: duration of the decision.
    """

    texts: Texts
    decided: Decided
    decider: Decider
    rule: BudgetRule
    quality: str | float
    seconds: float

    @property
    def unanswered(self) -> list[int]:
        """The indices of the texts that step 0 does not answer."""
        return [index for index, step in enumerate(self.decided.steps.tolist()) if step]

    def answer(self, return_heads: bool, engine: Answers | None) -> Answers:
        """Merge the answers of step 0 and those of an engine, in the order of the texts.

        Args:
            return_heads: whether the answers name the computed heads.
            engine: answers to the `unanswered` texts; None: there were none.
        """
        decided, sizes, count = self.decided, self.decider.sizes, len(self.texts)
        macs = [self.decider.macs(tokens) for tokens in self.texts.window.lengths.tolist()]
        spent, dense = np.array(macs, np.int64).reshape(count, 2).T.copy()
        logits = decided.exit_logits
        zeros = np.zeros(count, np.int32)
        ran = np.zeros((count, self.rule.num_steps + 1), bool)
        ran[:, 0] = decided.asked
        answers = Answers(
            logits=np.zeros((count, sizes.classes), np.float32) if logits is None else logits,
            step=zeros,
            predicted=decided.steps,
            ran=ran,
            heads=zeros,
            macs=spent,
            dense_macs=dense,
            next_step=zeros,
            chosen=[[[] for _ in range(sizes.layers)]] * count if return_heads else None,
            budget_seconds=self.seconds,
            quality=self.quality,
        )
        return answers if engine is None else answers.with_later(self.unanswered, engine)
