"""Report a checkpoint's quality levels on a set of texts, in one table and one plot."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from budgetformer.checkpoint.manifest import FULL, Timing
from budgetformer.training.evaluation import Row
from budgetformer.training.pages import draw, markdown_table
from budgetformer.wilson import interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAGE, PLOT = "levels.md", "levels.png"
COLUMNS = (
    *("quality", "agreement", "95 %", "accuracy", "multiply-adds", "ms per text"),
    *("cost of a million texts",),
)


def level_cells(rows: Sequence[Row], timing: Timing) -> list[list[str]]:
    """Return the rows of the report's table, with `COLUMNS`."""
    return [
        [
            row.quality,
            f"{row.agreement:.4f}",
            "{:.4f}..{:.4f}".format(*interval(row.agreement, row.rows)),
            "" if row.accuracy is None else f"{row.accuracy:.4f}",
            f"{row.macs_share:.1%}",
            f"{timing.milliseconds[row.quality]:.3f}",
            timing.price_text(row.quality),
        ]
        for row in rows
    ]


def write_levels(label: str, rows: Sequence[Row], timing: Timing, folder: Path) -> None:
    """Write `levels.md` and `levels.png` to a folder, which is created if necessary.

    Args:
        label: label of the checkpoint.
        rows: agreement, accuracy and cost of its levels.
        timing: measured time of its levels.
        folder: folder to write to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    draw([folder / PLOT], partial(_plot, rows=rows, timing=timing), size=(7, 4.2))
    table = markdown_table(COLUMNS, level_cells(rows, timing))
    (folder / PAGE).write_text(f"""# {label} on {rows[0].rows} texts

Agreement is the share of answers that equal those of the full budget. Multiply-adds are shares of
the dense network's. Times were measured on {timing.processor} with {timing.threads} threads in
{timing.precision}, in batches, with tokenization. A core costs {timing.core_hour_price:g} per hour.

{table}

![Agreement against time]({PLOT})
""")


def _plot(axes: Axes, rows: Sequence[Row], timing: Timing) -> None:
    times = [timing.milliseconds[row.quality] for row in rows]
    axes.plot(times, [row.agreement for row in rows], "o-", label="agreement with the full budget")
    if all(row.accuracy is not None for row in rows):
        axes.plot(times, [row.accuracy or 0.0 for row in rows], "s--", label="accuracy")
    for row, milliseconds in zip(rows, times, strict=True):
        name = "full" if row.quality == FULL else row.quality
        axes.annotate(
            name,
            (milliseconds, row.agreement),
            xytext=(0, -14),
            textcoords="offset points",
            ha="center",
        )
    axes.set_xlim(left=0)
    axes.set_xlabel("milliseconds per text")
    axes.set_ylabel(f"share of {rows[0].rows} texts")
    axes.legend(loc="lower right")
