"""Test roll-outs under load: promotion and rollback of a good version, stop of a bad one.

    python -m loadtests.rollouts --data ag_news/test.parquet

A server of two frontends is asked all the time, by callers that count every answer that is not 200.
The good version is the served one with its weights disturbed a little; the bad one has its labels
exchanged. In the middle of a roll-out the whole server is killed and started again, for which the
callers wait.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import httpx
import psutil
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from budgetformer.checkpoint.manifest import Manifest, file_entries, write_manifest
from loadtests.servers import START_SECONDS, free_port
from loadtests.texts import texts_of

MODEL, KEY = "ag_news", "load-test"
CALLERS = 16
DISTURBED = 0.02
"""Standard deviation of the good version's disturbance, relative to the weights' own."""
ADMIN = {"X-API-Key": KEY}


def bring(store: Path, version: int, source: Path, exchange: bool) -> None:
    """Add a changed copy of a version to the store."""
    folder = store / MODEL / str(version)
    shutil.copytree(source, folder)
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    manifest = Manifest.model_validate_json((folder / "manifest.json").read_bytes())
    labels, noise = len(manifest.labels), torch.Generator().manual_seed(0)
    for name, value in tensors.items():
        axis = next((at for at, size in enumerate(value.shape) if size == labels), None)
        if exchange and axis is not None:
            tensors[name] = value.roll(1, axis).contiguous()
        elif not exchange and value.is_floating_point() and value.dim() > 1:
            drawn = torch.randn(value.shape, generator=noise) * value.float().std() * DISTURBED
            tensors[name] = (value.float() + drawn).to(value.dtype)
    save_file(tensors, weights, {"format": "pt"})
    files = file_entries(folder)
    write_manifest(folder, manifest.model_copy(update={"version": version, "files": files}))


class Server:
    """`budgetformer serve` over a store, which can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Return when it can classify."""
        options = {
            "model-store": self._folder / "store", "state-dir": self._folder / "state",
            "port": self._port, "models": json.dumps([MODEL]), "fronts": 2, "log-level": "warning",
        }  # fmt: skip
        arguments = [f"--{name}={value}" for name, value in options.items()]
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "budgetformer",
            "serve",
            f"--admin-key={KEY}",
            *arguments,
            start_new_session=True,
        )
        async with httpx.AsyncClient(base_url=self.url) as client, asyncio.timeout(START_SECONDS):
            while True:
                try:
                    if (await client.get("/health/ready")).status_code == 200:
                        return
                except httpx.TransportError:
                    pass
                await asyncio.sleep(0.1)

    async def kill(self) -> None:
        """Kill every process of it."""
        assert self._process is not None
        top = psutil.Process(self._process.pid)
        for process in [*top.children(recursive=True), top]:
            process.send_signal(signal.SIGKILL)
        await self._process.wait()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._process is not None
        if self._process.returncode is None:
            self._process.terminate()
            await self._process.wait()


@dataclass
class Traffic:
    """Clients that send requests continuously, and the answers that they got."""

    url: str
    texts: list[str]
    answered: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    paused: bool = False
    _under_way: int = 0

    async def call(self) -> None:
        """Send one text after another, until cancelled."""
        async with httpx.AsyncClient(base_url=self.url, timeout=30) as client:
            while True:
                if self.paused:
                    await asyncio.sleep(0.02)
                    continue
                text = self.texts[self.answered.total() % len(self.texts)]
                self._under_way += 1
                try:
                    answer = await client.post("/classify", json={"input": text})
                    if answer.status_code == 200:
                        self.answered[answer.json()["model"]] += 1
                    else:
                        self.failed[str(answer.status_code)] += 1
                except httpx.TransportError as error:
                    self.failed[type(error).__name__] += 1
                finally:
                    self._under_way -= 1

    async def pause(self) -> None:
        """Stop sending, and return when no answer is pending."""
        self.paused = True
        while self._under_way:
            await asyncio.sleep(0.01)


class Operator:
    """Makes the changes, and records a line per phase."""

    def __init__(self, url: str, traffic: Traffic) -> None:
        self._url = url
        self._traffic = traffic
        self.table = Table(
            "phase", "seconds", "answered by", "not answered", "state", box=box.MARKDOWN
        )

    async def change(self, action: str, **body: Any) -> dict[str, Any]:
        async with httpx.AsyncClient(base_url=self._url, timeout=120, headers=ADMIN) as client:
            answer = await client.post(f"/models/{MODEL}/{action}", json=body)
            answer.raise_for_status()
            return dict(answer.json())

    async def report(self) -> dict[str, Any]:
        async with httpx.AsyncClient(base_url=self._url, timeout=60, headers=ADMIN) as client:
            answer = await client.get(f"/models/{MODEL}/rollout")
            answer.raise_for_status()
            return dict(answer.json())

    async def phase(self, name: str, seconds: float, *, until: str = "") -> dict[str, Any] | None:
        """Let the clients send for some time, or until the roll-out reaches a state."""
        traffic, began = self._traffic, time.monotonic()
        answered, failed = Counter(traffic.answered), Counter(traffic.failed)
        found: dict[str, Any] | None = None
        while time.monotonic() - began < seconds:
            await asyncio.sleep(0.25)
            if until and (found := await self.report())["state"] == until:
                break
        took = time.monotonic() - began
        by = ", ".join(f"{k}: {v:,}" for k, v in sorted((traffic.answered - answered).items()))
        errors = traffic.failed - failed
        state = found["state"] if found else ""
        self.table.add_row(name, f"{took:.1f}", by, str(dict(errors) or 0), state)
        return found


async def run(data: Path | None, source: Path, seconds: float) -> None:
    """Run a server under load, roll versions out, and print the results."""
    console = Console(width=150)
    with tempfile.TemporaryDirectory(prefix="rollouts-") as place:
        folder = Path(place)
        shutil.copytree(source, folder / "store" / MODEL / source.name)
        first = int(source.name)
        good, bad = first + 1, first + 2
        async with Server(folder) as server:
            bring(folder / "store", good, source, exchange=False)
            bring(folder / "store", bad, source, exchange=True)
            traffic = Traffic(server.url, texts_of(data, 2000))
            operator = Operator(server.url, traffic)
            callers = [asyncio.create_task(traffic.call()) for _ in range(CALLERS)]
            await operator.phase("one version", seconds)
            await operator.change("rollout", version=good, weight=0.2, shadow=0.5)
            await operator.phase(f"{good}: canary .2, shadow .5", seconds)
            await traffic.pause()
            await server.kill()
            await server.start()
            traffic.paused = False
            await operator.phase("the same after kill -9 of the server", seconds)
            shadow = await operator.report()
            await operator.change("promote")
            await operator.phase("promoted", seconds)
            await operator.change("rollback")
            await operator.phase("rolled back", seconds)
            await operator.change(
                "rollout", version=bad, weight=0.05, shadow=0.2, min_agreement=0.95
            )
            stopped = await operator.phase(f"{bad}: bad", 60, until="stopped")
            await operator.phase("after the stop", seconds)
            for caller in callers:
                caller.cancel()
            await asyncio.gather(*callers, return_exceptions=True)
            console.print(operator.table)
            console.print(f"shadow report of version {good}:", shadow)
            console.print(f"version {bad} stopped by itself:", stopped and stopped["reason"])
            console.print("answered:", traffic.answered.total(), "not:", dict(traffic.failed) or 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="texts to send; none: made-up ones")
    parser.add_argument("--model", type=Path, default=Path("model_store/ag_news/3"))
    parser.add_argument("--seconds", type=float, default=10.0, help="of each phase")
    given = parser.parse_args()
    asyncio.run(run(given.data, given.model, given.seconds))


if __name__ == "__main__":
    main()
