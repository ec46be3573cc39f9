"""Break a server under load, again and again, and count what its callers saw.

    python loadtests/faults.py [--only kills hangs swaps] [--repeats 20]

It starts a server of its own with two engines and two fronts, and asks it on a schedule that does
not wait for answers. Before anything breaks it notes the answer of every text: afterwards one
that differs is wrong. For every kind of fault it prints what came back: 200; 503, which callers may
repeat; connections that broke with the front that served them; requests that were never answered;
and how long it took until all processes served again.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from texts import sentence

KEY = "a-key-for-this-run"
ADMIN = {"Authorization": f"Bearer {KEY}"}
MODEL, OTHER = "ag_news", "banking77"
PATIENCE = 60.0


@dataclass
class Seen:
    """What callers saw during one kind of fault."""

    fault: str
    sent: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: int = 0
    recovery: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)

    def row(self) -> str:
        unanswered = self.sent - sum(self.outcomes.values())
        outcomes = ", ".join(f"{name}: {count}" for name, count in sorted(self.outcomes.items()))
        back = (
            f"{statistics.median(self.recovery):.1f} / {max(self.recovery):.1f}"
            if self.recovery
            else ""
        )
        memory = f"{100 * (self.memory[-1] / self.memory[0] - 1):+.1f} %" if self.memory else ""
        cells = [self.fault, self.sent, outcomes, unanswered, self.wrong, back, memory]
        return f"| {' | '.join(map(str, cells))} |"


HEADS = ("fault", "sent", "answers", "unanswered", "wrong", "back after s, median / most", "memory")


class Server:
    """A server of our own, and its processes."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.engines, self.fronts = arguments.engines, arguments.fronts
        flags = {
            "port": port, "model-store": arguments.model_store, "engines": self.engines,
            "fronts": self.fronts, "admin-key": KEY, "log-level": "error",
            "hang-seconds": 4,
            "dtype": "float32",  # the same bits in every batch and engine
        }  # fmt: skip
        flags_given = [f"--{name}={value}" for name, value in flags.items()]
        models = [f"--models={MODEL}", f"--models={OTHER}"]
        command = [sys.executable, "-m", "service.cli", "serve", *flags_given, *models]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        self.plain = httpx.AsyncClient(base_url=self.url, timeout=10)

    def family(self) -> list[psutil.Process]:
        """Return all processes of the server."""
        top = psutil.Process(self.process.pid)
        return [top, *top.children(recursive=True)]

    def pids(self, module: str) -> list[int]:
        """Return the processes that run a module, oldest first."""
        found = []
        for process in self.family():
            try:
                if module in process.cmdline():
                    found.append((process.create_time(), process.pid))
            except psutil.Error:
                continue
        return [pid for _, pid in sorted(found)]

    def memory(self) -> float:
        """Return the MiB that all processes hold, pages that they share counted once."""
        total = 0.0
        for process in self.family():
            try:
                total += process.memory_full_info().pss / 2**20
            except psutil.Error:
                continue
        return total

    async def whole(self) -> bool:
        """Say whether every engine and every front is there and has every model."""
        try:
            health = (await self.plain.get("/health")).json()
            shown = (await self.plain.get("/metrics")).text
        except (httpx.HTTPError, ValueError):
            return False
        fronts = re.search(r"^budgetformer_fronts (\S+)$", shown, re.MULTILINE)
        alive = sum(engine["alive"] for engine in health["engines"])
        return (
            health["status"] == "ok"
            and alive == self.engines
            and all(len(engine["models"]) == 2 for engine in health["engines"])
            and fronts is not None
            and float(fronts[1]) == self.fronts
        )

    async def until_whole(self) -> float:
        """Wait until all is there, and return the seconds that it took."""
        started = time.perf_counter()
        while not await self.whole():
            if time.perf_counter() - started > PATIENCE:
                raise SystemExit("the server did not come back")
            await asyncio.sleep(0.05)
        return time.perf_counter() - started


class Load:
    """Callers on a schedule, who know the right answers."""

    def __init__(self, server: Server, rate: float) -> None:
        draw = random.Random(0)
        random.seed(0)
        self._texts = sorted({sentence() for _ in range(400)})
        draw.shuffle(self._texts)
        self._rate, self._url = rate, server.url
        self._right: dict[str, str] = {}

    async def learn(self) -> None:
        """Note the answer of every text."""
        async with httpx.AsyncClient(base_url=self._url, timeout=60) as client:
            answer = await client.post("/classify", json=self._body(self._texts))
            answer.raise_for_status()
        labels = (item["label"] for item in answer.json()["data"])
        self._right = dict(zip(self._texts, labels, strict=True))

    async def during(self, seen: Seen, work: Callable[[], Awaitable[None]]) -> None:
        """Ask on until the work is done, and count what comes back."""
        done = asyncio.create_task(work())  # type: ignore[arg-type]
        limits = httpx.Limits(max_connections=500, max_keepalive_connections=20)
        async with httpx.AsyncClient(base_url=self._url, timeout=PATIENCE, limits=limits) as client:
            asked, texts, due = [], itertools.cycle(self._texts), time.perf_counter()
            while not done.done():
                due += 1 / self._rate
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                seen.sent += 1
                asked.append(asyncio.create_task(self._ask(client, next(texts), seen)))
            await asyncio.gather(*asked)
        await done

    async def _ask(self, client: httpx.AsyncClient, text: str, seen: Seen) -> None:
        try:
            answer = await client.post("/classify", json=self._body(text))
        except httpx.TimeoutException:
            return  # never answered
        except httpx.TransportError:
            seen.outcomes["broke off"] += 1
            return
        seen.outcomes[str(answer.status_code)] += 1
        if answer.status_code == 200:
            seen.wrong += answer.json()["data"][0]["label"] != self._right[text]

    def _body(self, given: Any) -> dict[str, Any]:
        return {"input": given, "model": MODEL, "quality": "best", "timeout_ms": 30_000}


async def kills(server: Server, repeats: int, seen: Seen) -> None:
    """Kill an engine, a front, the next engine, and so on."""
    modules = itertools.cycle(["service.engine", "service.front"])
    for _, module in zip(range(repeats), modules, strict=False):
        victim = server.pids(module)[0]  # the oldest: each has its turn
        psutil.Process(victim).kill()
        await asyncio.sleep(0.1)  # until that is noticed
        seen.recovery.append(0.1 + await server.until_whole())
        await asyncio.sleep(0.5)


async def hangs(server: Server, repeats: int, seen: Seen) -> None:
    """Stop an engine or a front without ending it."""
    modules = itertools.cycle(["service.engine", "service.front"])
    for _, module in zip(range(max(2, repeats // 5)), modules, strict=False):
        victim = server.pids(module)[0]
        psutil.Process(victim).send_signal(signal.SIGSTOP)
        started = time.perf_counter()
        while psutil.pid_exists(victim) and time.perf_counter() - started < PATIENCE:
            await asyncio.sleep(0.05)
        await server.until_whole()
        seen.recovery.append(time.perf_counter() - started)
        await asyncio.sleep(0.5)


async def swaps(server: Server, repeats: int, seen: Seen) -> None:
    """Load what is served anew, and take the other model out and in again."""
    for turn in range(repeats * 5 // 2):
        for path in (f"/models/{MODEL}/load", f"/models/{OTHER}/unload", f"/models/{OTHER}/load"):
            answer = await server.plain.post(path, headers=ADMIN, timeout=PATIENCE)
            answer.raise_for_status()
        if turn >= 2:  # by then everything was laid out once
            await asyncio.sleep(1.5)  # until what was freed is returned
            seen.memory.append(server.memory())
            if not turn % 10:
                print(f"{seen.memory[-1]:.0f} MiB", file=sys.stderr)


FAULTS = {"kills": kills, "hangs": hangs, "swaps": swaps}


async def run(arguments: argparse.Namespace) -> list[str]:
    server = Server(arguments)
    rows = [f"| {' | '.join(HEADS)} |", f"|{'---|' * len(HEADS)}"]
    try:
        await server.until_whole()
        load = Load(server, arguments.rate)
        await load.learn()
        for name in arguments.only:
            seen = Seen(name)
            fault = FAULTS[name]
            await load.during(seen, lambda f=fault, s=seen: f(server, arguments.repeats, s))  # type: ignore[misc]
            rows.append(seen.row())
            print(rows[-1], file=sys.stderr)
    finally:
        await server.plain.aclose()
        server.process.terminate()
        server.process.wait(30)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-store", type=Path, default=Path("model_store"))
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--repeats", type=int, default=20, help="kills; 2.5 times as many swaps")
    parser.add_argument("--rate", type=float, default=30.0, help="requests a second")
    parser.add_argument("--engines", type=int, default=2)
    parser.add_argument("--fronts", type=int, default=2)
    print("\n".join(asyncio.run(run(parser.parse_args()))))


if __name__ == "__main__":
    main()
