"""Decide the budgets of a request's texts in the frontend, and answer those that step 0 answers.

The other texts go to an engine, which only runs passes for them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from budgetformer.inference.decider import Decided, Decider
from budgetformer.inference.policy import BudgetRule
from budgetformer.tokenization import Tokens
from service.ipc.engine_messages import Answer, Decisions, ItemAnswer

FEW_TEXTS = 16
"""A request of as many texts is decided by itself: more at once would hardly be faster."""


class Deciding:
    """Decide the texts of all requests that come in one turn of the event loop at once.

    Most of what it takes to decide one text, it takes to decide many.
    """

    def __init__(self) -> None:
        self._waiting: dict[tuple[int, int], _Waiting] = {}

    async def decide(self, decider: Decider, rule: BudgetRule, texts: Sequence[Tokens]) -> Decided:
        """Return what is decided of the texts of one request."""
        if len(texts) >= FEW_TEXTS:
            return decider.decide(texts, rule)
        loop = asyncio.get_running_loop()
        if not self._waiting:
            loop.call_soon(self._decide_all)
        key = id(decider), id(rule)
        waiting = self._waiting.setdefault(key, _Waiting(decider, rule, [], []))
        asking: asyncio.Future[Decided] = loop.create_future()
        waiting.asking.append((len(texts), asking))
        waiting.texts.extend(texts)
        return await asking

    def _decide_all(self) -> None:
        groups, self._waiting = self._waiting, {}
        for group in groups.values():
            try:
                decided = group.decider.decide(group.texts, group.rule)
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
    texts: list[Tokens]
    asking: list[tuple[int, asyncio.Future[Decided]]]


@dataclass(frozen=True)
class DecidedTexts:
    """The texts of a request, after their budgets were decided.

    Attributes:
        texts: their tokens.
        decided: what was decided of them.
        decider: of the model.
        quality: level, or points given up, for which it was decided.
        seconds: that the decision took.
    """

    texts: Sequence[Tokens]
    decided: Decided
    decider: Decider
    quality: str | float
    seconds: float

    @property
    def unanswered(self) -> list[int]:
        """The places of the texts that step 0 does not answer."""
        places: list[int] = np.flatnonzero(self.decided.steps).tolist()
        return places

    def decisions(self) -> Decisions:
        """Return what an engine must know of the texts that need one."""
        part = self.decided.part(np.flatnonzero(self.decided.steps))
        logits = b"" if part.exit_logits is None else part.exit_logits.astype("<f4").tobytes()
        return Decisions(part.steps.tolist(), part.s.astype("<f4").tobytes(), logits)

    def answer(self, return_heads: bool, engine: Answer | None) -> Answer:
        """Put the answers of step 0 and those of an engine together, in the order of the texts.

        Args:
            return_heads: name the heads that were computed.
            engine: the answer to the `unanswered` texts; None: there were none.
        """
        ran = iter([] if engine is None else engine.items)
        decided = self.decided
        items = [
            self._joined(place, next(ran)) if step else self._exit(place, return_heads)
            for place, step in enumerate(decided.steps.tolist())
        ]
        if engine is None:
            return Answer(0, items, self.seconds, 0.0, 0.0, self.quality)
        return msgspec.structs.replace(engine, items=items, budget_seconds=self.seconds)

    def _exit(self, place: int, return_heads: bool) -> ItemAnswer:
        layers = self.decider.sizes.layers
        decision, dense = self.decider.macs(len(self.texts[place]))
        logits = self.decided.exit_logits
        assert logits is not None
        return ItemAnswer(
            logits=logits[place].tolist(),
            budget=0,
            predicted=0,
            steps=[0],
            heads=[0] * layers,
            chosen=[[]] * layers if return_heads else None,
            macs=decision,
            dense_macs=dense,
        )

    def _joined(self, place: int, item: ItemAnswer) -> ItemAnswer:
        """Add what the decision took and found to what an engine says of a text."""
        if item.error:
            return item
        decision, _ = self.decider.macs(len(self.texts[place]))
        before = [0] if self.decided.asked[place] else []
        return msgspec.structs.replace(
            item,
            predicted=int(self.decided.steps[place]),
            steps=[*before, *item.steps],
            macs=item.macs + decision,
        )
