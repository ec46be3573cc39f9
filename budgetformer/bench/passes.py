"""Contenders that run the compact pass: ladder steps, and quality levels on real texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from budgetformer.bench.timing import Contender, Machine, TokenIds
from budgetformer.checkpoint.store import Checkpoint
from budgetformer.cost.macs import encoder_macs, layer_weights
from budgetformer.inference import cascade
from budgetformer.inference.packed import PackedPass, PackedTokens
from budgetformer.inference.policy import BudgetRule
from budgetformer.inference.precision_choice import load_pass
from budgetformer.inference.texts import Texts, TokenColumns
from budgetformer.model.configuration import BudgetFormerConfig
from budgetformer.model.modeling import BudgetFormerForSequenceClassification


def step_name(precision: str, step: int) -> str:
    """Return the name of a step's contender."""
    return f"step {step}, {precision}"


def small_step(last: int) -> int:
    """Return the ladder step with about a sixth of the last step's multiply-adds."""
    return max(1, last // 6)


def step_contenders(
    network: PackedPass, steps: Sequence[int], machine: Machine
) -> Iterator[Contender]:
    """Yield a contender for each ladder step, which computes logits from token ids."""
    precision = network.precision

    def contender(step: int) -> Contender:
        plan = network.config.heads_per_layer(step)
        weights = sum(layer_weights(network.sizes, heads) for heads in plan)
        size = getattr(torch, precision).itemsize

        def run(items: Sequence[TokenIds]) -> object:
            return network.run_at(step, PackedTokens.pack(items))

        def limit(items: Sequence[TokenIds]) -> float:
            macs = sum(encoder_macs(network.sizes, plan, len(ids)) for ids in items)
            return machine.limit(precision, macs, size * weights)

        return Contender(step_name(precision, step), run, limit)

    yield from map(contender, steps)


def picked_name(step: int) -> str:
    """Return the name of the contender that picks a step's heads per text."""
    return f"step {step}, float32, heads picked by text"


def picking_contender(like: BudgetFormerConfig, step: int) -> Contender:
    """Return a contender for a step of a network of the same size whose g_d picks heads per text.

    Weights and picked heads are random, so the texts of a batch hardly ever keep the same heads.
    """
    by_text = {"head_selection": "input", "budget_scope": "input"}
    config = BudgetFormerConfig(**(like.to_dict() | by_text))
    picking = load_pass(BudgetFormerForSequenceClassification(config))
    draw = torch.Generator().manual_seed(0)
    sizes = picking.sizes

    def run(items: Sequence[TokenIds]) -> object:
        scores = torch.rand(len(items), sizes.layers, sizes.heads, generator=draw)
        return picking.run(
            PackedTokens.pack(items), [step] * len(items), ranking=scores.argsort(-1)
        )

    return Contender(picked_name(step), run)


def level_contenders(network: PackedPass, checkpoint: Checkpoint) -> Iterator[Contender]:
    """Yield a contender for each quality level, with its decisions and escalations."""

    def contender(name: str, rule: BudgetRule) -> Contender:
        def run(items: Sequence[TokenIds]) -> object:
            window = TokenColumns.of(items)
            return cascade.answer(network, Texts(window, window), rule)

        return Contender(f"{name}, {network.precision}", run)

    for name in checkpoint.manifest.named_levels:
        yield contender(name, checkpoint.rule(name))
