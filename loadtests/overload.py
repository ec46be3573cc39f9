"""Send more than a server can do, on a schedule that does not wait for answers.

    python loadtests/overload.py [--data texts.parquet] [--texts 64 1] [--against OTHER_CHECKOUT]

It starts a server on the first cores and holds itself on the last one, so that neither takes the
other's time; `--url` asks a server that runs already. First it finds the rate that the server
answers when asked as fast as it answers, at the quality that overload lowers to; then it sends
multiples of that rate. Latency counts from the moment at which a request was due. Every request
must be answered (200, 429, 503 or 504), and the texts answered a second should stay near the peak.
With `--against` the server of another checkout is measured in turn.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import uvloop
from openloop import Client, Phase, quantile
from servers import Cores, Server, ours
from texts import texts_of

BODIES = 300
IN_FLIGHT = 6, 32
"""Requests in flight while the peak is looked for, many texts in each or one: the engines are
always busy and no deadline passes."""

HEADS = (
    "server", "load", "due", "answers", "unanswered", "texts/s", "of peak", "p50 ms", "p99 ms",
    "refused in ms, p50", "levels", "memory MiB", "client late by ms, p99", "client's core busy",
)  # fmt: skip


def row(server: str, phase: Phase, texts: int, peak: float, memory: float) -> str:
    cells = [
        server,
        phase.name,
        str(phase.due),
        ", ".join(f"{code}: {n}" for code, n in sorted(phase.statuses.items())),
        str(phase.unanswered),
        f"{phase.goodput * texts:.0f}",
        f"{phase.goodput / peak:.2f}",
        f"{1000 * phase.latency(0.5):.0f}",
        f"{1000 * phase.latency(0.99):.0f}",
        f"{1000 * quantile(phase.refused, 0.5):.1f}" if phase.refused else "",
        ", ".join(f"{level}: {n}" for level, n in sorted(phase.levels.items())),
        f"{memory:+.0f}",
        f"{1000 * quantile(phase.late, 0.99):.1f}" if phase.late else "",
        f"{phase.client_cpu / phase.seconds:.0%}",
    ]
    return f"| {' | '.join(cells)} |"


async def measure(
    name: str, url: str, memory: Callable[[], float], size: int, given: argparse.Namespace
) -> list[str]:
    """Return the rows of one server and one number of texts in a request."""
    texts = texts_of(given.data, 4000)
    draw = random.Random(1)
    client = Client(f"{url}/classify", spin=False)
    many = BODIES if size > 1 else 10 * BODIES
    bodies = [
        {"input": draw.sample(texts, size), "timeout_ms": given.timeout_ms} for _ in range(many)
    ]
    requests = [client.request(body) for body in bodies]
    lowest = [client.request(body | {"quality": "fast"}) for body in bodies]
    callers = IN_FLIGHT[size == 1]
    await client.closed("warm-up", lowest, callers, 3.0)
    peak = await client.closed("as fast as answered", lowest, callers, given.seconds)
    before = memory()
    rows = [row(name, peak, size, peak.goodput, 0.0)]
    for factor in given.factors:
        phase = await client.scheduled(
            f"{factor:g}x", requests, factor * peak.goodput, given.seconds
        )
        rows.append(row(name, phase, size, peak.goodput, memory() - before))
        print(rows[-1], file=sys.stderr)
        await asyncio.sleep(given.rest)
    client.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", help="of a server that runs; without, one is started")
    parser.add_argument("--against", type=Path, help="another checkout, measured too")
    parser.add_argument(
        "--data", type=Path, help="Parquet with a column `text`; none: made-up texts"
    )
    parser.add_argument("--texts", type=int, nargs="+", default=[64, 1], help="in a request")
    parser.add_argument("--seconds", type=float, default=10.0, help="of every phase")
    parser.add_argument("--rest", type=float, default=6.0, help="seconds between phases")
    parser.add_argument("--factors", type=float, nargs="+", default=[0.5, 1.0, 3.0, 5.0])
    parser.add_argument("--timeout-ms", type=int, default=2000, help="deadline of a request")
    given = parser.parse_args()
    print(f"| {' | '.join(HEADS)} |\n|{'---|' * len(HEADS)}")
    cores = Cores.split()
    if given.url:
        servers: dict[str, Server | None] = {given.url: None}
    else:
        flags = ("--models=ag_news", f"--model-store={Path('model_store').absolute()}")
        servers = {"this": ours(cores.server, *flags)}
        if given.against:
            servers["other"] = ours(cores.server, *flags, folder=given.against)
        cores.hold_client()
        print(cores.told(), file=sys.stderr)
    for size in given.texts:
        for name, server in servers.items():
            with server or contextlib.nullcontext():
                url = server.url if server else given.url
                memory = server.memory if server else lambda: 0.0
                print("\n".join(uvloop.run(measure(name, url, memory, size, given))), flush=True)
                time.sleep(1.0)


if __name__ == "__main__":
    main()
