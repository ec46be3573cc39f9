"""A model loaded on the device of an engine, and how it is loaded."""

from __future__ import annotations

import fcntl
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias, cast

import structlog

from budgetformer.checkpoint.loading import load_network
from budgetformer.checkpoint.manifest import WEIGHTS
from budgetformer.checkpoint.store import Checkpoint, read_checkpoint
from budgetformer.cost.macs import encoder_macs
from budgetformer.cost.table import CostTable, guess_table
from budgetformer.inference.packed import PackedPass
from budgetformer.inference.policy import BudgetRule
from budgetformer.inference.precision import Precision
from service.engine.device import use_device
from service.ipc.engine_messages import ModelInfo
from service.process import mmap_large_blocks
from service.scheduling.price import Outlook

log = structlog.get_logger()

WarmUpSteps: TypeAlias = Mapping[str, Sequence[int]]
"""Ladder steps to pack when a model loads, by name of the model."""
MAX_RULES = 256
"""Most rules that are cached for each model."""
TYPICAL_TOKENS = 64
GUESSES = {"cpu": (1e-11, 2e-3), "cuda": (2e-14, 5e-4)}
"""Seconds per multiply-add and per batch of a device that was not measured, by device type. Prices
are corrected by the measured time of batches."""


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A checkpoint with its network on the device.

    Attributes:
        checkpoint: the checkpoint.
        network: runs passes on the device.
        info: description that is sent to frontends and the hub.
        costs: cost table of the passes.
    """

    checkpoint: Checkpoint
    network: PackedPass
    info: ModelInfo
    costs: CostTable
    _rules: dict[tuple[str | float, int | None, int | None], tuple[BudgetRule, Outlook]] = field(
        default_factory=dict
    )

    @property
    def key(self) -> tuple[str, int]:
        """Name and version."""
        return self.checkpoint.name, self.checkpoint.version

    def rule(
        self, quality: str | float, heads: int | None, max_heads: int | None
    ) -> tuple[BudgetRule, Outlook]:
        """Return the budget rule of a request, and the steps that its texts are expected to run.

        Raises:
            PolicyError: the checkpoint does not have this quality or number of heads.
        """
        cached = self._rules.get((quality, heads, max_heads))
        if cached is None:
            # A checkpoint without quality levels is served by f_o alone.
            level = quality if self.checkpoint.calibrated else None
            rule = self.checkpoint.rule(level, heads, max_heads)
            cached = rule, Outlook.of(rule)
            if len(self._rules) == MAX_RULES:
                self._rules.clear()  # callers may ask for any number as quality
            self._rules[quality, heads, max_heads] = cached
        return cached


def load_model(
    path: Path,
    device: str,
    precision: Precision,
    tables: Mapping[str, CostTable],
    shared: Path | None = None,
    warm_up_steps: WarmUpSteps | None = None,
) -> LoadedModel:
    """Load, verify and warm up the checkpoint in a folder.

    Args:
        path: folder of the checkpoint.
        device: device of the network.
        precision: precision of its passes.
        tables: measured cost tables, by `name:version`.
        shared: folder of the weights that engines share; None: this engine holds its own copy.
        warm_up_steps: ladder steps to pack, by name of the model; steps that the ladder does not
            have are ignored. For other models, the steps that their quality levels use.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    started = time.monotonic()
    use_device(device)
    checkpoint = read_checkpoint(path)
    with mmap_large_blocks():
        network = _load(checkpoint, device, precision, shared)
        if shared is not None:
            _share(checkpoint, network, shared)
        try:
            chosen = (warm_up_steps or {}).get(checkpoint.name)
            steps = _steps_in_use(checkpoint) if chosen is None else chosen
            network.warm([step for step in steps if step <= len(checkpoint.ladder)])
        except BaseException:
            network.stop_sharing()
            raise
    seconds = time.monotonic() - started
    memory = network.nbytes
    info = ModelInfo(checkpoint.name, checkpoint.version, seconds, memory, network.precision)
    log.info(
        "model loaded",
        model=checkpoint.label,
        seconds=round(seconds, 3),
        dtype=network.precision,
        dtype_reason=network.precision_reason,
    )
    return LoadedModel(checkpoint, network, info, _costs(checkpoint, network, tables))


def _load(
    checkpoint: Checkpoint, device: str, precision: Precision, shared: Path | None
) -> PackedPass:
    """Load a network; with precision `fastest`, engines that share weights choose only once.

    The first engine times all precisions, and the others take its choice from a file. Otherwise
    engines might choose differently, and their measurements would disturb each other.
    """
    if precision != "fastest" or shared is None:
        return load_network(checkpoint, device, precision)
    name = hashlib.sha256(checkpoint.manifest.model_dump_json().encode()).hexdigest()
    with (shared / f"{name}-precision").open("a+") as choice:
        fcntl.flock(choice, fcntl.LOCK_EX)
        choice.seek(0)
        chosen = choice.read()
        if not chosen:
            network = load_network(checkpoint, device, precision)
            choice.write(network.precision)
            return network
    return load_network(checkpoint, device, cast(Precision, chosen))


def _share(checkpoint: Checkpoint, network: PackedPass, shared: Path) -> None:
    if network.device.type != "cpu":
        return
    try:
        network.share(shared / f"{checkpoint.manifest.files[WEIGHTS].sha256}-{network.precision}")
    except OSError as error:
        reason = error.strerror or str(error)
        log.warning("weights not shared", model=checkpoint.label, reason=reason)


def _costs(
    checkpoint: Checkpoint, network: PackedPass, tables: Mapping[str, CostTable]
) -> CostTable:
    """Return the measured table if it fits device, precision and ladder; else an estimate."""
    measured = tables.get(checkpoint.label)
    if measured is not None:
        actual = (network.device.type, network.precision, len(checkpoint.ladder) + 1)
        if actual == (measured.device, measured.dtype, len(measured.steps)):
            return measured
        log.warning(
            "cost table ignored: measured on another device or precision",
            model=checkpoint.label,
        )
    plans = [[0] * checkpoint.num_layers, *checkpoint.ladder]
    per_token = [encoder_macs(network.sizes, plan, TYPICAL_TOKENS) for plan in plans]
    macs = [0.0, *(count / TYPICAL_TOKENS for count in per_token[1:])]
    return guess_table(checkpoint.label, macs, *GUESSES[network.device.type])


def _steps_in_use(checkpoint: Checkpoint) -> list[int]:
    """Return the steps that the quality levels use; without levels, the full step.

    Other steps are packed at the first request for them, which waits for it.
    """
    steps = set() if checkpoint.calibrated else {len(checkpoint.ladder)}
    for name in checkpoint.manifest.named_levels:
        rule = checkpoint.rule(name)
        steps |= {band.step for band in rule.entry} | set(rule.chain)
    return sorted(steps - {0})
