"""The models that an engine has loaded."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import structlog
import torch

from budgetformer import cascade
from budgetformer.cascade import Work
from budgetformer.checkpoint import Checkpoint, read_checkpoint
from budgetformer.classifier import load_network
from budgetformer.compact import PackedPass
from budgetformer.policy import BudgetRule
from service.engine.protocol import ModelInfo

log = structlog.get_logger()

WARM_TOKENS = 32


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A checkpoint with its network on the device."""

    checkpoint: Checkpoint
    network: PackedPass
    info: ModelInfo

    @property
    def key(self) -> tuple[str, int]:
        """Name and version."""
        return self.checkpoint.name, self.checkpoint.version

    def rule(self, quality: str | float, heads: int | None, max_heads: int | None) -> BudgetRule:
        """Return the rule for a request's budgets.

        Raises:
            PolicyError: the checkpoint does not offer it.
        """
        # A checkpoint without operating points still serves, by f_o's own rule.
        named = quality if self.checkpoint.calibrated else None
        return self.checkpoint.rule(named, heads, max_heads)

    def expected_share(self, rule: BudgetRule) -> float:
        """Return what an item under this rule will cost, as a share of the dense network.

        Before f_o has seen the item, calibration is all that is known; without it, expect the most.
        """
        if rule.fixed is not None:
            plan = self.checkpoint.ladder[rule.fixed - 1] if rule.fixed else []
            return sum(plan) / (self.checkpoint.num_layers * self.checkpoint.num_heads)
        return 1.0 if rule.point is None else rule.point.macs_share


def load_model(path: Path, device: str) -> LoadedModel:
    """Load, verify and warm one checkpoint folder.

    Raises:
        CheckpointError: it is damaged.
    """
    started = time.monotonic()
    checkpoint = read_checkpoint(path)
    network = load_network(checkpoint, device)
    _warm(checkpoint, network)
    seconds = time.monotonic() - started
    memory = sum(parameter.nbytes for parameter in network.model.parameters())
    info = ModelInfo(checkpoint.name, checkpoint.version, seconds, memory)
    log.info("model loaded", model=checkpoint.label, seconds=round(seconds, 3))
    return LoadedModel(checkpoint, network, info)


def _warm(checkpoint: Checkpoint, network: PackedPass) -> None:
    rules = [
        BudgetRule(point=None, num_steps=len(checkpoint.ladder), fixed=s)
        for s in checkpoint.budgets
    ]
    tokens = [0] * min(WARM_TOKENS, checkpoint.manifest.max_tokens)
    with torch.inference_mode():
        for rule in rules:
            item = Work(tokens, None, rule)
            cascade.arrive(network, [item])
            if not item.done:
                cascade.run(network, [item])
