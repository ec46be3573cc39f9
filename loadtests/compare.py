"""This service beside what a user would serve instead, in turns, on the same texts and cores.

    python loadtests/compare.py --data test.parquet --out docs/benchmarks/service [--repeats 3]

The server has the first cores, the client the last one. Everybody gets single texts: one caller at
a time, then as fast as 32 callers are answered, then half of that rate on a schedule that does not
wait. The rivals serve the checkpoint's full step as a dense network with the same weights
(loadtests/rivals/serve.py). Repeats are appended to `repeats.json` in the folder, and the report
is written anew from all of them; `--repeats 0` only writes it. Without `--data` texts are made up,
and nothing is said of accuracy.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import uvloop
from openloop import Client, Phase, limit_lines, quantile
from servers import Cores, Server, ours
from texts import texts_of

CALLERS = 32
WARM_UP = 2.0
OURS = {
    "fast": {"quality": "fast"},
    "balanced": {"quality": "balanced"},
    "best": {"quality": "best"},
    "full budget": {"heads": 12},
}
RIVALS = {
    "ONNX Runtime int8, dynamic batching": "onnx-int8",
    "ONNX Runtime float32, dynamic batching": "onnx-float32",
    "FastAPI + pipeline": "pipeline",
    "floor: only parses and tokenizes": "floor",
}
DENSE = ("ONNX Runtime int8, dynamic batching", "ONNX Runtime float32, dynamic batching")
PIPELINE, FLOOR = "FastAPI + pipeline", "floor: only parses and tokenizes"


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
    front_per_thousand: float
    memory: float
    start: float
    answered: int
    right: int
    unanswered: int
    client_busy: float
    late_p99: float


def texts_and_labels(data: Path | None) -> tuple[list[str], list[str] | None]:
    """Return texts in an order of their own, and the names of their labels beside `data`."""
    if data is None:
        return texts_of(None, 3000), None
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(data)
    names = json.loads((data.parent / "labels.json").read_text())
    pairs = list(zip(table["text"].to_pylist(), table["label"].to_pylist(), strict=True))
    random.Random(0).shuffle(pairs)
    return [str(text) for text, _ in pairs], [names[label] for _, label in pairs]


async def measure(
    name: str, server: Server, fields: dict[str, Any], given: argparse.Namespace
) -> Measured:
    texts, labels = texts_and_labels(given.data)
    client = Client(f"{server.url}/classify", keep_bodies=labels is not None)
    requests = [client.request({"input": text} | fields) for text in texts]
    await client.closed("warm-up", requests, CALLERS, WARM_UP)
    lone = await client.closed("lone", requests, 1, given.seconds / 2)
    part = "" if name == FLOOR else "service.front"
    before, front = server.cpu_seconds(), server.cpu_seconds(part)
    most = await client.closed("most", requests, CALLERS, given.seconds)
    cpu, front = server.cpu_seconds() - before, server.cpu_seconds(part) - front
    half = await client.scheduled(
        "half", requests, most.goodput / 2, given.seconds, arrivals="poisson"
    )
    right, answered = _right([lone, most, half], labels) if labels and name != FLOOR else (0, 0)
    memory = server.memory()
    client.close()
    return Measured(
        name, most.goodput, lone.latency(0.5), half.latency(0.5), half.latency(0.99), half.rate,
        1000 * cpu / most.statuses["200"], 1000 * front / most.statuses["200"],
        memory, server.start_seconds, answered, right,
        sum(p.due - p.statuses["200"] for p in (lone, most, half)),
        most.client_cpu / most.took, quantile(half.late, 0.99),
    )  # fmt: skip


def _right(phases: Sequence[Phase], labels: Sequence[str]) -> tuple[int, int]:
    seen = {n: json.loads(body) for phase in phases for n, body in phase.bodies}
    return sum(body["data"][0]["label"] == labels[n] for n, body in seen.items()), len(seen)


def repeat(given: argparse.Namespace, cores: Cores) -> list[Measured]:
    """Measure everybody once, in an order drawn by lot."""

    def of_ours() -> list[Measured]:
        flags = ("--models=ag_news", f"--model-store={Path('model_store').absolute()}")
        with ours(cores.server, *flags) as server:
            return [
                uvloop.run(measure(name, server, fields, given)) for name, fields in OURS.items()
            ]

    def of_rival(name: str) -> list[Measured]:
        program = [sys.executable, "loadtests/rivals/serve.py", RIVALS[name], "--port={port}"]
        program += [f"--checkpoint={given.checkpoint}", f"--threads={len(cores.server)}"]
        here = str(Path.cwd())
        with Server(program, cores.server, "/ready", {"PYTHONPATH": here}) as server:
            return [uvloop.run(measure(name, server, {}, given))]

    runs: list[Callable[[], list[Measured]]] = [of_ours]
    runs += [lambda name=name: of_rival(name) for name in RIVALS]  # type: ignore[misc]
    random.shuffle(runs)
    done = []
    for run in runs:
        for measured in run():
            print(f"{measured.name}: {measured.throughput:.0f}/s", file=sys.stderr)
            done.append(measured)
    return done


# The report


class Repeats:
    """All repeats so far."""

    def __init__(self, repeats: Sequence[dict[str, Any]]) -> None:
        self.runs = [{m["name"]: Measured(**m) for m in r["measured"]} for r in repeats]

    def ratio(
        self, of: str, to: Sequence[str], value: Callable[[Measured], float], best: Any = max
    ) -> list[float]:
        """Return a value as a multiple of the best one of some others, in every repeat."""
        return [value(run[of]) / best(value(run[name]) for name in to) for run in self.runs]

    def values(self, name: str, value: Callable[[Measured], float]) -> list[float]:
        return [value(run[name]) for run in self.runs]


@dataclass(frozen=True)
class Promise:
    """A figure to reach, and what was reached in every repeat."""

    what: str
    reach: str
    reached: list[float]
    passed: Callable[[float], bool]

    @property
    def row(self) -> list[str]:
        verdict = "pass" if self.passed(statistics.median(self.reached)) else "short"
        return [self.what, self.reach, spread(self.reached), verdict]


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """Write the median of some values, and from where to where they go."""
    middle = f"{statistics.median(values):{form}}"
    if len(values) == 1:
        return middle
    return f"{middle} ({min(values):{form}} to {max(values):{form}})"


def promises(repeats: Repeats) -> list[Promise]:
    def throughput(m: Measured) -> float:
        return m.throughput

    front = [
        run["balanced"].front_per_thousand - run[FLOOR].front_per_thousand for run in repeats.runs
    ]
    tail = [run["balanced"].half_p99 / run["balanced"].half_p50 for run in repeats.runs]
    return [
        Promise(
            "throughput at `balanced`, of the best dense server's", ">= 4",
            repeats.ratio("balanced", DENSE, throughput), lambda r: r >= 4,
        ),
        Promise(
            "throughput at `balanced`, of FastAPI + pipeline's", ">= 8",
            repeats.ratio("balanced", [PIPELINE], throughput), lambda r: r >= 8,
        ),
        Promise(
            "lone request's p50 at `balanced`, of the best dense server's", "<= .4",
            repeats.ratio("balanced", DENSE, lambda m: m.lone_p50, min), lambda r: r <= 0.4,
        ),
        Promise("p99 at half load at `balanced`, of its p50", "<= 4", tail, lambda r: r <= 4),
        Promise(
            "front's CPU beyond the floor, ms for a single text", "<= .3", front,
            lambda r: r <= 0.3,
        ),
    ]  # fmt: skip


def report(folder: Path, stored: list[dict[str, Any]], client: Sequence[str]) -> str:
    """Write the report of all repeats; return what is kept or short, as a table."""
    from budgetformer.training.pages import draw, markdown_table

    repeats = Repeats(stored)
    facts = stored[-1]["machine"]
    names = [*OURS, *RIVALS]
    rows = []
    for name in names:
        counted = sum(run[name].answered for run in repeats.runs)
        right = sum(run[name].right for run in repeats.runs)
        rows.append(
            [
                name if name in RIVALS else f"**{name}**",
                spread(repeats.ratio(name, DENSE, lambda m: m.throughput)),
                spread(repeats.ratio(name, DENSE, lambda m: m.lone_p50, min)),
                spread(repeats.ratio(name, DENSE, lambda m: m.cpu_per_thousand, min)),
                f"{right / counted:.4f} of {counted}" if counted else "",
                spread(repeats.values(name, lambda m: m.throughput), ".0f"),
                spread(repeats.values(name, lambda m: 1000 * m.lone_p50), ".1f"),
                spread(repeats.values(name, lambda m: 1000 * m.half_p50), ".1f"),
                spread(repeats.values(name, lambda m: 1000 * m.half_p99), ".1f"),
                spread(repeats.values(name, lambda m: m.cpu_per_thousand)),
                spread(repeats.values(name, lambda m: m.memory), ".0f"),
            ]
        )
    heads = [
        "served by", "throughput, of the best dense", "lone p50, of it", "CPU, of it", "accuracy",
        "texts/s", "lone p50, ms", "p50 at half load, ms", "p99 at half load, ms",
        "CPU seconds per 1,000", "memory, MiB",
    ]  # fmt: skip
    verdict = markdown_table(
        ["promise", "reach", "reached: median (from, to)", ""], [p.row for p in promises(repeats)]
    )
    busy = max(m.client_busy for run in repeats.runs for m in run.values())
    late = max(m.late_p99 for run in repeats.runs for m in run.values())
    lost = sum(m.unanswered for run in repeats.runs for m in run.values())
    page = [
        "# This service beside others\n",
        f"`python loadtests/compare.py --data test.parquet`, {len(stored)} repeats in turns;",
        f"{facts['processor']}, {facts['cores']}, Python {facts['python']}. {facts['texts']}.",
        "Ratios are taken within a repeat; shown are the median, and from where to where they go.",
        "The rivals serve the checkpoint's full step as a dense network with the same weights.",
        "Accuracy is that of the answers given here, to as many texts as there was time for; on",
        "all texts see [Benchmarks](../../benchmarks.md).\n",
        verdict + "\n",
        "![throughput](throughput.svg)\n",
        markdown_table(heads, rows) + "\n",
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="labelled texts, Parquet, beside labels.json")
    parser.add_argument("--out", type=Path, default=Path("build/compare"))
    parser.add_argument("--checkpoint", type=Path, default=Path("model_store/ag_news/2"))
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=5.0, help="of a phase")
    given = parser.parse_args()
    cores = Cores.split()
    given.out.mkdir(parents=True, exist_ok=True)
    kept = given.out / "repeats.json"
    stored: list[dict[str, Any]] = json.loads(kept.read_text()) if kept.exists() else []
    machine = {
        "processor": processor(), "cores": cores.told(), "python": platform.python_version(),
        "texts": "Texts given" if given.data else "Texts made up",
    }  # fmt: skip
    client = given.out / "client.md"
    if not client.exists():
        client.write_text("\n".join(limit_lines(300, [500, 2000, 5000], 2.0)) + "\n")
    if given.repeats:
        cores.hold_client()
    for _ in range(given.repeats):
        measured = [asdict(m) for m in repeat(given, cores)]
        stored.append({"machine": machine, "measured": measured})
        kept.write_text(json.dumps(stored, indent=1) + "\n")
    print(report(given.out, stored, client.read_text().splitlines()))


def processor() -> str:
    """Return the processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


if __name__ == "__main__":
    main()
