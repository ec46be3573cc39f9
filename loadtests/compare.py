"""This service beside what a user would serve instead, in turns, on the same texts and cores.

    make baselines    # once: environments for LitServe, BentoML, Infinity and Ray Serve
    python loadtests/compare.py --data test.parquet --out docs/benchmarks/service [--repeats 3]

The server has the first cores, the client the last one. Everybody gets single texts: one caller at
a time, then as fast as 32 callers are answered, then half of that rate on a schedule that does not
wait. The baselines serve the checkpoint's full step as a dense network with the same weights
(loadtests/contenders.py); who is not there, or does not start, is named. Repeats are appended to
`repeats.json` in the folder, and the report is written anew from all of them; `--repeats 0` only
writes it. Without `--data` texts are made up, and right is what the dense network says.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import uvloop
from baselines.network import Network
from contenders import CONTENDERS, DENSE, ENVIRONMENTS, FLOOR, OURS, PIPELINE, Contender, first
from openloop import Client, Phase, limit_lines, quantile
from promises import Promise, spread
from servers import Cores, Server, ours, run_quietly
from texts import texts_of

from budgetformer.cost.processor import processor_name
from budgetformer.training.data import read_examples
from budgetformer.training.pages import draw, markdown_table

CALLERS = 32
ENOUGH = 100
"""Minimum number of latencies for a 99th percentile."""
WARM_UP = 2.0
MADE_UP = 300
RIGHT = 0.8
"""Share of right answers below which a server is broken: the least accurate level has .92."""


@dataclass
class Measured:
    """What one way to serve did in one repeat. Seconds, MiB, and texts a second."""

    name: str
    throughput: float
    lone_p50: float
    half_p50: float
    half_p99: float
    half_rate: float
    cpu_per_thousand: float
    frontend_per_thousand: float
    memory: float
    start: float
    answered: int
    right: int
    unanswered: int
    client_busy: float
    late_p99: float
    tails: dict[str, float] = field(default_factory=dict)
    """At half load: p99 of p50 among texts that ran the same steps, by these."""


@dataclass(frozen=True)
class Plan:
    """What everybody is given.

    Attributes:
        network: folder of the dense network.
        texts: to send, in this order.
        labels: that are right.
        seconds: of a phase.
        cores: of the server and of the client.
    """

    network: Path
    texts: Sequence[str]
    labels: Sequence[str]
    seconds: float
    cores: Cores

    @classmethod
    def of(cls, checkpoint: Path, data: Path | None, seconds: float) -> Plan:
        """Export the dense network where that is not done, and read or make up texts."""
        network = ENVIRONMENTS / "networks" / f"{checkpoint.parent.name}-{checkpoint.name}"
        if not network.exists():
            run_quietly([sys.executable, "loadtests/baselines/export.py", checkpoint, network])
        if data is None:
            texts = texts_of(None, MADE_UP)
            labels = dense_labels(network, texts)
        else:
            texts, labels = texts_and_labels(data)
        return cls(network, texts, labels, seconds, Cores.split())


def dense_labels(network: Path, texts: Sequence[str]) -> list[str]:
    """Return what the dense network says, in float32."""
    answer = Network(network, 1, "plain.onnx")
    return [str(answer([text])[0]["label"]) for text in texts]


def texts_and_labels(data: Path) -> tuple[list[str], list[str]]:
    """Return texts in an order of their own, and the names of their labels beside `data`."""
    examples = read_examples(data)
    pairs = list(zip(examples.texts, examples.labels.tolist(), strict=True))
    random.Random(0).shuffle(pairs)
    return [text for text, _ in pairs], [examples.names[label] for _, label in pairs]


async def measure(
    name: str,
    server: Server,
    plan: Plan,
    body: Callable[[str], dict[str, Any]],
    read: Callable[[Any], dict[str, Any]],
) -> Measured:
    """Ask one server in all three ways; `read` parses an answer."""
    client = Client(f"{server.url}/classify", keep_bodies=True)
    requests = [client.request(body(text)) for text in plan.texts]
    await client.closed("warm-up", requests, CALLERS, min(WARM_UP, plan.seconds))
    lone = await client.closed("lone", requests, 1, plan.seconds / 2)
    part = "" if name == FLOOR.name else "service.frontend"
    before, frontend = server.cpu_seconds(), server.cpu_seconds(part)
    most = await client.closed("most", requests, CALLERS, plan.seconds)
    cpu, frontend = server.cpu_seconds() - before, server.cpu_seconds(part) - frontend
    half = await client.scheduled(
        "half", requests, most.goodput / 2, plan.seconds, arrivals="poisson"
    )
    phases = (lone, most, half)
    said = {n: read(json.loads(answer)) for phase in phases for n, answer in phase.bodies}
    if name == FLOOR.name:
        said = {}
    tails = tails_by_steps(half, read) if name in OURS else {}
    memory = server.memory()
    client.close()
    return Measured(
        name, most.goodput, lone.latency(0.5), half.latency(0.5), half.latency(0.99), half.rate,
        1000 * cpu / most.statuses["200"], 1000 * frontend / most.statuses["200"],
        memory, server.start_seconds, len(said),
        sum(answer["label"] == plan.labels[n] for n, answer in said.items()),
        sum(p.due - p.statuses["200"] for p in phases),
        most.client_cpu / most.took, quantile(half.late, 0.99), tails,
    )  # fmt: skip


def tails_by_steps(phase: Phase, read: Callable[[Any], dict[str, Any]]) -> dict[str, float]:
    """Return p99 of p50 for texts that ran the same steps, where there are enough of them."""
    latencies = defaultdict[str, list[float]](list)
    for (_, latency), (_, body) in zip(phase.answered, phase.bodies, strict=True):
        steps = read(json.loads(body))["heads"]["steps"]
        latencies[", ".join(map(str, steps))].append(latency)
    return {
        steps: quantile(own, 0.99) / quantile(own, 0.5)
        for steps, own in latencies.items()
        if len(own) >= ENOUGH
    }


def repeat(
    plan: Plan, levels: Collection[str], baselines: Collection[Contender]
) -> tuple[list[Measured], dict[str, str]]:
    """Measure everybody once, in an order drawn by lot.

    Returns:
        What was measured, and why some baselines were not, by name.
    """
    done: list[Measured] = []
    absent = {
        baseline.name: baseline.missing for baseline in baselines if baseline.missing is not None
    }

    def note(measured: Measured) -> None:
        print(f"{measured.name}: {measured.throughput:.0f}/s", file=sys.stderr)
        done.append(measured)

    def of_ours() -> None:
        flags = ("--models=ag_news", f"--model-store={Path('model_store').absolute()}")
        with ours(plan.cores.server, *flags) as server:
            for name in levels:
                fields = OURS[name]
                note(uvloop.run(measure(
                    name, server, plan, lambda text, fields=fields: {"input": text} | fields, first
                )))  # fmt: skip

    def of_contender(baseline: Contender) -> None:
        try:
            with baseline.server(plan.network, plan.cores.server) as server:
                note(uvloop.run(measure(baseline.name, server, plan, baseline.body, baseline.read)))
        except Exception as error:
            if baseline.environment is None:
                raise
            absent[baseline.name] = f"{type(error).__name__}: {error}"
            print(f"{baseline.name}: {absent[baseline.name]}", file=sys.stderr)

    runs: list[Callable[[], None]] = [of_ours]
    runs += [
        lambda baseline=baseline: of_contender(baseline)  # type: ignore[misc]
        for baseline in baselines
        if baseline.name not in absent
    ]
    random.shuffle(runs)
    for run in runs:
        run()
    return done, absent


# The report


class Repeats:
    """All repeats so far.

    Attributes:
        names: who was measured in every one of them, in the order of the report.
        dense: who of them serves the dense network.
    """

    def __init__(self, repeats: Sequence[dict[str, Any]]) -> None:
        self.runs = [{m["name"]: Measured(**m) for m in r["measured"]} for r in repeats]
        order = [*OURS, *(baseline.name for baseline in CONTENDERS)]
        self.names = [name for name in order if all(name in run for run in self.runs)]
        self.dense = [name for name in self.names if name in DENSE]

    def ratio(
        self, of: str, to: Sequence[str], value: Callable[[Measured], float], best: Any = max
    ) -> list[float]:
        """Return a value as a multiple of the best one of some others, in every repeat."""
        return [value(run[of]) / best(value(run[name]) for name in to) for run in self.runs]

    def values(self, name: str, value: Callable[[Measured], float]) -> list[float]:
        return [value(run[name]) for run in self.runs]

    def broken(self) -> list[str]:
        """Name who left requests unanswered, or was wrong more often than any level may be."""
        return [
            f"{name}: {one.unanswered} not answered 200, {one.right} right of {one.answered}"
            for run in self.runs
            for name, one in run.items()
            if one.unanswered or one.right < RIGHT * one.answered
        ]


def service_promises(repeats: Repeats) -> list[Promise]:
    """Return what this service promises beside the others that were measured."""

    def throughput(m: Measured) -> float:
        return m.throughput

    frontend = [
        run["balanced"].frontend_per_thousand - run[FLOOR.name].frontend_per_thousand
        for run in repeats.runs
    ]
    tail = [max(run["balanced"].tails.values(), default=math.nan) for run in repeats.runs]
    return [
        Promise(
            "throughput at `balanced`, of the best dense server's", ">=", 8,
            repeats.ratio("balanced", repeats.dense, throughput), hard=True,
        ),
        Promise(
            "throughput at `balanced`, of FastAPI + pipeline's", ">=", 25,
            repeats.ratio("balanced", [PIPELINE.name], throughput), hard=True,
        ),
        Promise(
            "lone request's p50 at `balanced`, of the best dense server's", "<=", 0.12,
            repeats.ratio("balanced", repeats.dense, lambda m: m.lone_p50, min), hard=True,
        ),
        Promise(
            "p99 at half load at `balanced`, of the p50 of texts of the same steps, worst steps",
            "<=", 4, tail,
        ),
        Promise("frontend's CPU beyond the floor, ms for a single text", "<=", 0.3, frontend),
    ]  # fmt: skip


PROMISE_HEADS = ["promise", "reach", "reached: median (from, to)", ""]


def report(folder: Path, stored: list[dict[str, Any]], client: Sequence[str]) -> str:
    """Write the report of all repeats; return what is kept or short, as a table."""
    repeats = Repeats(stored)
    facts = stored[-1]["machine"]
    names = repeats.names
    rows = []
    for name in names:
        counted = sum(run[name].answered for run in repeats.runs)
        right = sum(run[name].right for run in repeats.runs)
        rows.append(
            [
                f"**{name}**" if name in OURS else name,
                spread(repeats.ratio(name, repeats.dense, lambda m: m.throughput)),
                spread(repeats.ratio(name, repeats.dense, lambda m: m.lone_p50, min)),
                spread(repeats.ratio(name, repeats.dense, lambda m: m.cpu_per_thousand, min)),
                f"{right / counted:.4f} of {counted}" if counted else "",
                spread(repeats.values(name, lambda m: m.throughput), ".0f"),
                spread(repeats.values(name, lambda m: 1000 * m.lone_p50), ".1f"),
                spread(repeats.values(name, lambda m: 1000 * m.half_p50), ".1f"),
                spread(repeats.values(name, lambda m: 1000 * m.half_p99), ".1f"),
                spread(repeats.values(name, lambda m: m.cpu_per_thousand)),
                spread(repeats.values(name, lambda m: m.frontend_per_thousand))
                if name in OURS
                else "",
                spread(repeats.values(name, lambda m: m.memory), ".0f"),
            ]
        )
    heads = [
        "served by", "throughput, of the best dense", "lone p50, of it", "CPU, of it", "accuracy",
        "texts/s", "lone p50, ms", "p50 at half load, ms", "p99 at half load, ms",
        "CPU seconds per 1,000", "of these in the frontend", "memory, MiB",
    ]  # fmt: skip
    verdict = markdown_table(PROMISE_HEADS, [p.row for p in service_promises(repeats)])
    absent = {name: why for run in stored for name, why in run.get("absent", {}).items()}
    busy = max(m.client_busy for run in repeats.runs for m in run.values())
    late = max(m.late_p99 for run in repeats.runs for m in run.values())
    lost = sum(m.unanswered for run in repeats.runs for m in run.values())
    page = [
        "# This service beside others\n",
        f"`python loadtests/compare.py --data test.parquet`, {len(stored)} repeats in turns;",
        f"{facts['processor']}, {facts['cores']}, Python {facts['python']}. {facts['texts']}.",
        "Ratios are taken within a repeat; shown are the median, and from where to where they go.",
        "The baselines serve the checkpoint's full step as a dense network with the same weights.",
        "Accuracy is that of the answers given here, to as many texts as there was time for; on",
        "all texts see [Benchmarks](../../benchmarks.md).\n",
        verdict + "\n",
        "![throughput](throughput.svg)\n",
        markdown_table(heads, rows) + "\n",
        *(f"Not measured: {name} ({why}).\n" for name, why in absent.items()),
        "## The client\n",
        f"It was busy for {busy:.0%} of its core at most, and sent at half load within "
        f"{1000 * late:.1f} ms of the due moment (p99). {lost} requests were not answered 200.",
        "Against a server that answers at once it does:\n",
        *client,
    ]
    (folder / "README.md").write_text("\n".join(page) + "\n")

    def fill(axes: Any) -> None:
        values = [repeats.values(name, lambda m: m.throughput) for name in names[:-1]]
        places = range(len(values))
        axes.barh(places, [statistics.median(v) for v in values], color="#4c72b0")
        for place, own in zip(places, values, strict=True):
            axes.plot([min(own), max(own)], [place, place], color="black")
        axes.set_yticks(places, names[:-1])
        axes.invert_yaxis()
        axes.set_xlabel("single texts a second, one core; lines: from the least to the most")

    draw([folder / "throughput.svg"], fill)
    return verdict


def machine(plan: Plan, data: Path | None) -> dict[str, str]:
    """Return what a report says of the circumstances."""
    return {
        "processor": processor_name(), "cores": plan.cores.describe(),
        "python": platform.python_version(),
        "texts": "Texts given" if data else "Texts made up",
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="labelled texts, Parquet, beside labels.json")
    parser.add_argument("--out", type=Path, default=Path("build/compare"))
    parser.add_argument("--checkpoint", type=Path, default=Path("model_store/ag_news/3"))
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=5.0, help="of a phase")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    kept = given.out / "repeats.json"
    stored: list[dict[str, Any]] = json.loads(kept.read_text()) if kept.exists() else []
    client = given.out / "client.md"
    if not client.exists():
        client.write_text("\n".join(limit_lines(300, [500, 2000, 5000], 2.0)) + "\n")
    if given.repeats:
        plan = Plan.of(given.checkpoint, given.data, given.seconds)
        plan.cores.hold_client()
        for _ in range(given.repeats):
            measured, absent = repeat(plan, OURS, CONTENDERS)
            facts = machine(plan, given.data)
            stored.append(
                {"machine": facts, "absent": absent, "measured": [asdict(m) for m in measured]}
            )
            kept.write_text(json.dumps(stored, indent=1) + "\n")
    print(report(given.out, stored, client.read_text().splitlines()))


if __name__ == "__main__":
    main()
