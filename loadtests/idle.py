"""Measure an idle server: start-up time, processor time and memory.

    python loadtests/idle.py [--models ag_news imdb] [--before OTHER_CHECKOUT]

Prints the seconds until the server is ready, the share of a core that all its processes use while
idle, and their memory: with shared pages counted once, idle and after eight seconds of load, and
with shared pages counted in each process (resident). `--before` measures the server of another
checkout too.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import uvloop

from loadtests.openloop import Client
from loadtests.servers import Server, ours
from loadtests.texts import texts_of

HEADS = (
    "server",
    "ready after s",
    "of a core, idle",
    "memory MiB",
    "resident MiB",
    "memory MiB after load",
)
LOAD_SECONDS = 8.0


async def ask(url: str) -> None:
    client = Client(f"{url}/classify", spin=False)
    texts = texts_of(None, 2000)
    requests = [client.request({"input": texts[n : n + 50]}) for n in range(0, 2000, 50)]
    await client.closed("load", requests, 2, LOAD_SECONDS)
    client.close()


def row(name: str, server: Server, seconds: float) -> str:
    with server:
        share = server.at_rest(seconds)
        memory = [server.memory(), server.resident()]
        uvloop.run(ask(server.url))
        memory.append(server.memory())
        cells = [f"{server.start_seconds:.1f}", f"{share:.2%}", *(f"{mib:.0f}" for mib in memory)]
        return f"| {' | '.join([name, *cells])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["ag_news", "imdb"])
    parser.add_argument("--before", type=Path, help="another checkout to measure too")
    parser.add_argument("--engines", type=int, help="number of engines and cores; default: all")
    parser.add_argument("--seconds", type=float, default=20.0, help="seconds of idle time")
    given = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    cores = cores[: given.engines or len(cores)]
    flags = [f"--models={name}" for name in given.models]
    flags.append(f"--model-store={Path('model_store').absolute()}")
    print(f"| {' | '.join(HEADS)} |\n|{'---|' * len(HEADS)}")
    print(row("this", ours(cores, *flags), given.seconds), flush=True)
    if given.before:
        print(row("before", ours(cores, *flags, folder=given.before), given.seconds))


if __name__ == "__main__":
    main()
