"""Write a frontier report as Markdown, JSON and plots (PNG and SVG)."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from budgetformer.experiments.report import Report
from budgetformer.experiments.routing import AT, Routing
from budgetformer.training.pages import draw, markdown_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAGE = "README.md"
EQUAL = "multiply-adds at the first row's accuracy"
MAX_BARS = 20
"""Maximum number of classes shown; of more, those with the most and those with the fewest heads."""


def write_report(report: Report, folder: Path) -> None:
    """Write `README.md`, `report.json` and the plots to `folder`, created if necessary."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(asdict(report), indent=1) + "\n")
    (folder / PAGE).write_text(report_text(report))
    for name, fill in (("frontier", _frontier), ("difficulty", _difficulty), ("classes", _classes)):
        draw([folder / f"{name}.png", folder / f"{name}.svg"], partial(fill, report=report))


def report_text(report: Report) -> str:
    """Return the report as Markdown."""
    timed = sorted({batch for way in report.ways for batch in way.milliseconds})
    steps = ", ".join(map(str, report.chain))
    chain = f"The levels use the chain of steps {steps}. " if steps else ""
    columns = ["method", "accuracy", "95 %", "macro-F1", "ECE", "multiply-adds", "mean heads"]
    columns += [f"ms per text, batch {batch}" for batch in timed]
    ways = [
        [
            way.name,
            f"{way.accuracy:.4f}",
            f"{way.low:.4f} to {way.high:.4f}",
            f"{way.macro_f1:.4f}",
            f"{way.ece:.3f}",
            f"{way.macs_share:.1%}",
            f"{way.mean_heads:.1f}",
            *(f"{ms:.2f}" if (ms := way.milliseconds.get(b)) else "" for b in timed),
        ]
        for way in report.ways
    ]
    final_steps = [
        [way.name, ", ".join(f"{step}: {share:.1%}" for step, share in way.budgets.items())]
        for way in report.ways
        if way.name in report.heads_by_class
    ]
    stated = [
        [
            level.name,
            "{:.4f} ({:.4f} to {:.4f})".format(level.share, *level.interval),
            f"{level.measured:.4f}",
            "{:.1%} ({:.1%} to {:.1%})".format(level.macs_share, *level.macs_interval),
            f"{level.measured_macs:.1%}",
        ]
        for level in report.stated
    ]
    routing, lengths = _routing(report.routing), _routing(report.lengths)
    baselines = [
        [
            c.level or "unnamed",
            f"{c.macs_share:.1%}",
            f"{c.accuracy:.4f}",
            c.baseline,
            f"{c.baseline_accuracy:.4f}",
            f"{c.gain:+.2f}",
            f"{c.low:+.2f} to {c.high:+.2f}",
        ]
        for c in report.comparisons
    ]
    difficulty = [
        [
            d.level,
            f"{d.heads_if_wrong:.1f}",
            f"{d.heads_if_right:.1f}",
            f"{d.macs_if_wrong:.1%}",
            f"{d.macs_if_right:.1%}",
            f"{d.ratio:.2f}",
        ]
        for d in report.difficulty
    ]
    classes = sorted(report.heads_by_class.get("balanced", {}).items(), key=lambda x: -x[1])
    if len(classes) > MAX_BARS:
        classes = classes[: MAX_BARS // 2] + classes[-MAX_BARS // 2 :]
    return f"""# {report.model} on {report.rows} test texts

Levels and steps are measured in {report.precision} on {report.processor}
(torch threads: {report.threads}). Another precision changes a few answers.

Multiply-adds are shares of the dense network's, and include decisions and all escalations. "dense"
is the starting encoder, fine-tuned without budgets for the same number of epochs; its time is that
of the full step, which computes as much. The smaller dense networks keep some of its layers and
heads, and were trained for the same number of epochs again on the labels and on its answers. The
oracle gives each text the smallest step whose answer is right.

## All methods
{markdown_table(columns, ways)}

![Accuracy against cost](frontier.png)

## Final steps
{chain}The levels were calibrated for {report.measure}. Share of the texts that end at each step:

{markdown_table(["level", "steps"], final_steps)}

## Stated and measured
What the calibration states for texts like its own, with 95 % intervals, and the same on these
texts.

{
        markdown_table(
            ["level", f"stated {report.measure}", "measured"]
            + ["stated multiply-adds", "measured multiply-adds"],
            stated,
        )
    }

## Gain from f_o's choice of steps
The rows choose the steps of texts that step 0 does not answer. Each has its best chain, chosen and
scored on different parts of these texts. A cell is the accuracy within a limit of multiply-adds,
and the multiply-adds.

{
        markdown_table(
            ["choice of steps", *(f"within {c:.0%}" for c in AT), EQUAL],
            routing,
        )
    }

## Gain from more steps
The best chains with this number of steps (including step 0), chosen and scored in the same way.

{markdown_table(["steps", *(f"within {c:.0%}" for c in AT), EQUAL], lengths)}

## At equal mean cost
The budget per text, calibrated on other texts, compared with the best mixture of each baseline at
exactly the same mean multiply-adds. The baselines' thresholds and mixtures are chosen on these test
texts, so the gain is a lower bound. Gains are in accuracy points, with paired 95 % intervals.

{
        markdown_table(
            ["level", "multiply-adds", "accuracy", "baseline", "accuracy of the baseline"]
            + ["gain", "95 %"],
            baselines,
        )
    }

## Budget and difficulty
Mean cost of the texts that the dense network classifies wrongly, and of those that it classifies
correctly.

{
        markdown_table(
            [
                "level",
                "heads if wrong",
                "heads if right",
                "multiply-adds if wrong",
                "multiply-adds if right",
                "ratio",
            ],
            difficulty,
        )
    }

![Heads by confidence of the dense network](difficulty.png)

## Budget by class, level "balanced"
{markdown_table(["class", "mean heads"], [[name, f"{heads_:.1f}"] for name, heads_ in classes])}

![Heads by class](classes.png)
"""


def _routing(rows: list[Routing]) -> list[list[str]]:
    return [
        [
            row.way,
            *(f"{a:.4f} at {c:.1%}" for a, c in zip(row.accuracy, row.cost, strict=True)),
            f"{row.equal_cost:.1%}",
        ]
        for row in rows
    ]


def _frontier(axes: Axes, report: Report) -> None:
    marks = {"budget per text": "o-", "fixed step": "s--"}
    for curve in report.curves:
        mark = marks.get(curve.name, ".:")
        axes.plot([100 * c for c in curve.cost], curve.accuracy, mark, label=curve.name)
    levels: dict[tuple[float, float], list[str]] = {}
    for way in report.ways:
        if way.name == "dense":
            axes.plot(100, way.accuracy, "k*", markersize=11, label="dense")
        elif way.name in report.heads_by_confidence:
            levels.setdefault((100 * way.macs_share, way.accuracy), []).append(way.name)
    for point, names in levels.items():
        label = ", ".join(names)
        axes.annotate(label, point, xytext=(0, 9), textcoords="offset points", ha="center")
    best = max(way.accuracy for way in report.ways if way.name != "oracle")
    lowest = min(accuracy for curve in report.curves for accuracy in curve.accuracy)
    axes.set_ylim(max(lowest, best - 0.06) - 0.002, best + 0.006)
    axes.set_xlim(-1, 102)
    axes.set_xlabel("multiply-adds, % of the dense network")
    axes.set_ylabel(f"accuracy on {report.rows} test texts")
    axes.legend(loc="lower right")


def _difficulty(axes: Axes, report: Report) -> None:
    for level, heads in report.heads_by_confidence.items():
        axes.plot(range(1, len(heads) + 1), heads, "o-", label=level)
    axes.set_xlabel("tenth of the texts, by rising confidence of the dense network")
    axes.set_ylabel("mean heads computed")
    axes.legend()


def _classes(axes: Axes, report: Report) -> None:
    classes = sorted(report.heads_by_class.get("balanced", {}).items(), key=lambda x: x[1])
    if len(classes) > MAX_BARS:
        classes = classes[: MAX_BARS // 2] + classes[-MAX_BARS // 2 :]
    axes.barh([name for name, _ in classes], [heads for _, heads in classes])
    axes.set_xlabel('mean heads computed, level "balanced"')
