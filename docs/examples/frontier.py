"""Plot the accuracy (or agreement) of a checkpoint's levels against their cost.

`python frontier.py MODEL_FOLDER PICTURE`.

All figures come from the manifest; no text is classified. Requires matplotlib.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

from budgetformer.checkpoint.store import read_checkpoint

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main(model: str, picture: str) -> None:
    checkpoint = read_checkpoint(Path(model))
    manifest = checkpoint.manifest
    levels = [(level, level.reached(manifest.measure)[0]) for level in manifest.levels]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(
        [100 * level.macs_share for level, _ in levels],
        [100 * reached for _, reached in levels],
        marker=".",
        label="a budget per text",
    )
    fixed = [(step, getattr(step, manifest.measure)) for step in manifest.frontier]
    axes.plot(
        [100 * step.macs_share for step, _ in fixed],
        [100 * reached for _, reached in fixed],
        marker=".",
        label="the same step for all",
    )
    for level, reached in levels:
        if level.name:
            point = (100 * level.macs_share, 100 * reached)
            axes.annotate(level.name, point, (0, 8), textcoords="offset points", ha="center")
    axes.set(xlabel="% of the dense network's multiply-adds", ylabel=f"{manifest.measure}, %")
    axes.set_title(f"{checkpoint.label} on its calibration texts")
    axes.legend()
    figure.savefig(picture)


if __name__ == "__main__":
    main(*sys.argv[1:])
