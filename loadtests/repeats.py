"""Measure the answer cache on repeated texts: a server with and one without, in turns.

    python loadtests/repeats.py --data ag_news/test.parquet [--share 0.2] [--repeats 3]

Each caller sends one text at a time. With probability `--share` it is drawn uniformly from the
earlier texts of the round; otherwise it is a new text. A second workload has no repeated texts and
shows the overhead of the cache. Use texts on which step 0 was not fitted: otherwise it answers
nearly all of them, and the encoder is hardly measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from loadtests.easy import SETTLE, ask
from loadtests.servers import Cores, Server, ours
from loadtests.texts import texts_of, with_repeats

CALLERS = 32
CACHE_MIB = 64
QUALITIES = ("balanced", "best")


@dataclass(frozen=True)
class Measured:
    """The results of one round: texts per second, and processor time per text in microseconds."""

    rate: float
    cpu: float


def measure(server: Server, texts: Sequence[str], quality: str) -> Measured:
    """Send texts, one per request, and return the result."""
    bodies = [json.dumps({"input": text, "quality": quality}).encode() for text in texts]
    before, began = server.cpu_seconds(), time.monotonic()
    for _ in ask(server.url, bodies, CALLERS):
        pass
    seconds = time.monotonic() - began
    time.sleep(SETTLE)
    cpu = server.cpu_seconds() - before
    return Measured(len(texts) / seconds, 1e6 * cpu / len(texts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="table of texts; default: synthetic texts")
    parser.add_argument("--share", type=float, default=0.2, help="share of repeated texts")
    parser.add_argument("--texts", type=int, default=1000, help="texts per round")
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    cores, flags = Cores.split(1), ["--models=ag_news", "--fronts=1"]
    shares = (given.share, 0.0)
    rounds = len(shares) * given.repeats
    # Each round has its own texts, so that none are cached from an earlier round.
    texts = list(dict.fromkeys(texts_of(given.data, rounds * given.texts)))
    size = len(texts) // rounds
    results: dict[tuple[str, float, str], list[Measured]] = {}
    with ExitStack() as stack:
        servers = {
            "without": stack.enter_context(ours(cores.server, *flags)),
            "with": stack.enter_context(
                ours(cores.server, *flags, f"--answer-cache-mib={CACHE_MIB}")
            ),
        }
        cores.hold_client()
        for number in range(rounds):
            share = shares[number % len(shares)]
            sent = with_repeats(texts[number * size : (number + 1) * size], share, number)
            # The order of the servers alternates (ABBA), so that a drift of the machine cancels.
            order = list(servers) if number % 4 < len(shares) else list(reversed(servers))
            for quality in QUALITIES:
                for name in order:
                    measured = measure(servers[name], sent, quality)
                    results.setdefault((quality, share, name), []).append(measured)
    table = Table(
        "quality", "repeated", "cache", "texts/s", "CPU us/text", "CPU / without", box=box.SIMPLE
    )
    for quality, share in product(QUALITIES, shares):
        without = [one.cpu for one in results[quality, share, "without"]]
        for name in servers:
            rows = results[quality, share, name]
            ratios = sorted(one.cpu / cpu for one, cpu in zip(rows, without, strict=True))
            table.add_row(
                quality,
                f"{share:.0%}",
                name,
                f"{statistics.median(one.rate for one in rows):.0f}",
                f"{statistics.median(one.cpu for one in rows):.0f}",
                f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
            )
    console = Console()
    console.print(f"{given.repeats} rounds of {size} texts, {CALLERS} callers; {cores.describe()}")
    console.print(table)


if __name__ == "__main__":
    main()
