"""Overload a server on a schedule that does not wait for answers.

    python loadtests/overload.py [--data texts.parquet] [--texts 64 1] [--against OTHER_CHECKOUT]

It starts a server on the first cores and holds itself on the last one, so that neither takes the
other's time; `--url` asks a server that runs already. It finds the rate that the server answers
when asked as fast as it answers, at the quality that overload lowers to, and sends multiples of
that rate. The peak is measured anew between them, and what is answered is compared with the mean of
the peaks before and after: machines become faster and slower. Latency counts from the moment at
which a request was due. Every request must be answered (200, 429, 503 or 504), and the texts
answered a second should stay near the peak. With `--against` the server of another checkout takes
its turn in every round.
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
from openloop import Client, Phase, quantile
from servers import Cores, ours
from texts import texts_of

BODIES = 300
IN_FLIGHT = 6, 32
"""Requests in flight while the peak is looked for, many texts in each or one: the engines are
always busy and no deadline passes."""

PEAK = "as fast as answered"
HEADS = (
    "server", "texts", "load", "due", "answers", "unanswered", "texts/s", "of peak", "p50 ms",
    "p99 ms", "refused in ms, p50", "levels", "memory MiB", "client late by ms, p99",
    "client's core busy",
)  # fmt: skip


class Asked:
    """The measurements of one server with one request size.

    Args:
        name: of the server.
        url: of the server.
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
        """Measure every multiple once, between two peaks."""
        client = Client(self._url, spin=False)
        requests = [client.request(body) for body in self._bodies]
        lowest = [client.request(body | {"quality": "fast"}) for body in self._bodies]
        peak = partial(client.closed, PEAK, lowest, IN_FLIGHT[self._size == 1])
        await peak(3.0)
        before, held = await peak(self._given.seconds), self._memory()
        for factor in self._given.factors:
            load = f"{factor:g}x"
            rate = factor * before.goodput
            phase = await client.scheduled(load, requests, rate, self._given.seconds)
            self._grown = max(self._grown, self._memory() - held)
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
        """Return a line of the table per load, with sums of counts and medians of other values."""
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
    parser.add_argument("--url", help="of a server that runs; without, one is started")
    parser.add_argument("--against", type=Path, help="another checkout, measured too")
    parser.add_argument(
        "--data", type=Path, help="Parquet with a column `text`; none: made-up texts"
    )
    parser.add_argument("--texts", type=int, nargs="+", default=[64, 1], help="in a request")
    parser.add_argument("--seconds", type=float, default=10.0, help="of every phase")
    parser.add_argument("--rest", type=float, default=6.0, help="seconds after each multiple")
    parser.add_argument("--rounds", type=int, default=3, help="of all multiples")
    parser.add_argument("--factors", type=float, nargs="+", default=[0.5, 1.0, 3.0, 5.0])
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
            others = {"other": given.against} if given.against else {}
            for name, folder in ({"this": None} | others).items():
                server = running.enter_context(ours(cores.server, *flags, folder=folder))
                servers[name] = server.url, server.memory
            cores.hold_client()
            print(cores.describe(), file=sys.stderr)
        for size in given.texts:
            asked = [Asked(name, *server, size, given) for name, server in servers.items()]
            for number in range(given.rounds):
                for one in asked if number % 2 == 0 else reversed(asked):
                    uvloop.run(one.round())
                    time.sleep(1.0)
            for one in asked:
                print("\n".join(one.rows()), flush=True)


if __name__ == "__main__":
    main()
