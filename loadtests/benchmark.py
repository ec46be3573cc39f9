"""Find the highest rate at which a server meets a latency target, hold it, and plot both.

    python loadtests/benchmark.py --out build/benchmark [--url http://127.0.0.1:8000] [--p99-ms 250]

Requests follow a Poisson schedule that does not wait for answers (open loop); latency counts from
the scheduled time. The rate is multiplied by 1.5 until the p99 exceeds the target, and bisection
then finds the highest rate that meets it. 70 % of that rate is held for some time, while latency
and the server's processor time and memory are recorded every second. One request in ten has 16
texts. Without `--url`, a server is started on the first cores, and the client runs on the last one.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import re
import sys
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import uvloop

from budgetformer.cost.processor import processor_name
from budgetformer.training.pages import draw, markdown_table
from loadtests.openloop import Client, Phase, quantile
from loadtests.servers import Cores, Server, ours
from loadtests.texts import texts_of

FIRST_RATE = 25.0
GROWTH, BISECTIONS = 1.5, 3
HELD_SHARE = 0.7
BATCH = 16
"""Texts of every tenth request."""


def scraped(url: str, metric: str, label: str) -> Counter[str]:
    """Return a counter's values by one of its labels."""
    with urllib.request.urlopen(f"{url}/metrics") as response:
        page = response.read().decode()
    values: Counter[str] = Counter()
    for line in re.findall(rf"^budgetformer_{metric}{{.*$", page, re.MULTILINE):
        name = re.search(rf'{label}="([^"]*)"', line)
        values[name[1] if name else ""] += float(line.rpartition(" ")[2])  # type: ignore[assignment]
    return values


def requests_of(client: Client, data: Path | None) -> list[bytes]:
    """Return requests with one text each, and every tenth with `BATCH` texts."""
    texts, rng = texts_of(data, 3000), random.Random(3)
    return [
        client.request({"input": rng.sample(texts, BATCH) if n % 10 == 9 else text})
        for n, text in enumerate(texts)
    ]


async def search(client: Client, requests: list[bytes], given: argparse.Namespace) -> list[Phase]:
    """Return the phases of all tried rates, by rising rate."""
    phases: list[Phase] = []

    async def meets_target(rate: float) -> bool:
        phase = await client.scheduled(f"{rate:.0f}", requests, rate, given.seconds, "poisson")
        phases.append(phase)
        print(f"{rate:.0f}/s: p99 {1000 * phase.latency(0.99):.0f} ms", file=sys.stderr)
        await asyncio.sleep(1.0)
        lost = phase.due - phase.statuses["200"]
        return not lost and 1000 * phase.latency(0.99) <= given.p99_ms

    low, high = 0.0, FIRST_RATE
    while await meets_target(high):
        low, high = high, GROWTH * high
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if await meets_target(middle) else (low, middle)
    return sorted(phases, key=lambda phase: phase.rate)


async def hold(
    client: Client, requests: list[bytes], rate: float, server: Server | None, seconds: float
) -> tuple[Phase, list[tuple[float, float]]]:
    """Hold a rate; return the phase, and the server's processor seconds and MiB in every second."""
    used: list[tuple[float, float]] = []

    async def watch(server: Server) -> None:
        before = server.cpu_seconds()
        while True:
            await asyncio.sleep(1.0)
            # In a thread: reading the memory of processes would delay requests noticeably.
            now, mib = await asyncio.to_thread(lambda: (server.cpu_seconds(), server.memory()))
            used.append((now - before, mib))
            before = now

    watching = asyncio.create_task(watch(server)) if server else None
    phase = await client.scheduled("held", requests, rate, seconds, "poisson")
    if watching is not None:
        watching.cancel()
    return phase, used


def plots(
    folder: Path, phases: list[Phase], held: Phase, used: list[tuple[float, float]]
) -> list[str]:
    """Draw all plots; return their file names."""
    seconds = range(int(held.seconds))
    by_second = [
        [1000 * lat for at, lat in held.answered if int(at) == second] for second in seconds
    ]

    def latency_by_rate(axes: Any) -> None:
        for share in (0.5, 0.95, 0.99):
            lines = [1000 * phase.latency(share) for phase in phases]
            axes.plot([p.rate for p in phases], lines, marker="o", label=f"p{share:.0%}"[:-1])
        axes.set(xlabel="requests per second", ylabel="latency, ms", yscale="log")
        axes.legend()

    def latency_by_time(axes: Any) -> None:
        for share in (0.5, 0.95, 0.99):
            axes.plot(seconds, [quantile(v, share) for v in by_second], label=f"p{share:.0%}"[:-1])
        axes.set(xlabel="seconds", ylabel="latency, ms", ylim=(0, None))
        axes.legend()

    def processor(axes: Any) -> None:
        axes.plot([cpu for cpu, _ in used])
        axes.set(xlabel="seconds", ylabel="busy cores", ylim=(0, None))

    def memory(axes: Any) -> None:
        axes.plot([mib for _, mib in used])
        axes.set(xlabel="seconds", ylabel="MiB", ylim=(0, None))

    names = {"rates": latency_by_rate, "latency": latency_by_time}
    if used:
        names |= {"processor": processor, "memory": memory}
    for name, fill in names.items():
        draw([folder / f"{name}.svg"], fill)
    return list(names)


async def run(url: str, server: Server | None, cores: str, given: argparse.Namespace) -> str:
    """Measure, draw the plots, and return the report."""
    client = Client(f"{url}/classify")
    requests = requests_of(client, given.data)
    await client.closed("warm-up", requests, 8, 3.0)
    phases = await search(client, requests, given)
    good = [
        p for p in phases
        if p.due == p.statuses["200"] and 1000 * p.latency(0.99) <= given.p99_ms
    ]  # fmt: skip
    best = max(good, key=lambda phase: phase.rate, default=phases[0])
    counted = {"items_total": "budget", "batches_total": "budget"}
    before = {name: scraped(url, name, label) for name, label in counted.items()}
    held, used = await hold(client, requests, HELD_SHARE * best.rate, server, given.hold)
    items, batches = (scraped(url, name, label) - before[name] for name, label in counted.items())
    client.close()
    plot_names = plots(given.out, phases, held, used)
    rates = [
        [
            f"{p.rate:.0f}", ", ".join(f"{code}: {n}" for code, n in sorted(p.statuses.items())),
            *(f"{1000 * p.latency(share):.1f}" for share in (0.5, 0.95, 0.99)),
            f"{1000 * quantile(p.late, 0.99):.1f}", f"{p.client_cpu / p.seconds:.0%}",
        ]
        for p in [*phases, held]
    ]  # fmt: skip
    total = sum(items.values()) or 1
    mix = [
        [budget, f"{count / total:.1%}", f"{count / (batches[budget] or 1):.1f}"]
        for budget, count in sorted(items.items(), key=lambda pair: int(pair[0]))
    ]
    columns = [
        "requests per second", "answers", "p50 ms", "p95 ms", "p99 ms", "sent late by ms, p99",
        "CPU of the client",
    ]  # fmt: skip
    return "\n\n".join(
        [
            "# Rates and latency",
            f"`python loadtests/benchmark.py{' --data test.parquet' if given.data else ''}`; "
            f"{processor_name()}, {cores}; {'given' if given.data else 'synthetic'} texts, one "
            f"request in ten with {BATCH} of them; {given.seconds:g} s per rate. Latency counts "
            f"from the time at which the schedule has the request. The highest rate with a p99 of "
            f"{given.p99_ms:g} ms or less is **{best.rate:.0f} requests per second**. The last row "
            f"holds {HELD_SHARE:.0%} of this rate for {given.hold:g} s.",
            markdown_table(columns, rates),
            "\n".join(f"![{name}]({name}.svg)" for name in plot_names),
            "Texts by the ladder step of their answer, and the mean batch size, at the held rate:",
            markdown_table(["step", "texts", "texts per batch"], mix) + "\n",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", help="URL of a running server; default: start one")
    parser.add_argument("--data", type=Path, help="Parquet file with a column `text`")
    parser.add_argument("--out", type=Path, default=Path("build/benchmark"))
    parser.add_argument("--p99-ms", type=float, default=250.0, help="the latency target")
    parser.add_argument("--seconds", type=float, default=5.0, help="seconds per rate")
    parser.add_argument("--hold", type=float, default=30.0, help="seconds at the held rate")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    cores = Cores.split()
    server = None if given.url else ours(cores.server, "--models=ag_news")
    with server or contextlib.nullcontext():
        if server:
            cores.hold_client()
        machine = cores.describe() if server else "a server that was already running"
        page = uvloop.run(run(server.url if server else given.url, server, machine, given))
    (given.out / "README.md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
