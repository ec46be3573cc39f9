"""Compare the simulator with a server: predict the results of traffic, and send the same traffic.

    python loadtests/simulation.py --data texts.parquet --out build/simulation

Needs two cores: the server, with one engine, runs on the first, this client on the second. The
costs of passes and requests are measured first (`budgetformer tune`, twice), without any of the
phases below, or read from `--costs`. Each phase then draws requests, predicts their results with
the simulator, and sends the same requests at the same times (open loop). Latency counts from the
time at which a request was due.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from budgetformer.checkpoint.store import read_store
from budgetformer.cost.table import read_tables
from budgetformer.inference.policy import QUALITY_NAMES, QualityName
from budgetformer.tables import read_texts
from budgetformer.training.pages import draw, markdown_table
from loadtests.servers import ours
from service.settings import Settings
from service.simulation.costs import read_costs
from service.simulation.engine import SimModel
from service.simulation.fleet import Fleet, requests, run
from service.simulation.plan import Goals, most_rate
from service.simulation.texts import measure_texts
from service.simulation.traffic import Traffic, bursts, steady

Quality = Literal["auto"] | QualityName
QUALITIES: tuple[Quality, ...] = ("auto", *QUALITY_NAMES)
COMMAND = (sys.executable, "-m", "service.cli")
SERVER_CORE, CLIENT_CORE = 0, 1
MAX_TEXTS = 4000
CAPACITY_P99 = 0.5
"""Seconds of the p99 that define the capacity: the highest rate at `balanced` that meets it."""


@dataclass(frozen=True)
class Phase:
    """A traffic pattern.

    Attributes:
        load: texts per second as a share of the capacity.
        quality: quality of all requests.
        form: "steady" (Poisson) or "bursts".
        texts: texts per request.
    """

    load: float
    quality: Quality
    form: str = "steady"
    texts: int = 1

    @property
    def name(self) -> str:
        size = "" if self.texts == 1 else f", {self.texts} texts a request"
        return f"{self.form}{size}, `{self.quality}`"


@dataclass(frozen=True)
class Results:
    """The predicted or measured results of a phase.

    Attributes:
        sent: number of requests.
        answered: number of requests answered with 200.
        refused: number of requests answered with 429.
        expired: number of requests answered with 504.
        failed: number of other requests.
        texts_per_second: answered texts per second.
        p50: median latency of answered requests, in seconds.
        p99: 99th percentile of their latency, in seconds.
        lowered: share of them whose quality was lowered to `fast`.
        late: 99th percentile of the delay of sending, in seconds.
    """

    sent: int
    answered: int
    refused: int
    expired: int
    failed: int
    texts_per_second: float
    p50: float
    p99: float
    lowered: float
    late: float = 0.0


PHASES = [
    *(Phase(load, "auto") for load in (0.2, 0.4, 0.6, 0.8, 0.95, 1.2)),
    *(Phase(load, "balanced") for load in (0.6, 0.95, 1.2)),
    Phase(0.6, "auto", "bursts"),
    Phase(0.8, "auto", "steady", 8),
    Phase(1.6, "fast"),
    Phase(1.0, "best"),
]


def tune(folder: Path, model: str, core: int, *flags: str) -> None:
    """Measure the costs of a model on one core, and write them to a folder."""
    subprocess.run(
        [*COMMAND, "tune", "--model", model, "--out", folder, *flags],
        check=True, stdout=subprocess.DEVNULL, preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )  # fmt: skip


class Caller:
    """A minimal client with keep-alive connections, of which the most recently used is taken first.

    At these rates, a client that does more would be slower than the server and measure itself.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def ask(self, body: bytes) -> tuple[int, dict[str, str]]:
        """Send a body to /classify; return status and headers."""
        connection = self._free.pop() if self._free else None
        reader, writer = connection or await asyncio.open_connection("127.0.0.1", self._port)
        writer.write(
            b"POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower().splitlines()
        headers = dict(line.split(": ", 1) for line in head[1:] if line)
        await reader.readexactly(int(headers["content-length"]))
        self._free.append((reader, writer))
        return int(head[0].split()[1]), headers

    def close(self) -> None:
        for _, writer in self._free:
            writer.close()


async def send(
    port: int, bodies: Sequence[tuple[float, bytes, int]], seconds: float, patience: float
) -> Results:
    """Send each body at its scheduled time, without waiting for answers.

    Args:
        port: port of the server.
        bodies: seconds after the start, body, and number of texts, of each request.
        seconds: duration of the schedule.
        patience: seconds to wait for an answer.
    """
    outcomes: list[tuple[int, float, int, bool]] = []
    late: list[float] = []
    caller = Caller(port)

    async def ask(body: bytes, due: float, texts: int) -> None:
        try:
            status, headers = await asyncio.wait_for(caller.ask(body), patience)
        except (OSError, asyncio.IncompleteReadError, TimeoutError):
            outcomes.append((0, 0.0, texts, False))
            return
        took = time.perf_counter() - due
        outcomes.append((status, took, texts, headers.get("x-quality") == "fast"))

    gc.disable()  # a pause of the client would count as latency
    start, tasks = time.perf_counter() + 0.1, []
    for at, body, texts in bodies:
        due = start + at
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        late.append(time.perf_counter() - due)
        tasks.append(asyncio.create_task(ask(body, due, texts)))
    await asyncio.gather(*tasks)
    took = max(seconds, time.perf_counter() - start)
    gc.enable()
    caller.close()
    answered = [o for o in outcomes if o[0] == 200]
    latencies = [o[1] for o in answered] or [0.0]
    counts = {code: sum(o[0] == code for o in outcomes) for code in (200, 429, 504)}
    return Results(
        sent=len(outcomes),
        answered=counts[200],
        refused=counts[429],
        expired=counts[504],
        failed=len(outcomes) - sum(counts.values()),
        texts_per_second=sum(o[2] for o in answered) / took,
        p50=float(np.quantile(latencies, 0.5)),
        p99=float(np.quantile(latencies, 0.99)),
        lowered=sum(o[3] for o in answered) / max(1, len(answered)),
        late=float(np.quantile(late or [0.0], 0.99)),
    )


def traffic_of(phase: Phase, capacity: float, seconds: float) -> Traffic:
    """Return the traffic of a phase; `capacity` in texts per second."""
    rate = phase.load * capacity / phase.texts
    traffic = bursts(rate, seconds, seed=1) if phase.form == "bursts" else steady(rate, seconds)
    return Traffic(traffic.slot, traffic.rates, ((1.0, phase.texts),))


def predict(fleet: Fleet, traffic: Traffic, seed: int) -> Results:
    summary = run(fleet, traffic, seed).summary
    return Results(
        sent=summary.sent,
        answered=summary.answered,
        refused=summary.refused,
        expired=summary.expired,
        failed=0,
        texts_per_second=summary.texts_per_second,
        p50=summary.p50,
        p99=summary.p99,
        lowered=summary.lowered,
    )


HEADS = (
    "traffic", "load", "texts/s", "answered texts/s", "p50 ms", "p99 ms",
    "refused or expired", "at `fast`",
)  # fmt: skip


def row(result: dict[str, Any]) -> list[str]:
    """Return a row of the table, with the predicted and the measured value in each cell."""
    phase, predicted, measured = (result[key] for key in ("phase", "predicted", "measured"))

    def both(show: Any) -> str:
        return f"{show(predicted)} / {show(measured)}"

    def lost(values: dict[str, Any]) -> str:
        return f"{(values['refused'] + values['expired'] + values['failed']) / values['sent']:.1%}"

    return [
        Phase(**phase).name,
        f"{phase['load']:.0%}",
        f"{result['rate']:.0f}",
        both(lambda values: f"{values['texts_per_second']:.0f}"),
        both(lambda values: f"{1000 * values['p50']:.1f}"),
        both(lambda values: f"{1000 * values['p99']:.0f}"),
        both(lost),
        both(lambda values: f"{values['lowered']:.0%}"),
    ]


def errors(results: Sequence[dict[str, Any]]) -> str:
    """Return a summary of the prediction errors."""
    lines = []
    for name in ("texts_per_second", "p50", "p99"):
        relative = [r["predicted"][name] / r["measured"][name] - 1 for r in results]
        lines.append(
            f"{name}: median error {np.median(np.abs(relative)):.0%}, "
            f"from {min(relative):+.0%} to {max(relative):+.0%}"
        )
    return "; ".join(lines)


def plot(axes: Any, results: Sequence[dict[str, Any]]) -> None:
    shown = [r for r in results if r["phase"]["form"] == "steady" and r["phase"]["texts"] == 1]
    for quality, colour in (("auto", "tab:blue"), ("balanced", "tab:orange")):
        of_quality = [r for r in shown if r["phase"]["quality"] == quality]
        loads = [100 * r["phase"]["load"] for r in of_quality]
        for quantile, style in (("p50", "-"), ("p99", "--")):
            name = f"{quality}, {quantile}"
            ms = [1000 * r["predicted"][quantile] for r in of_quality]
            axes.plot(loads, ms, style, color=colour, label=f"{name}, predicted")
            ms = [1000 * r["measured"][quantile] for r in of_quality]
            marker = "o" if quantile == "p50" else "^"
            axes.plot(loads, ms, marker, color=colour, label=f"{name}, measured")
    axes.set_yscale("log")
    axes.set_xlabel("load, % of the predicted capacity")
    axes.set_ylabel("ms")
    axes.legend(fontsize=7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="Parquet file, column `text`")
    parser.add_argument("--out", type=Path, required=True, help="folder for report and plot")
    parser.add_argument("--model", default="ag_news")
    parser.add_argument("--costs", type=Path, help="folder with costs; default: measure them")
    parser.add_argument("--seconds", type=float, default=20.0, help="duration of a phase")
    parser.add_argument("--rest", type=float, default=7.0, help="seconds between phases")
    parser.add_argument("--phases", type=int, nargs="+", help="run only these phases, from 0")
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {CLIENT_CORE})
    torch.set_num_threads(1)  # several threads would compete for this one core
    arguments.out.mkdir(parents=True, exist_ok=True)
    costs = arguments.costs or arguments.out / "costs"
    checkpoint = read_store(Path("model_store")).latest(arguments.model)
    if arguments.costs is None:
        tune(costs, arguments.model, SERVER_CORE)
    texts, _ = read_texts(arguments.data)
    texts = texts[:: math.ceil(len(texts) / MAX_TEXTS)]
    population = measure_texts(checkpoint, texts)
    results: list[dict[str, Any]] = []
    flags = (f"--models={arguments.model}", f"--cost-tables={costs}")
    with ours([SERVER_CORE], *flags) as server:
        if arguments.costs is None:
            tune(costs, arguments.model, CLIENT_CORE, "--url", server.url, "--data", arguments.data)
        model = SimModel.of(checkpoint, read_tables(costs)[checkpoint.label])
        fleets = {
            quality: Fleet(
                model, population, Settings(quality=quality, engines=1), 1, read_costs(costs)
            )
            for quality in QUALITIES
        }
        capacity = most_rate(
            fleets["balanced"], steady(1.0, arguments.seconds), Goals(CAPACITY_P99)
        )
        print(f"capacity at balanced, p99 {CAPACITY_P99} s: {capacity:.0f} texts/s", flush=True)
        print(f"| {' | '.join(HEADS)} |\n|{'---|' * len(HEADS)}", flush=True)
        for number, phase in enumerate(PHASES):
            if arguments.phases and number not in arguments.phases:
                continue
            traffic = traffic_of(phase, capacity, arguments.seconds)
            predicted = predict(fleets[phase.quality], traffic, number)
            bodies = [
                (at, _body(arguments.model, phase, [texts[n] for n in indices]), len(indices))
                for at, indices in requests(population, traffic, np.random.default_rng(number))
            ]
            time.sleep(arguments.rest)
            measured = asyncio.run(send(server.port, bodies, arguments.seconds, 30.0))
            if phase.quality != "auto":  # overload lowers only `auto`
                measured = replace(measured, lowered=0.0)
            results.append(
                {
                    "phase": asdict(phase),
                    "rate": traffic.mean_rate * phase.texts,
                    "predicted": asdict(predicted),
                    "measured": asdict(measured),
                }
            )
            print(f"| {' | '.join(row(results[-1]))} | late {measured.late * 1000:.0f}", flush=True)
    print(errors(results))
    report = {
        "capacity": capacity,
        "costs": json.loads(read_costs(costs).dump()),
        "results": results,
    }
    (arguments.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (arguments.out / "table.md").write_text(markdown_table(HEADS, map(row, results)) + "\n")
    draw([arguments.out / "validation.svg"], partial(plot, results=results))


def _body(model: str, phase: Phase, texts: Sequence[str]) -> bytes:
    given = texts[0] if len(texts) == 1 else list(texts)
    return json.dumps({"model": model, "quality": phase.quality, "input": given}).encode()


if __name__ == "__main__":
    main()
