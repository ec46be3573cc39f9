"""Prices: expected device seconds of items and batches, including likely escalations."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from budgetformer.cost.table import CostTable
from budgetformer.inference.policy import BudgetRule, Shares

SMOOTHING = 0.1
MAX_OFF = 20.0
"""Largest factor by which one batch may differ from its price and still count fully."""


@dataclass(frozen=True)
class Outlook:
    """Ladder steps that an item is expected to run, from calibration.

    Attributes:
        steps: share of the items that run each step >= 1.
        onward: for each step, the next step of the chain, and the share of the items at the step
            that continue with it.
    """

    steps: Shares
    onward: Mapping[int, tuple[int, float]] = field(default_factory=dict)

    @classmethod
    def of(cls, rule: BudgetRule) -> Outlook:
        """Return the outlook of a rule; without calibration, all items run the whole ladder."""
        ends, steps = rule.expected_budgets(), rule.expected_runs()
        if ends is None or steps is None:
            return cls({rule.num_steps: 1.0 if rule.level is None else rule.level.macs_share})
        links = sorted(steps.keys() & {*rule.chain, rule.ceiling})
        onward = {}
        for step, share in steps.items():
            following = next((link for link in links if link > step), None)
            if following is not None and share > ends.get(step, 0.0):
                onward[step] = following, 1 - ends.get(step, 0.0) / share
        return cls(steps, onward)

    def up_to(self, max_step: int | None) -> Outlook:
        """Return the outlook on an engine that computes steps up to `max_step` (None: all)."""
        if max_step is None:
            return self
        steps = {step: share for step, share in self.steps.items() if step <= max_step}
        onward = {a: (b, share) for a, (b, share) in self.onward.items() if b <= max_step}
        return Outlook(steps, onward)

    def after(self, step: int) -> Iterator[tuple[int, float]]:
        """Yield `step` and each later step that an item may run, with its probability."""
        probability = 1.0
        while probability:
            yield step, probability
            step, share = self.onward.get(step, (step, 0.0))
            probability *= share


class Prices:
    """The cost table of every model version, scaled to the measured time of its batches.

    The scale corrects tables that are estimates, and machines that are slower or busy.
    """

    def __init__(self) -> None:
        self._tables: dict[Hashable, CostTable] = {}
        self._scales: dict[Hashable, float] = {}

    def set_table(self, key: Hashable, table: CostTable) -> None:
        """Set the cost table of a model version."""
        self._tables[key], self._scales[key] = table, 1.0

    def expected(
        self, key: Hashable, outlook: Outlook, tokens: int, exit_tokens: int, items: int = 1
    ) -> float:
        """Return the expected seconds of undecided items.

        Args:
            key: model version.
            outlook: outlook of their rule.
            tokens: number of tokens of all items, as the encoder reads them.
            exit_tokens: number of tokens of all items, as step 0 reads them.
            items: number of items.
        """
        table = self._tables[key]
        run = sum(
            share * table.share(self._step(table, step), tokens, items)
            for step, share in outlook.steps.items()
        )
        return self._scales[key] * (table.share(0, exit_tokens, items) + run)

    def expected_each(
        self, key: Hashable, outlook: Outlook, tokens: Sequence[int], exit_tokens: Sequence[int]
    ) -> list[float]:
        """Return the expected seconds of each undecided item; see `expected`.

        Args:
            key, outlook: see `expected`.
            tokens, exit_tokens: number of tokens of each item.
        """
        item = self.expected(key, outlook, 0, 0)
        token = self.expected(key, outlook, 1, 0, items=0)
        exit_token = self.expected(key, outlook, 0, 1, items=0)
        return [
            item + token * count + exit_token * exit_count
            for count, exit_count in zip(tokens, exit_tokens, strict=True)
        ]

    def item(self, key: Hashable, step: int, outlook: Outlook, tokens: int) -> float:
        """Return the expected seconds of an item from its next step on; see `each`."""
        return self.each(key, step, outlook, [tokens])[0]

    def each(
        self, key: Hashable, step: int, outlook: Outlook, tokens: Sequence[int]
    ) -> list[float]:
        """Return the expected seconds of each item from its next step on.

        Args:
            key: model version.
            step: next step of all items.
            outlook: outlook of their rule, for later steps.
            tokens: number of tokens of each item.
        """
        table, scale = self._tables[key], self._scales[key]
        item = token = 0.0
        for later, probability in outlook.after(step):
            at = self._step(table, later)
            item += scale * probability * table.share(at, 0)
            token += scale * probability * table.share(at, 1, 0)
        return [item + token * count for count in tokens]

    def constant(self, key: Hashable, step: int) -> float:
        """Return the seconds that a batch at a step takes besides the prices of its items."""
        table = self._tables[key]
        return self._scales[key] * table.constant(self._step(table, step))

    def observe(self, key: Hashable, step: int, tokens: int, items: int, seconds: float) -> None:
        """Correct the scale of a model version by the measured seconds of a batch."""
        table = self._tables[key]
        ratio = seconds / max(table.batch(self._step(table, step), tokens, items), 1e-9)
        scale = self._scales[key]
        ratio = min(max(ratio, scale / MAX_OFF), scale * MAX_OFF)
        self._scales[key] += SMOOTHING * (ratio - scale)

    @staticmethod
    def _step(table: CostTable, step: int) -> int:
        # A step below 0 means that layers decide themselves: any of them may use all heads.
        return step if 0 <= step < len(table.steps) else len(table.steps) - 1
