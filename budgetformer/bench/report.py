"""Time all contenders, and write the results as Markdown, JSON and a plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from budgetformer.bench.dense_twin import DENSE, baseline_contenders
from budgetformer.bench.passes import (
    level_contenders,
    picking_contender,
    small_step,
    step_contenders,
    step_name,
)
from budgetformer.bench.timing import (
    Contender,
    Machine,
    Timing,
    TokenIds,
    time_in_turns,
    token_ids,
)
from budgetformer.checkpoint.store import Checkpoint
from budgetformer.cost.processor import processor_name
from budgetformer.inference.precision_choice import load_pass
from budgetformer.model.configuration import BudgetFormerConfig
from budgetformer.model.modeling import load_model
from budgetformer.training.pages import draw, markdown_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BATCHES = (1, 4, 8, 16, 32, 64)
MAX_ROUNDS = 64


@dataclass(frozen=True)
class BenchReport:
    """The timings of every contender at every batch size.

    Attributes:
        model: label of the checkpoint.
        texts: description of the texts.
        tokens: mean length of the texts, in tokens.
        machine: measured peak rates of the processor.
        facts: description of the processor and the software.
        full: name of the full step's contender, in the precision that a server selects here.
        timings: timings of all contenders, by batch size.
    """

    model: str
    texts: str
    tokens: float
    machine: Machine
    facts: dict[str, str]
    full: str
    timings: tuple[Timing, ...]

    def ratio(self, timing: Timing, to: str) -> float | None:
        """Return a time divided by that of the contender `to` at the same batch size, if any."""
        for other in self.timings:
            if other.name == to and other.batch == timing.batch:
                return timing.mean / other.mean
        return None

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain values, with times in milliseconds per text."""
        return {
            "model": self.model,
            "texts": self.texts,
            "mean_tokens": self.tokens,
            "full": self.full,
            "machine": self.facts
            | {f"{p}_gmacs_per_second": rate / 1e9 for p, rate in self.machine.macs.items()}
            | {"copy_gbytes_per_second": self.machine.bandwidth / 1e9},
            "timings": [
                {
                    "name": t.name,
                    "batch": t.batch,
                    "to_dense": self.ratio(t, DENSE),
                    "to_full": self.ratio(t, self.full),
                    "ms_per_text": 1000 * t.mean / t.batch,
                    "quartiles_ms_per_text": [1000 * q / t.batch for q in t.quartiles],
                    "limit_share": t.limit / t.mean if t.limit else None,
                }
                for t in self.timings
            ],
        }

    def rows(self, batch: int) -> list[list[str]]:
        """Return the table rows of one batch size."""

        def share(value: float | None) -> str:
            return "" if value is None else f"{value:.2f}"

        lines = []
        for timing in (t for t in self.timings if t.batch == batch):
            low, _, high = (1000 * q / batch for q in timing.quartiles)
            lines.append(
                [
                    timing.name,
                    share(self.ratio(timing, DENSE)),
                    share(self.ratio(timing, self.full)),
                    f"{1000 * timing.mean / batch:.3f}",
                    f"{low:.3f} to {high:.3f}",
                    share(timing.limit / timing.mean if timing.limit else None),
                ]
            )
        return lines

    @property
    def batches(self) -> list[int]:
        """The batch sizes."""
        return sorted({timing.batch for timing in self.timings})


COLUMNS = ["contender", "/ dense", "/ full step", "ms per text", "quartiles", "limit / time"]


def compare_passes(
    checkpoint: Checkpoint,
    texts: Sequence[str] | None = None,
    batches: Sequence[int] = BATCHES,
    rounds: int = 9,
    threads: int = 1,
    baselines: bool = True,
) -> BenchReport:
    """Time every step, every quality level and the dense network in turns on this CPU.

    Args:
        checkpoint: checkpoint to time.
        texts: real texts; None: random tokens, and no quality levels, because the steps that random
            tokens need are meaningless.
        batches: batch sizes.
        rounds: minimum number of rounds, each on other texts; small batches get more.
        threads: number of threads of every contender.
        baselines: whether to time the dense network in other libraries.

    Raises:
        ValueError: there are fewer than two texts.
    """
    if texts is not None and len(texts) < 2:
        raise ValueError(f"at least two texts are required, not {len(texts)}")
    torch.set_num_threads(threads)
    model = load_model(checkpoint.path)
    chosen = load_pass(model, "auto", checkpoint.manifest.ranges)
    count = rounds * max(batches)
    items = token_ids(checkpoint, None if texts is None else texts[:count], count)
    networks = [chosen]
    if chosen.precision != "float32":
        networks.insert(0, load_pass(model))
    precisions = [network.precision for network in networks]
    machine = Machine.measure(precisions)
    last = chosen.config.num_steps
    contenders: list[Contender] = []
    for network in networks:
        contenders += step_contenders(network, range(1, last + 1), machine)
        if texts is not None:
            contenders += level_contenders(network, checkpoint)
    if not chosen.sizes.picks_heads:
        assert isinstance(model.config, BudgetFormerConfig)
        contenders.append(picking_contender(model.config, small_step(last)))
    if baselines:
        contenders += baseline_contenders(model, threads, "bfloat16" in precisions)
    timings: list[Timing] = []
    for batch in batches:
        turns = max(rounds, min(MAX_ROUNDS, len(items) // batch))
        timings += time_in_turns(contenders, [_round(items, turn, batch) for turn in range(turns)])
    return BenchReport(
        model=checkpoint.label,
        texts="random tokens" if texts is None else f"{len(texts)} real texts",
        tokens=sum(map(len, items)) / len(items),
        machine=machine,
        facts=_facts(threads),
        full=step_name(chosen.precision, last),
        timings=tuple(timings),
    )


def write_bench_report(report: BenchReport, folder: Path) -> None:
    """Write `README.md`, `report.json` and the plot to `folder`, which is created if necessary."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report.as_dict(), indent=1) + "\n")
    tables = "\n\n".join(
        f"## Batches of {batch}\n\n{markdown_table(COLUMNS, report.rows(batch))}"
        for batch in report.batches
    )
    facts = ", ".join(f"{name} {value}" for name, value in report.facts.items())
    machine = report.machine
    rates = ", ".join(f"{rate / 1e9:.0f} in {name}" for name, rate in machine.macs.items())
    (folder / "README.md").write_text(
        f"""# Time of the compact pass of {report.model}

Texts: {report.texts}, {report.tokens:.0f} tokens on average. Machine: {facts}. Measured peak rates:
one large matrix product runs at {rates} (billions of multiply-adds per second), and one large copy
at {machine.bandwidth / 1e9:.1f} GB/s.

The contenders took turns. Each round had other texts, the same for all contenders; times are means
over the rounds. "/ dense" is the time divided by that of the dense network in Transformers
(float32, padded to the longest text), and "/ full step" by that of `{report.full}`. "limit / time"
is the minimum time at the peak rates (for the multiply-adds, or for reading the weights once if
that takes longer), divided by the measured time.

![time against batch size](passes.svg)

{tables}
"""
    )
    draw([folder / "passes.png", folder / "passes.svg"], partial(_plot, report=report))


def _plot(axes: Axes, report: BenchReport) -> None:
    names = [t.name for t in report.timings if t.batch == report.batches[0]]
    shown = [n for n in names if not n.startswith("step ") or n == report.full]
    for name in shown:
        timings = [t for t in report.timings if t.name == name]
        style = "--" if name.startswith("dense") else "-"
        xs, ys = [t.batch for t in timings], [1000 * t.mean / t.batch for t in timings]
        axes.plot(xs, ys, style, marker="o", markersize=3, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("texts per batch")
    axes.set_ylabel("ms per text")
    axes.legend(fontsize=7)


def _round(items: Sequence[TokenIds], turn: int, batch: int) -> list[TokenIds]:
    """Return the texts of a round; the last ones are followed by the first."""
    return [items[(turn * batch + i) % len(items)] for i in range(batch)]


def _facts(threads: int) -> dict[str, str]:
    return {
        "processor": processor_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": str(threads),
        "torch": torch.__version__,
    }
