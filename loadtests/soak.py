"""Soak test: keep a server busy for a long time, and watch its memory, files and latency.

    python -m loadtests.soak [--minutes 20] [--rate 25] [--out build/soak]

It starts a server with two engines and two frontends, and sends requests on a schedule that does
not wait for answers: single texts and lists, all quality levels, two models. Some clients
disconnect early. Once a minute one model is loaded again, and the other is unloaded and loaded.
Every few seconds it records memory (shared pages counted once), open files, threads, and the
latency of single texts from the time at which each was due. It writes `samples.csv` and `soak.svg`,
and prints a table that compares minutes 2 to 4 with the last quarter. The exit code is 1 if a
request was never answered or got a 500.
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
from dataclasses import asdict, dataclass, field, fields
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
"""Share of the requests whose client disconnects before the answer."""
SAMPLE_SECONDS = 5.0
SWAP_SECONDS = 60.0
WARM_MINUTES = 2.0
"""Warm-up that the table leaves out: weights are packed, and allocators grow."""


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
class Record:
    """All samples and outcomes of a run.

    Attributes:
        outcomes: number of requests by status, or by the reason why there is none.
        sent: number of requests.
        swaps: number of changes of models.
        latencies: latencies of single texts since the last sample, in ms.
        samples: all samples.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    sent: int = 0
    swaps: int = 0
    latencies: list[float] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)


class Soak:
    """The load on one server.

    Args:
        server: the server to load.
        rate: requests per second.
        seconds: duration of the load.
    """

    def __init__(self, server: Server, rate: float, seconds: float) -> None:
        self.record = Record()
        self._server = server
        self._rate = rate
        self._started = time.perf_counter()
        self._until = self._started + seconds

    async def run(self) -> None:
        """Send requests until the time is over, and wait for all answers."""
        await asyncio.gather(self._send(), self._swap(), self._sample())

    async def _send(self) -> None:
        limits = httpx.Limits(max_connections=500, max_keepalive_connections=20)
        url, pending = self._server.url, set[asyncio.Task[None]]()
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE, limits=limits) as client:
            due = time.perf_counter()
            while due < self._until:
                due += 1 / self._rate
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                task = asyncio.create_task(self._ask(client, due))
                pending.add(task)
                task.add_done_callback(pending.discard)
            await asyncio.gather(*pending)

    async def _ask(self, client: httpx.AsyncClient, due: float) -> None:
        size = random.choice(SIZES)
        texts = [sentence() for _ in range(size)]
        body: dict[str, Any] = {
            "input": texts[0] if size == 1 else texts,
            "model": random.choice((MODEL, MODEL, OTHER)),
            "quality": random.choice(QUALITIES),
        }
        self.record.sent += 1
        leaves = random.random() < LEAVING
        try:
            async with asyncio.timeout(random.uniform(0, 0.02) if leaves else None):
                answer = await client.post("/classify", json=body)
        except TimeoutError:
            self.record.outcomes["left"] += 1
        except httpx.TimeoutException:
            return  # no outcome: counts as never answered
        except httpx.TransportError:
            self.record.outcomes["broke off"] += 1
        else:
            self.record.outcomes[self._outcome(answer, body["model"])] += 1
            if size == 1:
                self.record.latencies.append(1000 * (time.perf_counter() - due))

    def _outcome(self, answer: httpx.Response, model: str) -> str:
        unloaded = answer.status_code == 404 and model == OTHER
        return "404 while unloaded" if unloaded else str(answer.status_code)

    async def _swap(self) -> None:
        changes = (("load", MODEL), ("unload", OTHER), ("load", OTHER))
        while await self._pause(SWAP_SECONDS):
            for action, name in changes:
                (await self._server.change(action, name)).raise_for_status()
                self.record.swaps += 1

    async def _sample(self) -> None:
        while await self._pause(SAMPLE_SECONDS):
            (await self._server.plain.get("/metrics")).raise_for_status()
            latencies, self.record.latencies = sorted(self.record.latencies) or [0.0], []
            files, threads = await asyncio.to_thread(self._files_and_threads)
            memory = await asyncio.to_thread(self._server.memory)
            minute = (time.perf_counter() - self._started) / 60
            p99 = latencies[int(0.99 * (len(latencies) - 1))]
            sample = Sample(
                round(minute, 3), round(memory, 1), files, threads,
                round(statistics.median(latencies), 2), round(p99, 2), self.record.sent,
            )  # fmt: skip
            self.record.samples.append(sample)
            print(sample, file=sys.stderr, flush=True)

    def _files_and_threads(self) -> tuple[int, int]:
        files = threads = 0
        for process in self._server.family():
            with contextlib.suppress(psutil.Error):
                files += process.num_fds()
                threads += process.num_threads()
        return files, threads

    async def _pause(self, seconds: float) -> bool:
        """Wait, and return whether the run goes on."""
        await asyncio.sleep(min(seconds, max(0.0, self._until - time.perf_counter())))
        return time.perf_counter() < self._until


TITLES = {
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
        f"| | minutes {WARM_MINUTES:g} to {2 * WARM_MINUTES:g} | last quarter | maximum |",
        "|---|---|---|---|",
    ]
    for name, title in TITLES.items():
        before, after = (
            statistics.median(getattr(s, name) for s in part) for part in (early, late)
        )
        maximum = max(
            getattr(s, name) for s in samples if s.minute >= min(WARM_MINUTES, early[0].minute)
        )
        rows.append(f"| {title} | {before:,.1f} | {after:,.1f} | {maximum:,.1f} |")
    return rows


def draw(samples: list[Sample], path: Path) -> None:
    """Plot every sample over the minutes."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = path.stem
    import matplotlib.pyplot as plt

    figure, plots = plt.subplots(4, 1, figsize=(8, 8), sharex=True, layout="constrained")
    minutes = [s.minute for s in samples]
    names_by_plot = (("memory_mib",), ("files",), ("threads",), ("p50_ms", "p99_ms"))
    for axes, names in zip(plots, names_by_plot, strict=True):
        for name in names:
            values = [getattr(s, name) for s in samples]
            axes.plot(minutes, values, linewidth=1, label=TITLES[name])
        axes.set_ylim(bottom=0)
        axes.legend(loc="lower right", frameon=False)
        axes.grid(alpha=0.3)
    plots[-1].set_xlabel("minutes")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def save(samples: list[Sample], path: Path) -> None:
    """Write every sample as CSV."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Sample)])
        writer.writeheader()
        writer.writerows(map(asdict, samples))


async def soak(minutes: float, rate: float) -> Record:
    """Run a server under load, and return the samples and outcomes."""
    async with serving() as server:
        load = Soak(server, rate, 60 * minutes)
        await load.run()
        await server.until_whole()
        return load.record


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--rate", type=float, default=25.0, help="requests per second")
    parser.add_argument("--out", type=Path, default=Path("build/soak"))
    arguments = parser.parse_args()
    record = asyncio.run(soak(arguments.minutes, arguments.rate))
    arguments.out.mkdir(parents=True, exist_ok=True)
    save(record.samples, arguments.out / "samples.csv")
    draw(record.samples, arguments.out / "soak.svg")
    hung = record.sent - record.outcomes.total()
    outcomes = ", ".join(f"{name}: {count:,}" for name, count in sorted(record.outcomes.items()))
    print(
        f"{record.sent:,} requests ({outcomes}), never answered: {hung}, "
        f"changes of models: {record.swaps}"
    )
    print("\n".join(table(record.samples)))
    sys.exit(bool(hung or record.outcomes["500"]))


if __name__ == "__main__":
    main()
