"""Find the highest rate at which a server meets a latency target, hold it, and plot both.

    python loadtests/benchmark.py --out build/benchmark [--url http://127.0.0.1:8000] [--p99-ms 250]

Requests come at random moments (Poisson) on a schedule that does not wait for answers, and latency
counts from the moment at which a request was due. The rate rises by halves until the p99 exceeds
the target, and is then narrowed down; at 70 % of what was found it is held, while latency, the
server's processor time and its memory are noted every second. One request in ten has 16 texts.
Without `--url` a server is started on the first cores, the client has the last one.
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
from openloop import Client, Phase, quantile
from servers import Cores, Server, ours
from texts import texts_of

from budgetformer.cost.processor import processor_name
from budgetformer.training.pages import draw, markdown_table

FIRST_RATE = 25.0
GROWTH, NARROWINGS = 1.5, 3
HELD_SHARE = 0.7
BULK = 16


def scraped(url: str, metric: str, label: str) -> Counter[str]:
    """Return a counter's values by one of its labels."""
    with urllib.request.urlopen(f"{url}/metrics") as response:
        shown = response.read().decode()
    found: Counter[str] = Counter()
    for line in re.findall(rf"^budgetformer_{metric}{{.*$", shown, re.MULTILINE):
        name = re.search(rf'{label}="([^"]*)"', line)
        found[name[1] if name else ""] += float(line.rpartition(" ")[2])  # type: ignore[assignment]
    return found


def requests_of(client: Client, data: Path | None) -> list[bytes]:
    """Return requests of single texts, one in ten with many."""
    texts, draw_lots = texts_of(data, 3000), random.Random(3)
    return [
        client.request({"input": draw_lots.sample(texts, BULK) if n % 10 == 9 else text})
        for n, text in enumerate(texts)
    ]


async def search(client: Client, requests: list[bytes], given: argparse.Namespace) -> list[Phase]:
    """Return the phases of all tried rates, by rate."""
    phases: list[Phase] = []

    async def keeps(rate: float) -> bool:
        phase = await client.scheduled(f"{rate:.0f}", requests, rate, given.seconds, "poisson")
        phases.append(phase)
        print(f"{rate:.0f}/s: p99 {1000 * phase.latency(0.99):.0f} ms", file=sys.stderr)
        await asyncio.sleep(1.0)
        lost = phase.due - phase.statuses["200"]
        return not lost and 1000 * phase.latency(0.99) <= given.p99_ms

    low, high = 0.0, FIRST_RATE
    while await keeps(high):
        low, high = high, GROWTH * high
    for _ in range(NARROWINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if await keeps(middle) else (low, middle)
    return sorted(phases, key=lambda phase: phase.rate)


async def hold(
    client: Client, requests: list[bytes], rate: float, server: Server | None, seconds: float
) -> tuple[Phase, list[tuple[float, float]]]:
    """Hold a rate; return the phase, and processor seconds and MiB of every second."""
    used: list[tuple[float, float]] = []

    async def watch(server: Server) -> None:
        before = server.cpu_seconds()
        while True:
            await asyncio.sleep(1.0)
            # In a thread: to weigh processes takes longer than a request may be late.
            now, held = await asyncio.to_thread(lambda: (server.cpu_seconds(), server.memory()))
            used.append((now - before, held))
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
        axes.set(xlabel="requests a second", ylabel="ms from the due moment", yscale="log")
        axes.legend()

    def latency_by_time(axes: Any) -> None:
        for share in (0.5, 0.95, 0.99):
            axes.plot(seconds, [quantile(v, share) for v in by_second], label=f"p{share:.0%}"[:-1])
        axes.set(xlabel="seconds", ylabel="ms from the due moment", ylim=(0, None))
        axes.legend()

    def processor(axes: Any) -> None:
        axes.plot([cpu for cpu, _ in used])
        axes.set(xlabel="seconds", ylabel="cores busy", ylim=(0, None))

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
    client = Client(f"{url}/classify")
    requests = requests_of(client, given.data)
    await client.closed("warm-up", requests, 8, 3.0)
    phases = await search(client, requests, given)
    kept = [
        p for p in phases
        if p.due == p.statuses["200"] and 1000 * p.latency(0.99) <= given.p99_ms
    ]  # fmt: skip
    best = max(kept, key=lambda phase: phase.rate, default=phases[0])
    counted = {"items_total": "budget", "batches_total": "budget"}
    before = {name: scraped(url, name, label) for name, label in counted.items()}
    held, used = await hold(client, requests, HELD_SHARE * best.rate, server, given.hold)
    items, batches = (scraped(url, name, label) - before[name] for name, label in counted.items())
    client.close()
    pictures = plots(given.out, phases, held, used)
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
    heads = ["requests a second", "answers", "p50", "p95", "p99", "late by, p99", "client's core"]
    return "\n\n".join(
        [
            "# Rates and latency",
            f"`python loadtests/benchmark.py{' --data test.parquet' if given.data else ''}`; "
            f"{processor_name()}, {cores}; {'given' if given.data else 'made-up'} texts, {BULK} in "
            f"one request of ten; {given.seconds:g} s a rate; milliseconds from the due moment. "
            f"The highest rate with a p99 of {given.p99_ms:g} ms or less: "
            f"**{best.rate:.0f} a second**. The last row holds {HELD_SHARE:.0%} of it for "
            f"{given.hold:g} s.",
            markdown_table(heads, rates),
            "\n".join(f"![{name}]({name}.svg)" for name in pictures),
            "Texts by the ladder step that answered them, and how many shared a batch, while held:",
            markdown_table(["step", "texts", "in a batch"], mix) + "\n",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", help="of a server that runs; without, one is started")
    parser.add_argument("--data", type=Path, help="Parquet with a column `text`")
    parser.add_argument("--out", type=Path, default=Path("build/benchmark"))
    parser.add_argument("--p99-ms", type=float, default=250.0, help="the latency to keep")
    parser.add_argument("--seconds", type=float, default=5.0, help="for every rate")
    parser.add_argument("--hold", type=float, default=30.0, help="seconds at the held rate")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    cores = Cores.split()
    server = None if given.url else ours(cores.server, "--models=ag_news")
    with server or contextlib.nullcontext():
        if server:
            cores.hold_client()
        machine = cores.describe() if server else "a server that ran already"
        page = uvloop.run(run(server.url if server else given.url, server, machine, given))
    (given.out / "README.md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
