"""What items and batches cost in seconds on this device, likely escalations included."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from budgetformer.cost.table import CostTable
from budgetformer.inference.policy import BudgetRule, Shares

SMOOTHING = 0.1
MAX_OFF = 20.0
"""A batch that took so many times its price, or that fraction of it, says no more than that."""


@dataclass(frozen=True)
class Outlook:
    """Which ladder steps an item runs, as calibration saw it.

    Attributes:
        steps: share of the items that run each step >= 1.
        onward: by step, the next step of the chain, and the share of those that ran the one which
            go on to the other.
    """

    steps: Shares
    onward: Mapping[int, tuple[int, float]] = field(default_factory=dict)

    @classmethod
    def of(cls, rule: BudgetRule) -> Outlook:
        """Read a rule's; without calibration, expect the whole ladder of everyone."""
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

    def up_to(self, most: int | None) -> Outlook:
        """Return what of it runs where no step above `most` does (None: all)."""
        if most is None:
            return self
        steps = {step: share for step, share in self.steps.items() if step <= most}
        return Outlook(steps, {a: (b, share) for a, (b, share) in self.onward.items() if b <= most})

    def after(self, step: int) -> Iterator[tuple[int, float]]:
        """Yield each step that an item at `step` runs from there on, and how likely it is."""
        likely = 1.0
        while likely:
            yield step, likely
            step, share = self.onward.get(step, (step, 0.0))
            likely *= share


class Prices:
    """The cost table of every model, scaled to what its batches really take.

    A table that is a guess, a slower machine, a busy one: the scale follows, and so does every
    price. A key is a model version.
    """

    def __init__(self) -> None:
        self._tables: dict[Hashable, CostTable] = {}
        self._scales: dict[Hashable, float] = {}

    def know(self, key: Hashable, table: CostTable) -> None:
        """Price a model by this table from now on."""
        self._tables[key], self._scales[key] = table, 1.0

    def expected(
        self, key: Hashable, outlook: Outlook, tokens: int, exit_tokens: int, items: int = 1
    ) -> float:
        """Return the seconds that items take, before f_o has seen them.

        Args:
            key: of the model.
            outlook: of the rule that they have.
            tokens, exit_tokens: of all of them, as the encoder and as step 0 reads them.
            items: how many there are.
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
        """Return the expected seconds of each of some items, by their tokens; see `expected`."""
        item = self.expected(key, outlook, 0, 0)
        token = self.expected(key, outlook, 1, 0, items=0)
        exit_token = self.expected(key, outlook, 0, 1, items=0)
        return [
            item + token * own + exit_token * read
            for own, read in zip(tokens, exit_tokens, strict=True)
        ]

    def item(self, key: Hashable, step: int, outlook: Outlook, tokens: int) -> float:
        """Return the seconds that an item takes from its step on, likely later steps included."""
        return self.each(key, step, outlook, [tokens])[0]

    def each(
        self, key: Hashable, step: int, outlook: Outlook, tokens: Sequence[int]
    ) -> list[float]:
        """Return the same of each of some items, by their tokens."""
        table, scale = self._tables[key], self._scales[key]
        item = token = 0.0
        for later, likely in outlook.after(step):
            at = self._step(table, later)
            item += scale * likely * table.share(at, 0)
            token += scale * likely * table.share(at, 1, 0)
        return [item + token * count for count in tokens]

    def constant(self, key: Hashable, step: int) -> float:
        """Return the seconds that a batch at a step takes whatever is in it."""
        table = self._tables[key]
        return self._scales[key] * table.constant(self._step(table, step))

    def observe(self, key: Hashable, step: int, tokens: int, items: int, seconds: float) -> None:
        """Learn from a batch that ran."""
        table = self._tables[key]
        ratio = seconds / max(table.batch(self._step(table, step), tokens, items), 1e-9)
        scale = self._scales[key]
        ratio = min(max(ratio, scale / MAX_OFF), scale * MAX_OFF)
        self._scales[key] += SMOOTHING * (ratio - scale)

    @staticmethod
    def _step(table: CostTable, step: int) -> int:
        # Where layers decide for themselves (a step below 0), any of them may take all heads.
        return step if 0 <= step < len(table.steps) else len(table.steps) - 1
