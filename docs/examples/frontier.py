"""Plot accuracy against cost of a checkpoint: `python frontier.py MODEL_FOLDER PICTURE`.

Everything is in its manifest: no text is classified. Needs matplotlib.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

from budgetformer.checkpoint import read_checkpoint

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main(model: str, picture: str) -> None:
    checkpoint = read_checkpoint(Path(model))
    points = checkpoint.manifest.operating_points
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(
        [100 * point.macs_share for point in points],
        [100 * point.accuracy for point in points],
        marker=".",
        label="a budget per text",
    )
    fixed = checkpoint.manifest.frontier
    axes.plot(
        [100 * step.macs_share for step in fixed],
        [100 * step.accuracy for step in fixed],
        marker=".",
        label="the same step for all",
    )
    for point in points:
        if point.name:
            place = (100 * point.macs_share, 100 * point.accuracy)
            axes.annotate(point.name, place, (0, 8), textcoords="offset points", ha="center")
    axes.set(xlabel="% of the dense network's multiply-adds", ylabel="accuracy, %")
    axes.set_title(f"{checkpoint.label} on its calibration texts")
    axes.legend()
    figure.savefig(picture)


if __name__ == "__main__":
    main(*sys.argv[1:])
