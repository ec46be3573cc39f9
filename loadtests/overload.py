"""Overload a server on a schedule that does not wait for answers (open loop).

    python loadtests/overload.py [--data texts.parquet] [--texts 64 1] [--before OTHER_CHECKOUT]

The server runs on the first cores, this client on the last one; `--url` uses a running server. The
peak rate is what the server answers in a closed loop at `fast`, the level to which overload lowers
the quality. The client then sends multiples of this rate. Because machines become faster and
slower, the peak is measured again after each multiple, and the answered rate is compared with the
mean of the peaks before and after it. Latency counts from the time at which a request was due.
Every request must be answered (200, 429, 503 or 504), and the answered texts per second should stay
near the peak. `--before` measures the server of another checkout in every round too.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median

import uvloop

from loadtests.openloop import Client, Phase, quantile
from loadtests.servers import Cores, ours
from loadtests.texts import texts_of

BODIES = 300
IN_FLIGHT = 6, 32
"""Requests in flight while the peak is measured, with many texts per request and with one: enough
to keep the engines busy, few enough to meet all deadlines."""

PEAK = "peak"
HEADS = (
    "server", "texts", "load", "due", "answers", "unanswered", "texts/s", "of peak", "p50 ms",
    "p99 ms", "refused after ms, p50", "levels", "memory MiB", "sent late by ms, p99",
    "CPU of the client",
)  # fmt: skip


class Measurement:
    """The measurements of one server with one request size.

    Args:
        name: name of the server.
        url: URL of the server.
        memory: returns the server's memory in MiB.
        size: texts per request.
        given: the command line.
    """

    def __init__(
        self,
        name: str,
        url: str,
        memory: Callable[[], float],
        size: int,
        given: argparse.Namespace,
    ) -> None:
        self._name, self._memory, self._size, self._given = name, memory, size, given
        self._url = f"{url}/classify"
        texts = texts_of(given.data, 4000)
        draw = random.Random(1)
        self._bodies = [
            {"input": draw.sample(texts, size), "timeout_ms": given.timeout_ms}
            for _ in range(BODIES if size > 1 else 10 * BODIES)
        ]
        self._phases: defaultdict[str, list[Phase]] = defaultdict(list)
        self._shares: defaultdict[str, list[float]] = defaultdict(list)
        self._grown = 0.0

    async def round(self) -> None:
        """Measure every multiple of the peak once."""
        client = Client(self._url, spin=False)
        requests = [client.request(body) for body in self._bodies]
        lowest = [client.request(body | {"quality": "fast"}) for body in self._bodies]
        peak = partial(client.closed, PEAK, lowest, IN_FLIGHT[self._size == 1])
        await peak(3.0)
        before, memory = await peak(self._given.seconds), self._memory()
        for factor in self._given.factors:
            load = f"{factor:g}x"
            rate = factor * before.goodput
            phase = await client.scheduled(load, requests, rate, self._given.seconds)
            self._grown = max(self._grown, self._memory() - memory)
            await asyncio.sleep(self._given.rest)
            after = await peak(self._given.seconds)
            self._phases[PEAK].append(before)
            self._phases[load].append(phase)
            share = 2 * phase.goodput / (before.goodput + after.goodput)
            self._shares[load].append(share)
            print(f"{self._name}, {self._size} texts, {load}: {share:.2f}", file=sys.stderr)
            before = after
        client.close()

    def rows(self) -> Iterator[str]:
        """Yield a table row per load: sums of counts over the rounds, medians of other values."""
        for load, phases in self._phases.items():
            statuses, levels = (
                ", ".join(f"{name}: {n}" for name, n in sorted(total.items()))
                for total in (
                    sum((phase.statuses for phase in phases), Counter[str]()),
                    sum((phase.levels for phase in phases), Counter[str]()),
                )
            )
            shares = self._shares[load]
            refused = [quantile(phase.refused, 0.5) for phase in phases if phase.refused]
            late = [quantile(phase.late, 0.99) for phase in phases if phase.late]
            cells = [
                self._name,
                str(self._size),
                load,
                str(sum(phase.due for phase in phases)),
                statuses,
                str(sum(phase.unanswered for phase in phases)),
                f"{self._size * median(phase.goodput for phase in phases):.0f}",
                f"{median(shares):.2f} ({min(shares):.2f}-{max(shares):.2f})" if shares else "",
                f"{1000 * median(phase.latency(0.5) for phase in phases):.0f}",
                f"{1000 * median(phase.latency(0.99) for phase in phases):.0f}",
                f"{1000 * median(refused):.1f}" if refused else "",
                levels,
                f"{self._grown:+.0f}" if shares else "",
                f"{1000 * median(late):.1f}" if late else "",
                f"{median(phase.client_cpu / phase.seconds for phase in phases):.0%}",
            ]
            yield f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", help="URL of a running server; default: start one")
    parser.add_argument("--before", type=Path, help="another checkout to measure too")
    parser.add_argument(
        "--data", type=Path, help="Parquet file with a column `text`; default: synthetic texts"
    )
    parser.add_argument("--texts", type=int, nargs="+", default=[64, 1], help="texts per request")
    parser.add_argument("--seconds", type=float, default=10.0, help="duration of a phase")
    parser.add_argument("--rest", type=float, default=6.0, help="seconds to wait after a multiple")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of all multiples")
    parser.add_argument(
        "--factors", type=float, nargs="+", default=[0.5, 1.0, 3.0, 5.0],
        help="multiples of the peak",
    )  # fmt: skip
    parser.add_argument("--timeout-ms", type=int, default=2000, help="deadline of a request")
    given = parser.parse_args()
    print(f"| {' | '.join(HEADS)} |\n|{'---|' * len(HEADS)}")
    cores = Cores.split()
    with contextlib.ExitStack() as running:
        servers: dict[str, tuple[str, Callable[[], float]]] = {}
        if given.url:
            servers[given.url] = given.url, lambda: 0.0
        else:
            flags = ("--models=ag_news", f"--model-store={Path('model_store').absolute()}")
            others = {"before": given.before} if given.before else {}
            for name, folder in ({"this": None} | others).items():
                server = running.enter_context(ours(cores.server, *flags, folder=folder))
                servers[name] = server.url, server.memory
            cores.hold_client()
            print(cores.describe(), file=sys.stderr)
        for size in given.texts:
            measurements = [
                Measurement(name, *server, size, given) for name, server in servers.items()
            ]
            for number in range(given.rounds):
                for measurement in measurements if number % 2 == 0 else reversed(measurements):
                    uvloop.run(measurement.round())
                    time.sleep(1.0)
            for measurement in measurements:
                print("\n".join(measurement.rows()), flush=True)


if __name__ == "__main__":
    main()
