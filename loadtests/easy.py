"""Measure the processor time of texts that step 0 answers, by process.

    python loadtests/easy.py --data ag_news/test.parquet [--before ../other-checkout] [--repeats 3]

All texts are answered by step 0 at `balanced`. Each repeat measures one caller, 32 callers with one
text per request, and requests of 64 texts, in turns on this server and on one that only parses and
tokenizes (the floor). `--before` adds the server of another checkout.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import selectors
import socket
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from loadtests.contenders import FLOOR
from loadtests.servers import PARTS, Server, ours
from loadtests.texts import texts_of

MODEL = Path("model_store/ag_news/3")
COLUMNS = (*PARTS, "rest", "all")
SETTLE = 0.5
"""Seconds after which all reports of counts, sent four times a second, have been sent."""


@dataclass(frozen=True)
class Traffic:
    """A load: `count` requests of `texts` texts each, from `callers` concurrent callers."""

    name: str
    texts: int
    callers: int
    count: int

    def bodies(self, texts: Sequence[str]) -> list[bytes]:
        """Return the bodies of all requests."""
        drawn = [texts[i % len(texts)] for i in range(self.texts * self.count)]
        groups = [drawn[i : i + self.texts] for i in range(0, len(drawn), self.texts)]
        return [
            json.dumps({"input": group[0] if self.texts == 1 else group}).encode()
            for group in groups
        ]


TRAFFIC = (
    Traffic("one caller", 1, 1, 600),
    Traffic("32 callers", 1, 32, 2000),
    Traffic("64 texts in a request", 64, 2, 40),
)


def ask(url: str, bodies: Sequence[bytes], callers: int) -> Iterator[bytes]:
    """Send requests over keep-alive connections, one at a time on each; yield the answers' bodies.

    Raises:
        SystemExit: an answer is not a 200.
    """
    host, port = url.removeprefix("http://").split(":")
    head = "POST /classify HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    waiting = iter([f"{head}content-length: {len(b)}\r\n\r\n".encode() + b for b in bodies])
    with selectors.DefaultSelector() as selector:
        for _, request in zip(range(callers), waiting, strict=False):
            opened = socket.create_connection((host, int(port)))
            opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            opened.sendall(request)
            selector.register(opened, selectors.EVENT_READ, bytearray())
        while selector.get_map():
            for key, _ in selector.select():
                connection, data = key.fileobj, key.data
                assert isinstance(connection, socket.socket)
                data += connection.recv(1 << 20)
                end = data.find(b"\r\n\r\n")
                length = re.search(rb"content-length: (\d+)", data[: max(end, 0)], re.IGNORECASE)
                if length is None or len(data) < end + 4 + int(length[1]):
                    continue
                if not data.startswith(b"HTTP/1.1 200"):
                    raise SystemExit(f"expected a 200, but got {data[:200]!r}")
                yield bytes(data[end + 4 :])
                data.clear()
                following = next(waiting, None)
                if following is None:
                    selector.unregister(connection)
                    connection.close()
                else:
                    connection.sendall(following)


def easy(url: str, texts: Sequence[str]) -> list[str]:
    """Return the texts that step 0 answers."""
    bodies = [json.dumps({"input": texts[i : i + 50]}).encode() for i in range(0, len(texts), 50)]
    items = [item for body in ask(url, bodies, 1) for item in json.loads(body)["data"]]
    return [t for t, item in zip(texts, items, strict=True) if item["heads"]["budget"] == 0]


def measure(server: Server, traffic: Traffic, texts: Sequence[str]) -> dict[str, float]:
    """Return the processor time per text in microseconds, by part of the server."""
    before = server.cpu_by_part()
    for _ in ask(server.url, traffic.bodies(texts), traffic.callers):
        pass
    time.sleep(SETTLE)
    used = {part: seconds - before[part] for part, seconds in server.cpu_by_part().items()}
    used["all"] = sum(used.values())
    return {part: 1e6 * s / (traffic.texts * traffic.count) for part, s in used.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="table of texts; default: synthetic texts")
    parser.add_argument("--before", type=Path, help="another checkout to compare with")
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    flags = ["--models=ag_news", "--fronts=1"]
    with ExitStack() as stack:
        servers = {"this": stack.enter_context(ours(cores[:1], *flags))}
        if given.before is not None:
            servers["before"] = stack.enter_context(ours(cores[:1], *flags, folder=given.before))
        servers["floor"] = stack.enter_context(FLOOR.server(MODEL, cores[:1]))
        texts = easy(servers["this"].url, texts_of(given.data, 1500))
        if "before" in servers:
            texts = easy(servers["before"].url, texts)
        rounds = [
            {
                (t.name, name): measure(server, t, texts)
                for t in TRAFFIC
                for name, server in servers.items()
            }
            for _ in range(given.repeats)
        ]
    table = Table("traffic", "server", *COLUMNS, "all / floor", box=box.SIMPLE)
    for traffic in TRAFFIC:
        for name in servers:
            times = [one[traffic.name, name] for one in rounds]
            floor = [one[traffic.name, "floor"]["all"] for one in rounds]
            ratios = sorted(a["all"] / b for a, b in zip(times, floor, strict=True))
            parts = [f"{statistics.median(one[part] for one in times):.0f}" for part in COLUMNS]
            shown = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            table.add_row(traffic.name, name, *parts, shown)
    console = Console()
    console.print(
        f"Microseconds of processor time per text; {len(texts)} texts that step 0 answers"
    )
    console.print(table)


if __name__ == "__main__":
    main()
