"""Compare this service with other servers, in turns, on the same texts and cores.

    make baselines    # once: environments for LitServe, BentoML, Infinity and Ray Serve
    python loadtests/compare.py --data test.parquet --out docs/benchmarks/service [--repeats 3]
    # with --before ../other-checkout, also beside a previous version, in its own environment

The server runs on the first cores, the client on the last one. Each server gets requests of one
text in three phases: from one caller; from 32 callers (closed loop); and on a schedule with half of
the rate that the 32 callers reached (open loop). The baselines (loadtests/contenders.py) serve the
checkpoint's full step as a dense network with the same weights. A baseline that is not installed or
does not start is named in the report. Repeats are appended to `repeats.json` in the folder, and the
report is written from all of them; `--repeats 0` only writes the report. Without `--data`, texts
are synthetic, and the dense network's labels count as correct.
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
from functools import partial
from pathlib import Path
from typing import Any

import uvloop

from budgetformer.cost.processor import processor_name
from budgetformer.training.data import read_examples
from budgetformer.training.pages import draw, markdown_table
from loadtests.baselines.network import Network
from loadtests.contenders import (
    CONTENDERS,
    DENSE,
    ENVIRONMENTS,
    FLOOR,
    OURS,
    PIPELINE,
    Contender,
    first,
)
from loadtests.openloop import Client, Phase, limit_lines, quantile
from loadtests.promises import Promise, spread
from loadtests.servers import PARTS, Cores, Server, ours, run_quietly
from loadtests.texts import texts_of

BEFORE = ", previous version"
"""End of the names of the other checkout's levels."""
CALLERS = 32
MIN_LATENCIES = 100
"""Minimum number of latencies for a 99th percentile."""
WARM_UP_SECONDS = 2.0
SYNTHETIC_TEXTS = 300
MIN_ACCURACY = 0.8
"""Accuracy below which a server counts as broken; the least accurate level reaches 0.92."""


@dataclass
class Measured:
    """The figures of one contender in one repeat, as `repeats.json` stores them.

    Attributes:
        name: contender, or quality level of this service.
        throughput: texts per second with 32 callers.
        lone_p50: median latency with one caller, in seconds.
        half_p50: median latency at half load, in seconds.
        half_p99: 99th percentile at half load, in seconds.
        half_rate: requests per second at half load.
        cpu_per_thousand: processor seconds per 1,000 texts, by part of the server.
        memory: MiB of all processes.
        start: seconds from the start to the first answer.
        answered: number of texts whose answer was compared with the label.
        right: number of them with the correct label.
        unanswered: number of requests without a 200.
        client_busy: share of its core that the client used with 32 callers.
        late_p99: 99th percentile of the delay of sending at half load, in seconds.
        tails: p99 divided by p50 at half load, for texts that ran the same steps, by these steps.
    """

    name: str
    throughput: float
    lone_p50: float
    half_p50: float
    half_p99: float
    half_rate: float
    cpu_per_thousand: dict[str, float]
    memory: float
    start: float
    answered: int
    right: int
    unanswered: int
    client_busy: float
    late_p99: float
    tails: dict[str, float] = field(default_factory=dict)

    @property
    def cpu(self) -> float:
        """Processor seconds of all processes per 1,000 texts."""
        return sum(self.cpu_per_thousand.values())


@dataclass(frozen=True)
class Plan:
    """The conditions that are the same for all contenders.

    Attributes:
        network: folder of the dense network.
        texts: texts to send, in this order.
        labels: correct label of each text.
        seconds: duration of a phase.
        cores: cores of the server and of the client.
    """

    network: Path
    texts: Sequence[str]
    labels: Sequence[str]
    seconds: float
    cores: Cores

    @classmethod
    def of(cls, checkpoint: Path, data: Path | None, seconds: float) -> Plan:
        """Export the dense network unless its folder exists, and read or generate the texts."""
        network = ENVIRONMENTS / "networks" / f"{checkpoint.parent.name}-{checkpoint.name}"
        if not network.exists():
            run_quietly([sys.executable, "loadtests/baselines/export.py", checkpoint, network])
        if data is None:
            texts = texts_of(None, SYNTHETIC_TEXTS)
            labels = dense_labels(network, texts)
        else:
            texts, labels = texts_and_labels(data)
        return cls(network, texts, labels, seconds, Cores.split())


def dense_labels(network: Path, texts: Sequence[str]) -> list[str]:
    """Return the labels that the dense network answers in float32."""
    answer = Network(network, 1, "plain.onnx")
    return [str(answer([text])[0]["label"]) for text in texts]


def texts_and_labels(data: Path) -> tuple[list[str], list[str]]:
    """Return shuffled texts, and the names of their labels from labels.json beside `data`."""
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
    """Run all three phases against one server.

    Args:
        name: name of the contender.
        server: the running server.
        plan: texts and durations.
        body: returns the body of the request for a text.
        read: returns the answer to the only text from a response.
    """
    client = Client(f"{server.url}/classify", keep_bodies=True)
    requests = [client.request(body(text)) for text in plan.texts]
    await client.closed("warm-up", requests, CALLERS, min(WARM_UP_SECONDS, plan.seconds))
    lone = await client.closed("lone", requests, 1, plan.seconds / 2)
    before = server.cpu_by_part()
    full = await client.closed("full", requests, CALLERS, plan.seconds)
    cpu = {part: seconds - before[part] for part, seconds in server.cpu_by_part().items()}
    half = await client.scheduled(
        "half", requests, full.goodput / 2, plan.seconds, arrivals="poisson"
    )
    phases = (lone, full, half)
    answers = {n: read(json.loads(answer)) for phase in phases for n, answer in phase.bodies}
    if name == FLOOR.name:
        answers = {}
    tails = tails_by_steps(half, read) if is_ours(name) else {}
    memory = server.memory()
    client.close()
    return Measured(
        name, full.goodput, lone.latency(0.5), half.latency(0.5), half.latency(0.99), half.rate,
        {part: 1000 * seconds / full.statuses["200"] for part, seconds in cpu.items()},
        memory, server.start_seconds, len(answers),
        sum(answer["label"] == plan.labels[n] for n, answer in answers.items()),
        sum(p.due - p.statuses["200"] for p in phases),
        full.client_cpu / full.took, quantile(half.late, 0.99), tails,
    )  # fmt: skip


def tails_by_steps(phase: Phase, read: Callable[[Any], dict[str, Any]]) -> dict[str, float]:
    """Return p99 divided by p50 for texts that ran the same steps, if they are enough."""
    latencies = defaultdict[str, list[float]](list)
    for (_, latency), (_, body) in zip(phase.answered, phase.bodies, strict=True):
        steps = read(json.loads(body))["heads"]["steps"]
        latencies[", ".join(map(str, steps))].append(latency)
    return {
        steps: quantile(values, 0.99) / quantile(values, 0.5)
        for steps, values in latencies.items()
        if len(values) >= MIN_LATENCIES
    }


def is_ours(name: str) -> bool:
    """Return whether a contender is a level of this service or of its previous version."""
    return name.removesuffix(BEFORE) in OURS


def repeat(
    plan: Plan,
    levels: Collection[str],
    baselines: Collection[Contender],
    previous: Path | None = None,
) -> tuple[list[Measured], dict[str, str]]:
    """Measure all contenders once, in random order.

    Args:
        plan: conditions that are the same for all.
        levels: names of `OURS`.
        baselines: other servers.
        previous: another checkout of this project, which serves its own model store at the same
            levels; None: only this one.

    Returns:
        The figures, and the reasons why baselines were not measured, by name.
    """
    done: list[Measured] = []
    absent = {
        baseline.name: baseline.missing for baseline in baselines if baseline.missing is not None
    }

    def record(measured: Measured) -> None:
        print(f"{measured.name}: {measured.throughput:.0f}/s", file=sys.stderr)
        done.append(measured)

    def measure_ours(folder: Path | None) -> None:
        suffix = "" if folder is None else BEFORE
        with ours(plan.cores.server, "--models=ag_news", folder=folder) as server:
            for name in levels:

                def body(text: str, fields: dict[str, Any] = OURS[name]) -> dict[str, Any]:
                    return {"input": text} | fields

                record(uvloop.run(measure(name + suffix, server, plan, body, first)))

    def measure_baseline(baseline: Contender) -> None:
        try:
            with baseline.server(plan.network, plan.cores.server) as server:
                measuring = measure(baseline.name, server, plan, baseline.body, baseline.read)
                record(uvloop.run(measuring))
        except Exception as error:
            if baseline.environment is None:
                raise
            absent[baseline.name] = f"{type(error).__name__}: {error}"
            print(f"{baseline.name}: {absent[baseline.name]}", file=sys.stderr)

    runs: list[Callable[[], None]] = [partial(measure_ours, None)]
    if previous is not None:
        runs.append(partial(measure_ours, previous))
    runs += [
        partial(measure_baseline, baseline) for baseline in baselines if baseline.name not in absent
    ]
    random.shuffle(runs)
    for run in runs:
        run()
    return done, absent


# The report


class Repeats:
    """The figures of all repeats so far.

    Attributes:
        runs: figures by contender, one dictionary per repeat.
        names: contenders that every repeat measured, in the order of the report.
        dense: those of `names` that serve the dense network.
    """

    def __init__(self, repeats: Sequence[dict[str, Any]]) -> None:
        self.runs = [{m["name"]: Measured(**m) for m in r["measured"]} for r in repeats]
        levels = [name + suffix for suffix in ("", BEFORE) for name in OURS]
        order = [*levels, *(baseline.name for baseline in CONTENDERS)]
        self.names = [name for name in order if all(name in run for run in self.runs)]
        self.dense = [name for name in self.names if name in DENSE]

    def ratio(
        self, of: str, to: Sequence[str], value: Callable[[Measured], float], best: Any = max
    ) -> list[float]:
        """Return a contender's value divided by the best value of others, one per repeat.

        Args:
            of: name of the contender.
            to: names of the others.
            value: returns the value from the figures of a contender.
            best: `max` or `min`: whether a high or a low value is better.
        """
        return [value(run[of]) / best(value(run[name]) for name in to) for run in self.runs]

    def values(self, name: str, value: Callable[[Measured], float]) -> list[float]:
        return [value(run[name]) for run in self.runs]

    def cpu_of_part(self, name: str, part: str) -> str:
        """Return the processor seconds of one part of a server per 1,000 texts, for a table."""
        return spread(self.values(name, lambda m: m.cpu_per_thousand[part]))

    def broken(self) -> list[str]:
        """Return a line for each contender with unanswered requests or too low an accuracy."""
        return [
            f"{name}: {m.unanswered} requests without a 200, {m.right} of {m.answered} correct"
            for run in self.runs
            for name, m in run.items()
            if m.unanswered or m.right < MIN_ACCURACY * m.answered
        ]


def service_promises(repeats: Repeats) -> list[Promise]:
    """Return the performance targets of this service relative to the other servers."""

    def throughput(m: Measured) -> float:
        return m.throughput

    frontend = [
        run["balanced"].cpu_per_thousand["frontend"] - run[FLOOR.name].cpu for run in repeats.runs
    ]
    tail = [max(run["balanced"].tails.values(), default=math.nan) for run in repeats.runs]
    return [
        Promise(
            "throughput at `balanced` / best dense server's", ">=", 8,
            repeats.ratio("balanced", repeats.dense, throughput), needs_real_texts=True,
        ),
        Promise(
            "throughput at `balanced` / FastAPI + pipeline's", ">=", 25,
            repeats.ratio("balanced", [PIPELINE.name], throughput), needs_real_texts=True,
        ),
        Promise(
            "p50 of one caller at `balanced` / best dense server's", "<=", 0.12,
            repeats.ratio("balanced", repeats.dense, lambda m: m.lone_p50, min),
            needs_real_texts=True,
        ),
        Promise(
            "p99 / p50 at half load at `balanced`, texts of the same steps, worst steps",
            "<=", 4, tail,
        ),
        Promise("CPU of the frontend beyond the floor's, ms per text", "<=", 0.3, frontend),
    ]  # fmt: skip


PROMISE_HEADS = ["figure", "target", "measured: median (range)", ""]


def report(folder: Path, stored: list[dict[str, Any]], client: Sequence[str]) -> str:
    """Write the report of all repeats; return the table of targets."""
    repeats = Repeats(stored)
    facts = stored[-1]["machine"]
    names = repeats.names
    rows = []
    for name in names:
        counted = sum(run[name].answered for run in repeats.runs)
        right = sum(run[name].right for run in repeats.runs)
        rows.append(
            [
                f"**{name}**" if is_ours(name) else name,
                spread(repeats.ratio(name, repeats.dense, lambda m: m.throughput)),
                spread(repeats.ratio(name, repeats.dense, lambda m: m.lone_p50, min)),
                spread(repeats.ratio(name, repeats.dense, lambda m: m.cpu, min)),
                f"{right / counted:.4f} of {counted}" if counted else "",
                spread(repeats.values(name, lambda m: m.throughput), ".0f"),
                spread(repeats.values(name, lambda m: 1000 * m.lone_p50), ".1f"),
                spread(repeats.values(name, lambda m: 1000 * m.half_p50), ".1f"),
                spread(repeats.values(name, lambda m: 1000 * m.half_p99), ".1f"),
                spread(repeats.values(name, lambda m: m.cpu)),
                *(repeats.cpu_of_part(name, part) if is_ours(name) else "" for part in PARTS),
                spread(repeats.values(name, lambda m: m.memory), ".0f"),
            ]
        )
    heads = [
        "server", "throughput / best dense", "p50 of one caller / best dense", "CPU / best dense",
        "accuracy", "texts/s", "p50 of one caller, ms", "p50 at half load, ms",
        "p99 at half load, ms", "CPU seconds per 1,000 texts", "of these in the frontend",
        "in the engine", "memory, MiB",
    ]  # fmt: skip
    targets = markdown_table(PROMISE_HEADS, [p.row for p in service_promises(repeats)])
    absent = {name: reason for run in stored for name, reason in run.get("absent", {}).items()}
    busy = max(m.client_busy for run in repeats.runs for m in run.values())
    late = max(m.late_p99 for run in repeats.runs for m in run.values())
    lost = sum(m.unanswered for run in repeats.runs for m in run.values())
    page = [
        "# This service compared with other servers\n",
        f"`python loadtests/compare.py --data test.parquet`, {len(stored)} repeats in turns;",
        f"{facts['processor']}, {facts['cores']}, Python {facts['python']}. {facts['texts']}.",
        "Ratios are computed within each repeat; cells show their median and their range.",
        "The baselines serve the checkpoint's encoder with all heads as a dense network. It was",
        "trained to correct step 0, so alone it is less accurate than a fine-tuned dense network.",
        "Accuracy is measured on the texts that were answered during the test;",
        "[Benchmarks](../../benchmarks.md) has the accuracy on all texts.\n",
        targets + "\n",
        "![throughput](throughput.svg)\n",
        markdown_table(heads, rows) + "\n",
        *(f"Not measured: {name} ({reason}).\n" for name, reason in absent.items()),
        "## The client\n",
        f"The client used at most {busy:.0%} of its core. At half load it sent requests at most "
        f"{1000 * late:.1f} ms late (p99). {lost} requests were not answered with 200.",
        "With a server that answers at once, the client reaches:\n",
        *client,
    ]
    (folder / "README.md").write_text("\n".join(page) + "\n")

    def fill(axes: Any) -> None:
        values = [repeats.values(name, lambda m: m.throughput) for name in names[:-1]]
        rows = range(len(values))
        axes.barh(rows, [statistics.median(v) for v in values], color="#4c72b0")
        for row, of_server in zip(rows, values, strict=True):
            axes.plot([min(of_server), max(of_server)], [row, row], color="black")
        axes.set_yticks(rows, names[:-1])
        axes.invert_yaxis()
        axes.set_xlabel("texts per second on one core, one text per request; lines: range")

    draw([folder / "throughput.svg"], fill)
    return targets


def machine(plan: Plan, data: Path | None) -> dict[str, str]:
    """Return the facts about machine and texts that a report states."""
    return {
        "processor": processor_name(), "cores": plan.cores.describe(),
        "python": platform.python_version(),
        "texts": "Real texts" if data else "Synthetic texts",
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="labelled texts (Parquet) beside a labels.json")
    parser.add_argument("--out", type=Path, default=Path("build/compare"))
    parser.add_argument("--checkpoint", type=Path, default=Path("model_store/ag_news/3"))
    parser.add_argument("--before", type=Path, help="another checkout to compare with")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=5.0, help="duration of a phase")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / "repeats.json"
    stored: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    client = given.out / "client.md"
    if not client.exists():
        client.write_text("\n".join(limit_lines(300, [500, 2000, 5000], 2.0)) + "\n")
    if given.repeats:
        plan = Plan.of(given.checkpoint, given.data, given.seconds)
        plan.cores.hold_client()
        for _ in range(given.repeats):
            measured, absent = repeat(plan, OURS, CONTENDERS, given.before)
            facts = machine(plan, given.data)
            stored.append(
                {"machine": facts, "absent": absent, "measured": [asdict(m) for m in measured]}
            )
            path.write_text(json.dumps(stored, indent=1) + "\n")
    print(report(given.out, stored, client.read_text().splitlines()))


if __name__ == "__main__":
    main()
