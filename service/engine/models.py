"""The models that an engine has loaded."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import structlog

from budgetformer.checkpoint import Checkpoint, read_checkpoint
from budgetformer.classifier import load_network
from budgetformer.compact import PackedPass
from budgetformer.policy import BudgetRule
from budgetformer.precision import Precision
from service.engine.protocol import ModelInfo

log = structlog.get_logger()


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


def load_model(path: Path, device: str, precision: Precision) -> LoadedModel:
    """Load, verify and warm one checkpoint folder.

    Raises:
        CheckpointError: it is damaged.
    """
    started = time.monotonic()
    checkpoint = read_checkpoint(path)
    network = load_network(checkpoint, device, precision)
    network.warm(_steps_in_use(checkpoint))
    seconds = time.monotonic() - started
    memory = network.nbytes
    info = ModelInfo(checkpoint.name, checkpoint.version, seconds, memory, network.precision)
    log.info(
        "model loaded",
        model=checkpoint.label,
        seconds=round(seconds, 3),
        dtype=network.precision,
    )
    return LoadedModel(checkpoint, network, info)


def _steps_in_use(checkpoint: Checkpoint) -> list[int]:
    """Return the steps that the quality levels use, and the full one; others are for who asks."""
    steps = {len(checkpoint.ladder)}
    for point in checkpoint.manifest.operating_points:
        if point.name:
            steps |= {band.step for band in point.entry}
            steps |= {point.escalation.step} if point.escalation else set()
    return sorted(steps - {0})
