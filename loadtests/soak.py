"""Soak test: keep a server busy for a long time, and watch its memory, files and latency.

    python -m loadtests.soak [--minutes 20] [--rate 25] [--out build/soak]

It starts a server with two engines and two frontends and asks it on a schedule that does not wait:
single texts and lists, every quality, two models, clients that leave, scrapes, and each minute a
model loaded anew and another taken out and in. Every few seconds it notes memory (pages that are
shared counted once), open files, threads, and the latency of single texts from the moment at which
each was due. It writes `samples.csv` and `soak.svg`, and prints a table of the minutes 2 to 4
beside the last quarter. The exit code is 1 if a request was never answered or got a 500.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import csv
import random
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import httpx
import psutil

from loadtests.chaos.server import MODEL, OTHER, PATIENCE, Server, serving
from loadtests.texts import sentence

QUALITIES: tuple[str | float, ...] = ("auto", "fast", "balanced", "best", 0.5)
SIZES = (1,) * 36 + (8,) * 3 + (64,)
"""Texts per request, drawn uniformly from this list."""
LEAVING = 0.05
"""Share of the requests whose client does not wait."""
SAMPLE_SECONDS = 5.0
SWAP_SECONDS = 60.0
WARM_MINUTES = 2.0
"""Warm-up, left out of the table: weights are packed, and allocators grow."""


@dataclass(frozen=True)
class Sample:
    """The server's resources at one time, and the latency of single texts since the last sample."""

    minute: float
    memory_mib: float
    files: int
    threads: int
    p50_ms: float
    p99_ms: float
    requests: int


@dataclass
class Watched:
    """All samples and outcomes of a run."""

    outcomes: Counter[str] = field(default_factory=Counter)
    sent: int = 0
    swaps: int = 0
    latencies: list[float] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)


class Soak:
    """The load on one server.

    Args:
        server: the server.
        rate: requests per second.
        seconds: duration.
    """

    def __init__(self, server: Server, rate: float, seconds: float) -> None:
        self.watched = Watched()
        self._server = server
        self._rate = rate
        self._started = time.perf_counter()
        self._until = self._started + seconds

    async def run(self) -> None:
        """Send requests until the time is over, and wait for all answers."""
        await asyncio.gather(self._ask_on(), self._swap(), self._watch())

    async def _ask_on(self) -> None:
        limits = httpx.Limits(max_connections=500, max_keepalive_connections=20)
        url, asked = self._server.url, set[asyncio.Task[None]]()
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE, limits=limits) as client:
            due = time.perf_counter()
            while due < self._until:
                due += 1 / self._rate
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                task = asyncio.create_task(self._ask(client, due))
                asked.add(task)
                task.add_done_callback(asked.discard)
            await asyncio.gather(*asked)

    async def _ask(self, client: httpx.AsyncClient, due: float) -> None:
        size = random.choice(SIZES)
        texts = [sentence() for _ in range(size)]
        body: dict[str, Any] = {
            "input": texts[0] if size == 1 else texts,
            "model": random.choice((MODEL, MODEL, OTHER)),
            "quality": random.choice(QUALITIES),
        }
        self.watched.sent += 1
        leaves = random.random() < LEAVING
        try:
            async with asyncio.timeout(random.uniform(0, 0.02) if leaves else None):
                answer = await client.post("/classify", json=body)
        except TimeoutError:
            self.watched.outcomes["left"] += 1
        except httpx.TimeoutException:
            return  # no outcome: it counts as never answered
        except httpx.TransportError:
            self.watched.outcomes["broke off"] += 1
        else:
            self.watched.outcomes[self._outcome(answer, body["model"])] += 1
            if size == 1:
                self.watched.latencies.append(1000 * (time.perf_counter() - due))

    def _outcome(self, answer: httpx.Response, model: str) -> str:
        away = answer.status_code == 404 and model == OTHER  # it is out at that moment
        return "404 while out" if away else str(answer.status_code)

    async def _swap(self) -> None:
        changes = (("load", MODEL), ("unload", OTHER), ("load", OTHER))
        while await self._pause(SWAP_SECONDS):
            for action, name in changes:
                (await self._server.change(action, name)).raise_for_status()
                self.watched.swaps += 1

    async def _watch(self) -> None:
        while await self._pause(SAMPLE_SECONDS):
            (await self._server.plain.get("/metrics")).raise_for_status()
            taken, self.watched.latencies = self.watched.latencies, []
            taken = sorted(taken) or [0.0]
            files, threads = await asyncio.to_thread(self._held)
            memory = await asyncio.to_thread(self._server.memory)
            minute = (time.perf_counter() - self._started) / 60
            p99 = taken[int(0.99 * (len(taken) - 1))]
            sample = Sample(
                round(minute, 3), round(memory, 1), files, threads,
                round(statistics.median(taken), 2), round(p99, 2), self.watched.sent,
            )  # fmt: skip
            self.watched.samples.append(sample)
            print(sample, file=sys.stderr, flush=True)

    def _held(self) -> tuple[int, int]:
        files = threads = 0
        for process in self._server.family():
            with contextlib.suppress(psutil.Error):
                files += process.num_fds()
                threads += process.num_threads()
        return files, threads

    async def _pause(self, seconds: float) -> bool:
        """Wait, and return whether there is time left."""
        await asyncio.sleep(min(seconds, max(0.0, self._until - time.perf_counter())))
        return time.perf_counter() < self._until


HELD = {
    "memory_mib": "memory, MiB",
    "files": "open files",
    "threads": "threads",
    "p50_ms": "p50 of one text, ms",
    "p99_ms": "p99 of one text, ms",
}


def table(samples: list[Sample]) -> list[str]:
    """Return the medians of the beginning and of the last quarter, one row per resource."""
    early = [s for s in samples if WARM_MINUTES <= s.minute < 2 * WARM_MINUTES] or samples
    late = samples[-max(1, len(samples) // 4) :]
    rows = [
        f"| | minutes {WARM_MINUTES:g} to {2 * WARM_MINUTES:g} | the last quarter | most |",
        "|---|---|---|---|",
    ]
    for name, title in HELD.items():
        before, after = (
            statistics.median(getattr(s, name) for s in some) for some in (early, late)
        )
        most = max(
            getattr(s, name) for s in samples if s.minute >= min(WARM_MINUTES, early[0].minute)
        )
        rows.append(f"| {title} | {before:,.1f} | {after:,.1f} | {most:,.1f} |")
    return rows


def draw(samples: list[Sample], path: Path) -> None:
    """Plot every sample over the minutes."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = path.stem
    import matplotlib.pyplot as plt

    figure, places = plt.subplots(4, 1, figsize=(8, 8), sharex=True, layout="constrained")
    minutes = [s.minute for s in samples]
    shown = (("memory_mib",), ("files",), ("threads",), ("p50_ms", "p99_ms"))
    for place, names in zip(places, shown, strict=True):
        for name in names:
            place.plot(minutes, [getattr(s, name) for s in samples], linewidth=1, label=HELD[name])
        place.set_ylim(bottom=0)
        place.legend(loc="lower right", frameon=False)
        place.grid(alpha=0.3)
    places[-1].set_xlabel("minutes")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def save(samples: list[Sample], path: Path) -> None:
    """Write every sample as CSV."""
    names = [f.name for f in fields(Sample)]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows([getattr(s, name) for name in names] for s in samples)


async def soak(minutes: float, rate: float) -> Watched:
    """Run a server under load, and return the samples and outcomes."""
    async with serving() as server:
        work = Soak(server, rate, 60 * minutes)
        await work.run()
        await server.until_whole()
        return work.watched


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--rate", type=float, default=25.0, help="requests a second")
    parser.add_argument("--out", type=Path, default=Path("build/soak"))
    arguments = parser.parse_args()
    watched = asyncio.run(soak(arguments.minutes, arguments.rate))
    arguments.out.mkdir(parents=True, exist_ok=True)
    save(watched.samples, arguments.out / "samples.csv")
    draw(watched.samples, arguments.out / "soak.svg")
    hung = watched.sent - watched.outcomes.total()
    outcomes = ", ".join(f"{name}: {count:,}" for name, count in sorted(watched.outcomes.items()))
    print(
        f"{watched.sent:,} requests ({outcomes}), never answered: {hung}, "
        f"changes of models: {watched.swaps}"
    )
    print("\n".join(table(watched.samples)))
    sys.exit(bool(hung or watched.outcomes["500"]))


if __name__ == "__main__":
    main()
