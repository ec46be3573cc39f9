"""The model card of a checkpoint: README.md and the plot of its frontier."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from budgetformer.checkpoint import CARD, Manifest
from budgetformer.training.evaluation import Row
from budgetformer.training.pages import draw

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLOT = "frontier.png"


def write_card(folder: Path, manifest: Manifest, test: list[Row]) -> None:
    """Write `README.md` and `frontier.png` for a checkpoint.

    `test` is its report on test texts, if any.
    """
    draw([folder / PLOT], partial(_plot, manifest=manifest), size=(7, 4.2))
    (folder / CARD).write_text(_text(manifest, test))


def _text(manifest: Manifest, test: list[Row]) -> str:
    origin = manifest.provenance
    levels = "\n".join(
        f"| {p.name} | {p.accuracy:.4f} | {p.points_lost:+.2f} | {p.macs_share:.1%} "
        f"| {p.mean_heads:.1f} |"
        for p in manifest.operating_points
        if p.name
    )
    steps = "\n".join(
        f"| {s.step} | {s.accuracy:.4f} | {s.macs_share:.1%} |" for s in manifest.frontier
    )
    tested = "\n".join(
        f"| {r.quality} | {r.accuracy:.4f} | {r.low:.4f} to {r.high:.4f} | {r.mean_heads:.1f} "
        f"| {r.macs_share:.1%} | {', '.join(str(b) for b in r.budgets)} |"
        for r in test
    )
    report = (
        f"""## On test texts
{test[0].rows} texts that neither training nor calibration saw; 95 % intervals.

| quality | accuracy | interval | mean heads | multiply-adds of dense | budgets in use |
|---|---|---|---|---|---|
{tested}

"""
        if test
        else ""
    )
    recipe = "\n".join(f"{key} = {value!r}" for key, value in manifest.recipe.items())
    return f"""# {manifest.name}, version {manifest.version}

A BudgetFormer text classifier with the labels {", ".join(manifest.labels)}.
It spends on each text only the attention heads, and with them the feed-forward neurons, that the
text needs.

- Starting weights: {origin.starting_weights} ({origin.starting_weights_license})
- Data: {origin.data}. Terms: {origin.data_terms}
- Longest input: {_longest(manifest)}
- Precision: weights in float16 as stored; multiplied in float32, or in bfloat16 where the processor
  gains by it, which is timed as the model loads (`budgetformer_model_info` names it)
- Made: {manifest.created}, seed {manifest.seed}

{report}## Quality levels
Calibrated on {manifest.metrics.get("calibration_rows", 0):.0f} held-out texts.

| quality | accuracy | points lost against the full budget | multiply-adds of dense | mean heads |
|---|---|---|---|---|
{levels}

![Accuracy against cost]({PLOT})

## Fixed steps, for comparison
| step | accuracy | multiply-adds of dense |
|---|---|---|
{steps}

## Limits
Trained for the labels above; any other text gets one of them all the same. Accuracy is that of
the data named above and says nothing of texts of another kind or time.

## Recipe
```
{recipe}
```
"""


def _plot(axes: Axes, manifest: Manifest) -> None:
    points, steps = manifest.operating_points, manifest.frontier
    axes.plot(
        [100 * s.macs_share for s in steps],
        [s.accuracy for s in steps],
        "s--",
        color="#999",
        label="fixed step",
    )
    axes.plot(
        [100 * p.macs_share for p in points],
        [p.accuracy for p in points],
        "o-",
        label="budget per text",
    )
    for point in points:
        if point.name:
            axes.annotate(
                point.name,
                (100 * point.macs_share, point.accuracy),
                xytext=(0, 8),
                textcoords="offset points",
                ha="center",
            )
    axes.set_xlabel("multiply-adds, % of the dense network")
    axes.set_ylabel("accuracy on held-out texts")
    axes.legend(loc="lower right")


def _longest(manifest: Manifest) -> str:
    encoder = f"{manifest.max_tokens} tokens"
    more = manifest.exit_tokens
    return encoder if more is None else f"{encoder} for the encoder, {more} for step 0"
