"""Write the model card of a checkpoint: README.md and a plot of accuracy against cost."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from budgetformer.checkpoint.manifest import CARD, FixedStep, Manifest
from budgetformer.inference.policy import Level, Measure
from budgetformer.training.evaluation import Row
from budgetformer.training.pages import draw, markdown_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLOT = "frontier.png"


def write_card(folder: Path, manifest: Manifest, test: list[Row]) -> None:
    """Write `README.md` and `frontier.png` for a checkpoint.

    Args:
        folder: folder of the checkpoint.
        manifest: manifest of the checkpoint.
        test: results of each quality level on test texts; empty: the data has none.
    """
    draw([folder / PLOT], partial(_plot, manifest=manifest), size=(7, 4.2))
    (folder / CARD).write_text(_text(manifest, test))


def _text(manifest: Manifest, test: list[Row]) -> str:
    origin = manifest.provenance
    measure = manifest.measure
    levels = markdown_table(
        ["quality", "threshold", measure, "95 %", f"drop of {measure}, points", "multiply-adds"]
        + ["mean heads"],
        [_level_cells(level, measure) for level in manifest.named_levels.values()],
    )
    steps = markdown_table(
        ["step", measure, "multiply-adds"],
        [
            [str(s.step), f"{_step_result(s, measure):.4f}", f"{s.macs_share:.1%}"]
            for s in manifest.frontier
        ],
    )
    report = _test_section(test) if test else ""
    recipe = "\n".join(f"{key} = {value!r}" for key, value in manifest.recipe.items())
    return f"""# {manifest.name}, version {manifest.version}

A BudgetFormer text classifier with the labels {", ".join(manifest.labels)}.
For each text, it computes only the attention heads and feed-forward neurons that the text needs.

- Starting weights: {origin.starting_weights} ({origin.starting_weights_license})
- Data: {origin.data}. Terms: {origin.data_terms}
- Longest input: {_longest_input(manifest)}
- Precision: stored in float16; served in {_precision(manifest)}
- Created: {manifest.created}, seed {manifest.seed}

{report}## Quality levels
{_levels_intro(manifest)}

{levels}

![Accuracy against cost]({PLOT})

{_cost_section(manifest)}## Fixed steps, for comparison
Every text ends at the same step. Multiply-adds are shares of the dense network's.

{steps}

## Limits
The model assigns one of its labels to any text, even if none fits. The accuracy was measured on the
data above, and may differ for other kinds of texts.

## Recipe
```
{recipe}
```
"""


def _test_section(test: list[Row]) -> str:
    table = markdown_table(
        ["quality", "accuracy", "95 %", "mean heads", "multiply-adds"]
        + ["share of texts that end at each step"],
        [
            [
                row.quality,
                f"{row.accuracy:.4f}",
                f"{row.low:.4f} to {row.high:.4f}",
                f"{row.mean_heads:.1f}",
                f"{row.macs_share:.1%}",
                ", ".join(f"{step}: {share:.1%}" for step, share in row.budgets.items()),
            ]
            for row in test
        ],
    )
    return f"""## Results on test texts
{test[0].rows} texts that were used neither for training nor for calibration. Multiply-adds are
shares of the dense network's.

{table}

"""


def _level_cells(level: Level, measure: Measure) -> list[str]:
    reached, (low, high) = level.reached(measure)
    return [
        str(level.name),
        f"{level.threshold:.4f}",
        f"{reached:.4f}",
        f"{low:.4f} to {high:.4f}",
        f"{level.points_lost:+.2f}",
        f"{level.macs_share:.1%}",
        f"{level.mean_heads:.1f}",
    ]


def _levels_intro(manifest: Manifest) -> str:
    """Return the text before the table of quality levels."""
    rows = f"{manifest.metrics.get('calibration_rows', 0):.0f} held-out texts"
    if manifest.policy is None:
        return (
            f"The levels were calibrated for accuracy on {rows}. Drops are relative to the full "
            "budget. Multiply-adds are shares of the dense network's."
        )
    definition = {
        "accuracy": "the share of correct answers",
        "agreement": "the share of answers that equal those of the full network, because the texts "
        "had no labels",
    }[manifest.measure]
    named = manifest.named_levels
    shares = markdown_table(
        ["quality", *(f"step {step}" for step in manifest.policy.chain)],
        [
            [name, *(f"{level.budgets.get(step, 0.0):.1%}" for step in manifest.policy.chain)]
            for name, level in named.items()
        ],
    )
    margin = manifest.policy.exit_margin
    exits = f" Step 0's confidence must exceed it by {margin:g}." if margin else ""
    return f"""Calibrated for {manifest.measure} on {rows}: {definition}.
A text runs the steps {", ".join(map(str, manifest.policy.chain))}, one after the other, until the
confidence of an answer reaches the threshold of the level.{exits} *f_o* may skip steps.
The figures are cross-fitted: no text is scored with a rule that was chosen on it. Drops are
relative to the full network, and multiply-adds are shares of the dense network's. Share of the
texts that end at each step:

{shares}
"""


def _cost_section(manifest: Manifest) -> str:
    """Return the section on time and price; empty if the time was not measured."""
    timing = manifest.timing
    if timing is None:
        return ""
    table = markdown_table(
        ["quality", "ms per text", "cost of a million texts"],
        [
            [name, f"{milliseconds:.3f}", timing.price_text(name)]
            for name, milliseconds in timing.milliseconds.items()
        ],
    )
    return f"""## Time and price
Measured on {timing.processor} with {timing.threads} threads in {timing.precision}, on
{timing.texts} texts in batches, with tokenization. A core costs {timing.core_hour_price:g} per
hour.

{table}

"""


def _step_result(step: FixedStep, measure: Measure) -> float:
    share = step.accuracy if measure == "accuracy" else step.agreement
    return 0.0 if share is None else share


def _plot(axes: Axes, manifest: Manifest) -> None:
    levels, steps, measure = manifest.levels, manifest.frontier, manifest.measure
    axes.plot(
        [100 * s.macs_share for s in steps],
        [_step_result(s, measure) for s in steps],
        "s--",
        color="#999",
        label="fixed step",
    )
    axes.plot(
        [100 * level.macs_share for level in levels],
        [level.reached(measure)[0] for level in levels],
        "o-",
        label="budget per text",
    )
    for name, level in manifest.named_levels.items():
        axes.annotate(
            name,
            (100 * level.macs_share, level.reached(measure)[0]),
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
        )
    axes.set_xlabel("multiply-adds, % of the dense network")
    axes.set_ylabel(f"{measure} on held-out texts")
    axes.legend(loc="lower right")


def _precision(manifest: Manifest) -> str:
    """Return which precision `choose_precision` selects for `--dtype auto`, in words."""
    rule = (
        "float32 if the encoder has fewer than a million weights; otherwise in bfloat16 on GPUs "
        "that support it and on processors with AMX"
    )
    if not manifest.ranges:
        return f"{rule}, else in float32 (int8 needs calibrated state ranges, which are missing)"
    return f"{rule}, in int8 on other processors with AVX2, else in float32"


def _longest_input(manifest: Manifest) -> str:
    encoder, step0 = f"{manifest.max_tokens} tokens", manifest.exit_tokens
    return encoder if step0 is None else f"{encoder} for the encoder, {step0} for step 0"
