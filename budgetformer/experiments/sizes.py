"""Compare checkpoints of encoders of different sizes at equal multiply-adds.

`python -m budgetformer.experiments.sizes SMALL LARGE --data test.parquet --out FOLDER`. A large
network at a small budget competes here with a small network at the same cost.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from budgetformer.checkpoint.loading import load_network
from budgetformer.checkpoint.store import Checkpoint, read_checkpoint
from budgetformer.errors import DataError
from budgetformer.experiments.report import paired
from budgetformer.training.calibration import Table, run_every_step
from budgetformer.training.chains import Route
from budgetformer.training.data import Examples, TokenizedTexts, read_examples
from budgetformer.training.pages import draw, markdown_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

THRESHOLDS = 200
COSTS = 8
"""Costs at which networks are compared, from the cheapest point of the large one to the full small
one."""


@dataclass(frozen=True)
class Frontier:
    """Accuracy and cost of one checkpoint's policy on N texts, by threshold.

    Attributes:
        name: of the checkpoint.
        macs: mean multiply-adds at each threshold, rising, [P].
        right: whether each text's answer is right at each threshold, [P, N].
        full: whether it is right with all heads, [N].
        dense: mean multiply-adds of the dense network.
    """

    name: str
    macs: np.ndarray
    right: np.ndarray
    full: np.ndarray
    dense: float

    @classmethod
    def of(cls, checkpoint: Checkpoint, examples: Examples) -> Frontier:
        """Return the frontier of a checkpoint, from running texts at every step.

        Raises:
            DataError: the checkpoint has no policy.
        """
        policy = checkpoint.manifest.policy
        if policy is None:
            raise DataError(f"{checkpoint.label} has no policy; calibrate it first")
        network = load_network(checkpoint)
        runs = run_every_step(network, TokenizedTexts.of(checkpoint, examples))
        table = Table(network.config, runs)
        right = table.right(torch.from_numpy(examples.labels))
        route = Route(policy.chain, policy.entry, policy.exit_margin)
        spread = np.quantile(table.confidence[list(policy.chain)], np.linspace(0, 1, THRESHOLDS))
        taken = [table.take(route, float(threshold)) for threshold in [*np.unique(spread), 1.0]]
        return cls(
            checkpoint.label,
            np.array([float(one.macs.mean()) for one in taken]),
            np.stack([right[one.step, table.rows] for one in taken]),
            right[-1],
            float(table.dense.mean()),
        )

    def within(self, cost: float) -> np.ndarray | None:
        """Return `right` [N] at the highest threshold within a cost; None if all exceed it."""
        places = np.flatnonzero(self.macs <= cost)
        return self.right[places[-1]] if len(places) else None


@dataclass(frozen=True)
class Compared:
    """Two networks at one mean cost in multiply-adds.

    small, large: accuracies; gain, low, high: of the large one over the small one in points, with
    its paired 95 % interval.
    """

    cost: float
    small: float
    large: float
    gain: float
    low: float
    high: float


def compare(small: Frontier, large: Frontier) -> list[Compared]:
    """Compare two networks at costs that both can reach."""
    cheapest = max(small.macs[1:].min(), large.macs[1:].min())
    found = []
    for cost in np.geomspace(cheapest, max(small.macs.max(), cheapest), COSTS):
        own, other = small.within(cost), large.within(cost)
        assert own is not None
        assert other is not None
        found.append(
            Compared(float(cost), float(own.mean()), float(other.mean()), *paired(other, own))
        )
    return found


def page(frontiers: Sequence[Frontier], compared: Sequence[Compared], source: str) -> str:
    """Return the comparison as Markdown."""
    count = len(frontiers[0].full)
    networks = [
        [f.name, f"{f.full.mean():.4f}", f"{f.dense / 1e6:.0f} M", f"{f.macs.max() / 1e6:.1f} M"]
        for f in frontiers
    ]
    rows = [
        [
            f"{c.cost / 1e6:.2f} M",
            f"{c.small:.4f}",
            f"{c.large:.4f}",
            f"{c.gain:+.2f} ({c.low:+.2f} to {c.high:+.2f})",
        ]
        for c in compared
    ]
    return "\n".join(
        [
            f"# A large network at a small budget, a small network at a larger one: {source}",
            "",
            f"{count} test texts, the same for both. Each network goes along its own chain; the "
            "threshold sets the mean cost.",
            "",
            markdown_table(["checkpoint", "all heads", "dense network", "highest level"], networks),
            "",
            f"At equal mean multiply-adds, {frontiers[1].name} against {frontiers[0].name} "
            "(points, paired 95 % interval):",
            "",
            markdown_table(["multiply-adds per text", "small", "large", "gain"], rows),
            "",
            "![Accuracy against multiply-adds](sizes.svg)",
            "",
        ]
    )


def main(arguments: list[str] | None = None) -> None:
    """Write the comparison to a folder."""
    parser = argparse.ArgumentParser(prog="python -m budgetformer.experiments.sizes")
    parser.add_argument("small", type=Path, help="checkpoint folder of the small encoder")
    parser.add_argument("large", type=Path, help="checkpoint folder of the large encoder")
    parser.add_argument("--data", type=Path, required=True, help="labelled texts that neither saw")
    parser.add_argument("--out", type=Path, required=True, help="folder of the report")
    given = parser.parse_args(arguments)
    checkpoints = [read_checkpoint(path) for path in (given.small, given.large)]
    labels = list(checkpoints[0].manifest.labels)
    frontiers = [Frontier.of(one, read_examples(given.data, labels)) for one in checkpoints]
    compared = compare(*frontiers)
    given.out.mkdir(parents=True, exist_ok=True)
    text = page(frontiers, compared, given.data.parent.name)
    (given.out / "README.md").write_text(text)
    figures: list[dict[str, Any]] = [asdict(one) for one in compared]
    (given.out / "sizes.json").write_text(json.dumps(figures, indent=1) + "\n")

    def fill(axes: Axes) -> None:
        for one in frontiers:
            axes.plot(one.macs[1:] / 1e6, one.right[1:].mean(1), label=one.name)
            axes.axhline(one.full.mean(), linestyle=":", color="grey")
        axes.set(xscale="log", xlabel="multiply-adds per text, millions", ylabel="accuracy")
        axes.legend(loc="lower right")

    draw([given.out / "sizes.png", given.out / "sizes.svg"], fill)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
