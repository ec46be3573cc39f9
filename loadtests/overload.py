"""Send more than a server can do, on a schedule that does not wait for answers.

    python loadtests/overload.py --url http://127.0.0.1:8000 [--data texts.parquet]

First it finds the highest rate that the server answers when asked as fast as it answers; then it
sends multiples of that rate. Latency counts from the moment at which a request was due. Every
request must be answered (200, 429, 503 or 504), and the texts answered a second should stay near
the peak. A phase whose requests were sent late measured this client, not the server: take more
texts per request. Memory is that of the server's processes, found by its port.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

WORDS = [
    "market",
    "team",
    "science",
    "war",
    "film",
    "health",
    "price",
    "win",
    "space",
    "trade",
    "election",
    "game",
    "music",
    "storm",
]


JSON = {"Content-Type": "application/json"}


@dataclass
class Phase:
    """What came back while one rate was sent."""

    name: str
    seconds: float
    texts: int
    due: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    levels: Counter[str] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)
    late: list[float] = field(default_factory=list)
    took: float = 0.0

    @property
    def goodput(self) -> float:
        """Texts answered a second, until the last answer."""
        return self.statuses["200"] * self.texts / max(self.seconds, self.took)

    def row(self, peak: float, memory: float) -> str:
        ok = sorted(self.latencies) or [float("nan")]
        cells = [
            self.name,
            str(self.due),
            ", ".join(f"{code}: {n}" for code, n in sorted(self.statuses.items())),
            str(self.due - sum(self.statuses.values())),
            f"{self.goodput:.0f}",
            f"{self.goodput / peak:.2f}",
            f"{1000 * statistics.median(ok):.0f}",
            f"{1000 * ok[int(0.99 * (len(ok) - 1))]:.0f}",
            ", ".join(f"{level}: {n}" for level, n in sorted(self.levels.items())),
            f"{memory:+.0f}",
            f"{1000 * max(self.late, default=0.0):.0f}",
        ]
        return f"| {' | '.join(cells)} |"


HEADS = (
    "load", "due", "answers", "unanswered", "texts/s", "of peak", "p50 ms", "p99 ms", "levels",
    "memory MiB", "sent late by ms, at most",
)  # fmt: skip


def read_texts(path: Path | None) -> list[str]:
    if path is None:
        draw = random.Random(0)
        return [" ".join(draw.choices(WORDS, k=draw.randint(8, 60))) for _ in range(2000)]
    import pyarrow.parquet

    return [str(text) for text in pyarrow.parquet.read_table(path).column("text").to_pylist()]


def bodies(texts: list[str], size: int) -> Iterator[bytes]:
    """Yield request bodies for ever, made beforehand so that sending them costs little."""
    draw = random.Random(1)
    made = [
        json.dumps({"input": draw.sample(texts, size), "timeout_ms": 5000}).encode()
        for _ in range(200)
    ]
    return itertools.cycle(made)


async def ask(client: httpx.AsyncClient, body: bytes, phase: Phase, due: float) -> None:
    try:
        response = await client.post("/classify", content=body, headers=JSON)
    except httpx.HTTPError as error:
        phase.statuses[type(error).__name__] += 1
        return
    phase.statuses[str(response.status_code)] += 1
    if response.status_code == 200:
        phase.levels[response.headers.get("x-quality", "?")] += 1
        phase.latencies.append(time.perf_counter() - due)


async def closed(client: httpx.AsyncClient, texts: list[str], size: int, seconds: float) -> Phase:
    """Ask as fast as answers come, with enough requests in flight to keep every engine busy."""
    phase = Phase("as fast as answered", seconds, size)
    source, end = bodies(texts, size), time.perf_counter() + seconds

    async def caller() -> None:
        while (now := time.perf_counter()) < end:
            phase.due += 1
            await ask(client, next(source), phase, now)

    await asyncio.gather(*(caller() for _ in range(32)))
    return phase


async def scheduled(
    client: httpx.AsyncClient, texts: list[str], size: int, rate: float, seconds: float, name: str
) -> Phase:
    """Send `rate` requests a second, whatever comes back."""
    phase = Phase(name, seconds, size)
    source, draw = bodies(texts, size), random.Random(2)
    start = time.perf_counter()
    due, tasks = start, []
    while (due := due + draw.expovariate(rate)) < start + seconds:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        phase.late.append(max(0.0, time.perf_counter() - due))
        phase.due += 1
        tasks.append(asyncio.create_task(ask(client, next(source), phase, due)))
    await asyncio.wait_for(asyncio.gather(*tasks), 60)
    phase.took = time.perf_counter() - start
    return phase


def server_memory(port: int) -> float:
    """Return the MiB of the processes around whoever listens on a port; 0 if that is elsewhere."""
    for process in psutil.process_iter():
        try:
            open_ports = process.net_connections()
        except (psutil.AccessDenied, psutil.NoSuchProcess):
            continue
        if any(c.laddr and c.laddr.port == port and c.status == "LISTEN" for c in open_ports):
            top = process.parent() if "front" in " ".join(process.cmdline()) else process
            family = [top or process, *(top or process).children(recursive=True)]
            return sum(p.memory_info().rss for p in family) / 2**20
    return 0.0


async def run(arguments: argparse.Namespace) -> list[str]:
    texts = read_texts(arguments.data)
    port = httpx.URL(arguments.url).port or 80
    limits = httpx.Limits(max_connections=2000, max_keepalive_connections=200)
    lines = [f"| {' | '.join(HEADS)} |", f"|{'---|' * len(HEADS)}"]
    async with httpx.AsyncClient(base_url=arguments.url, limits=limits, timeout=30) as client:
        await closed(client, texts, arguments.texts, 3.0)
        peak = await closed(client, texts, arguments.texts, arguments.seconds)
        before = server_memory(port)
        lines.append(peak.row(peak.goodput, 0.0))
        for factor in arguments.factors:
            rate = factor * peak.goodput / arguments.texts
            phase = await scheduled(
                client, texts, arguments.texts, rate, arguments.seconds, f"{factor:g}x"
            )
            lines.append(phase.row(peak.goodput, server_memory(port) - before))
            await asyncio.sleep(arguments.rest)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument(
        "--data", type=Path, help="Parquet with a column `text`; none: made-up texts"
    )
    parser.add_argument("--texts", type=int, default=64, help="texts in a request")
    parser.add_argument("--seconds", type=float, default=15.0, help="of every phase")
    parser.add_argument("--rest", type=float, default=8.0, help="seconds between phases")
    parser.add_argument("--factors", type=float, nargs="+", default=[0.5, 1.0, 3.0, 5.0])
    print("\n".join(asyncio.run(run(parser.parse_args()))))


if __name__ == "__main__":
    main()
