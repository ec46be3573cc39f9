"""Compare a large network at a small budget with a small network at the same cost.

`python -m budgetformer.experiments.sizes SMALL LARGE --data test.parquet --out FOLDER` writes a
report.
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
from budgetformer.experiments.report import paired_gain
from budgetformer.training.calibration import AnswerTable, run_every_step
from budgetformer.training.chains import Route
from budgetformer.training.data import Examples, TokenizedTexts, read_examples
from budgetformer.training.pages import draw, markdown_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

THRESHOLDS = 200
"""Number of quantiles of the confidences at the steps of a chain, which serve as thresholds."""
COSTS = 8
"""Number of costs at which the networks are compared, evenly spaced on a logarithmic scale."""


@dataclass(frozen=True)
class Frontier:
    """Accuracy and cost of one checkpoint's policy on N texts at P thresholds, in rising order.

    Attributes:
        name: label of the checkpoint.
        macs: mean multiply-adds per text at each threshold, [P], rising.
        correct: whether each text's answer is correct at each threshold, [P, N].
        correct_with_all_heads: whether each text's answer is correct with all heads, [N].
        dense_macs: mean multiply-adds per text of the dense network.
    """

    name: str
    macs: np.ndarray
    correct: np.ndarray
    correct_with_all_heads: np.ndarray
    dense_macs: float

    @classmethod
    def of(cls, checkpoint: Checkpoint, examples: Examples) -> Frontier:
        """Run texts at every step of a checkpoint, and return its frontier.

        Raises:
            DataError: the checkpoint has no policy.
        """
        policy = checkpoint.manifest.policy
        if policy is None:
            raise DataError(f"{checkpoint.label} has no policy; calibrate it first")
        network = load_network(checkpoint)
        tokens = TokenizedTexts.of(checkpoint, examples)
        table = AnswerTable(network.config, run_every_step(network, tokens))
        correct = table.right(torch.from_numpy(examples.labels))
        route = Route(policy.chain, policy.entry, policy.exit_margin)
        thresholds = np.quantile(
            table.confidence[list(policy.chain)], np.linspace(0, 1, THRESHOLDS)
        )
        points = [table.answer_on(route, float(t)) for t in [*np.unique(thresholds), 1.0]]
        return cls(
            checkpoint.label,
            np.array([float(point.macs.mean()) for point in points]),
            np.stack([correct[point.step, table.rows] for point in points]),
            correct[-1],
            float(table.dense.mean()),
        )

    def correct_within(self, cost: float) -> np.ndarray | None:
        """Return whether each answer is correct, [N], at the highest threshold within a mean cost.

        None if the cost of every threshold is higher.
        """
        points = np.flatnonzero(self.macs <= cost)
        return self.correct[points[-1]] if len(points) else None


@dataclass(frozen=True)
class Comparison:
    """Two networks at the same mean cost.

    Attributes:
        cost: mean multiply-adds per text.
        small: accuracy of the small network, 0..1.
        large: accuracy of the large network, 0..1.
        gain: accuracy of the large network minus that of the small one, in percentage points.
        low, high: ends of the paired 95 % interval of the gain, in percentage points.
    """

    cost: float
    small: float
    large: float
    gain: float
    low: float
    high: float


def compare(small: Frontier, large: Frontier) -> list[Comparison]:
    """Return comparisons at `COSTS` mean costs.

    They range from the lowest cost that both networks can meet to the small network's highest.
    """
    # At the first threshold nearly all texts stop at the first step. If that is step 0, the cost is
    # almost zero, and on a logarithmic scale most of the compared costs would lie just above it.
    cheapest = max(small.macs[1:].min(), large.macs[1:].min())
    comparisons = []
    for cost in np.geomspace(cheapest, max(small.macs.max(), cheapest), COSTS):
        of_small, of_large = small.correct_within(cost), large.correct_within(cost)
        assert of_small is not None
        assert of_large is not None
        accuracies = float(of_small.mean()), float(of_large.mean())
        comparisons.append(Comparison(float(cost), *accuracies, *paired_gain(of_large, of_small)))
    return comparisons


def page(frontiers: Sequence[Frontier], comparisons: Sequence[Comparison], source: str) -> str:
    """Return the comparison as Markdown; `source` names the texts."""
    count = len(frontiers[0].correct_with_all_heads)
    networks = [
        [
            f.name,
            f"{f.correct_with_all_heads.mean():.4f}",
            f"{f.dense_macs / 1e6:.0f} M",
            f"{f.macs.max() / 1e6:.1f} M",
        ]
        for f in frontiers
    ]
    rows = [
        [
            f"{c.cost / 1e6:.2f} M",
            f"{c.small:.4f}",
            f"{c.large:.4f}",
            f"{c.gain:+.2f} ({c.low:+.2f} to {c.high:+.2f})",
        ]
        for c in comparisons
    ]
    return "\n".join(
        [
            f"# A large network at a small budget, compared with a small network: {source}",
            "",
            f"Both networks classify the same {count} test texts, each with its own chain of "
            "steps. The threshold sets the mean cost.",
            "",
            markdown_table(
                ["checkpoint", "accuracy with all heads", "multiply-adds of the dense network"]
                + ["maximum of the policy"],
                networks,
            ),
            "",
            f"Accuracy of {frontiers[0].name} (small) and {frontiers[1].name} (large) at equal "
            "mean multiply-adds; the gain is in percentage points, with its paired 95 % interval:",
            "",
            markdown_table(["multiply-adds per text", "small", "large", "gain"], rows),
            "",
            "![Accuracy against multiply-adds](sizes.svg)",
            "",
        ]
    )


def main(arguments: list[str] | None = None) -> None:
    """Compare two checkpoints, and write the report, its figures and a plot to a folder.

    Raises:
        DataError: the checkpoints have different labels, one has no policy, or the data is invalid.
    """
    parser = argparse.ArgumentParser(prog="python -m budgetformer.experiments.sizes")
    parser.add_argument("small", type=Path, help="checkpoint folder of the small encoder")
    parser.add_argument("large", type=Path, help="checkpoint folder of the large encoder")
    parser.add_argument(
        "--data", type=Path, required=True, help="labelled texts that were not used in training"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the report")
    given = parser.parse_args(arguments)
    small, large = read_checkpoint(given.small), read_checkpoint(given.large)
    if small.manifest.labels != large.manifest.labels:
        raise DataError(
            f"{small.label} and {large.label} must have the same labels in the same order"
        )
    examples = read_examples(given.data, list(small.manifest.labels))
    frontiers = [Frontier.of(checkpoint, examples) for checkpoint in (small, large)]
    comparisons = compare(*frontiers)
    given.out.mkdir(parents=True, exist_ok=True)
    text = page(frontiers, comparisons, given.data.resolve().parent.name)
    (given.out / "README.md").write_text(text)
    figures: list[dict[str, Any]] = [asdict(comparison) for comparison in comparisons]
    (given.out / "sizes.json").write_text(json.dumps(figures, indent=1) + "\n")

    def fill(axes: Axes) -> None:
        for frontier in frontiers:
            axes.plot(frontier.macs[1:] / 1e6, frontier.correct[1:].mean(1), label=frontier.name)
            axes.axhline(frontier.correct_with_all_heads.mean(), linestyle=":", color="grey")
        axes.set(xscale="log", xlabel="multiply-adds per text, millions", ylabel="accuracy")
        axes.legend(loc="lower right")

    draw([given.out / "sizes.png", given.out / "sizes.svg"], fill)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
