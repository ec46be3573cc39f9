"""Measure how often a faster pass gives the same label as the plain one, on full test sets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from budgetformer.checkpoint.store import Checkpoint, load_encoder
from budgetformer.inference import cascade
from budgetformer.inference.packed import PackedPass
from budgetformer.inference.policy import BudgetRule
from budgetformer.inference.texts import Texts
from budgetformer.model.architecture import MULTI_LABEL
from budgetformer.tokenization import Text

BATCH = 32


@dataclass(frozen=True)
class Agreement:
    """The agreement of a pass with the plain one at one quality level.

    Attributes:
        way: name of the quality level, or "full".
        texts: number of texts.
        other: number of texts with another label (multi-label: another set of labels).
        moved: number of texts that ended at another step.
        difference: largest difference of a logit among texts that ended at the same step.
    """

    way: str
    texts: int
    other: int
    moved: int
    difference: float

    @property
    def share(self) -> float:
        """Share of the texts with the same label."""
        return 1 - self.other / self.texts


def compare_labels(
    checkpoint: Checkpoint, texts: Sequence[Text], plain: PackedPass, other: PackedPass
) -> list[Agreement]:
    """Compare two passes on all texts, at every quality level and at the full budget."""
    items = Texts.of(load_encoder(checkpoint).encode(texts))
    rules = {name: checkpoint.rule(name) for name in checkpoint.manifest.named_levels}
    rules["full"] = checkpoint.rule(None, heads=checkpoint.num_heads)
    return [_compare(name, rule, items, plain, other) for name, rule in rules.items()]


def _compare(
    name: str, rule: BudgetRule, items: Texts, plain: PackedPass, other: PackedPass
) -> Agreement:
    expected, expected_steps = _answers(plain, rule, items)
    actual, actual_steps = _answers(other, rule, items)
    if plain.config.problem_type == MULTI_LABEL:
        same = ((expected > 0) == (actual > 0)).all(-1)
    else:
        same = expected.argmax(-1) == actual.argmax(-1)
    same_step = expected_steps == actual_steps
    differences = (expected - actual).abs().amax(-1)[same_step]
    return Agreement(
        way=name,
        texts=len(items),
        other=int((~same).sum()),
        moved=int((~same_step).sum()),
        difference=float(differences.max()) if len(differences) else 0.0,
    )


def _answers(network: PackedPass, rule: BudgetRule, texts: Texts) -> tuple[Tensor, Tensor]:
    """Answer texts in batches of similar lengths; return logits [B, C] and final steps [B]."""
    lengths = texts.window.lengths

    def batches(indices: list[int]) -> Iterator[list[int]]:
        order = sorted(indices, key=lengths.__getitem__)
        return (sorted(order[at : at + BATCH]) for at in range(0, len(order), BATCH))

    items = cascade.answer(network, texts, rule, batches)
    return torch.from_numpy(items.logits), torch.from_numpy(items.step)
