"""Plots of runs."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from budgetformer.training.pages import draw
from service.simulation.fleet import Run
from service.simulation.server import LEVELS, OUTCOMES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BINS = 60


def draw_run(run: Run, path: Path) -> None:
    """Plot rates and latency over the arrival time of requests."""
    draw([path], partial(_over_time, run=run))


def _over_time(axes: Axes, run: Run) -> None:
    edges = np.linspace(0, float(run.arrived.max(initial=1.0)), BINS + 1)
    bins = np.clip(np.digitize(run.arrived, edges) - 1, 0, BINS - 1)
    scale = run.fleet.servers / run.fleet.sample / (edges[1] - edges[0])
    answered = run.outcome == OUTCOMES.index("answered")
    lowered = answered & (run.level == LEVELS.index("fast"))
    middles = (edges[:-1] + edges[1:]) / 2
    for name, chosen, colour in (
        ("sent", np.ones_like(answered), "tab:gray"),
        ("answered", answered, "tab:blue"),
        ("of these, at `fast`", lowered, "tab:orange"),
    ):
        counts = np.bincount(bins[chosen], minlength=BINS) * scale
        axes.plot(middles, counts, label=name, color=colour)
    axes.set_xlabel("seconds")
    axes.set_ylabel("requests per second")
    axes.set_ylim(bottom=0)
    times = axes.twinx()
    p99 = [
        np.quantile(latencies, 0.99) * 1000
        if len(latencies := run.latency[answered & (bins == n)])
        else np.nan
        for n in range(BINS)
    ]
    times.plot(middles, p99, "--", label="p99, ms", color="tab:red")
    times.set_yscale("log")
    times.set_ylabel("p99, ms")
    lines = [*axes.get_lines(), *times.get_lines()]
    axes.legend(lines, [str(line.get_label()) for line in lines], fontsize=8, loc="upper left")
