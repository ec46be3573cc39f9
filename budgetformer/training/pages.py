"""Markdown tables and plots for model cards and reports."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(
    paths: Sequence[Path], fill: Callable[[Axes], None], size: tuple[float, float] = (7.5, 4.5)
) -> None:
    """Draw a plot and write it to every path, in the format of the path's suffix.

    The same plot always gives the same bytes.

    Args:
        paths: files to write.
        fill: function that draws into the axes.
        size: width and height in inches.
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = paths[0].stem
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=size, dpi=110)
    fill(axes)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    for path in paths:
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
