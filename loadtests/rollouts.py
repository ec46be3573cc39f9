"""Test roll-outs under load: promotion and rollback of a good version, stop of a bad one.

    python -m loadtests.rollouts --data ag_news/test.parquet

Callers send requests to a server of two frontends all the time, and count every answer that is not
a 200. The good version is the served one with a little noise added to its weights; the bad version
has its labels exchanged. In the middle of a roll-out the whole server is killed and started again;
the callers pause meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from budgetformer.checkpoint.manifest import Manifest, file_entries, write_manifest
from loadtests.servers import ours
from loadtests.texts import texts_of

MODEL, KEY = "ag_news", "load-test"
CALLERS = 16
NOISE = 0.02
"""Standard deviation of the good version's noise, relative to that of each weight tensor."""
ADMIN = {"X-API-Key": KEY}


def add_version(store: Path, version: int, source: Path, exchange_labels: bool) -> None:
    """Add a changed copy of the version in `source` to the store."""
    folder = store / MODEL / str(version)
    shutil.copytree(source, folder)
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    manifest = Manifest.model_validate_json((folder / "manifest.json").read_bytes())
    labels, generator = len(manifest.labels), torch.Generator().manual_seed(0)
    for name, value in tensors.items():
        axis = next((at for at, size in enumerate(value.shape) if size == labels), None)
        if exchange_labels and axis is not None:
            tensors[name] = value.roll(1, axis).contiguous()
        elif not exchange_labels and value.is_floating_point() and value.dim() > 1:
            noise = torch.randn(value.shape, generator=generator) * value.float().std() * NOISE
            tensors[name] = (value.float() + noise).to(value.dtype)
    save_file(tensors, weights, {"format": "pt"})
    files = file_entries(folder)
    write_manifest(folder, manifest.model_copy(update={"version": version, "files": files}))


@dataclass
class Traffic:
    """Clients that send requests continuously.

    Attributes:
        url: URL of the server.
        texts: texts to send, in turn.
        answered: number of 200s by model and version.
        failed: number of other answers by status and error code, or by exception.
        paused: whether the clients wait.
    """

    url: str
    texts: list[str]
    answered: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    paused: bool = False
    _in_flight: int = 0

    async def call(self) -> None:
        """Send one text after another, until cancelled."""
        async with httpx.AsyncClient(base_url=self.url, timeout=30) as client:
            while True:
                if self.paused:
                    await asyncio.sleep(0.02)
                    continue
                text = self.texts[self.answered.total() % len(self.texts)]
                self._in_flight += 1
                try:
                    answer = await client.post("/classify", json={"input": text})
                    if answer.status_code == 200:
                        self.answered[answer.json()["model"]] += 1
                    else:
                        code = answer.json()["error"]["code"]
                        self.failed[f"{answer.status_code} {code}"] += 1
                except httpx.TransportError as error:
                    self.failed[type(error).__name__] += 1
                finally:
                    self._in_flight -= 1

    async def pause(self) -> None:
        """Stop sending, and return when no request is in flight."""
        self.paused = True
        while self._in_flight:
            await asyncio.sleep(0.01)


class Operator:
    """Changes versions through the API, and records a table row per phase."""

    def __init__(self, url: str, traffic: Traffic) -> None:
        self._url = url
        self._traffic = traffic
        self.table = Table(
            "phase", "seconds", "answered by", "not answered", "state", box=box.MARKDOWN
        )

    async def change(self, action: str, **body: Any) -> dict[str, Any]:
        return await self._request("POST", action, json=body)

    async def report(self) -> dict[str, Any]:
        return await self._request("GET", "rollout")

    async def _request(self, method: str, action: str, **request: Any) -> dict[str, Any]:
        async with httpx.AsyncClient(base_url=self._url, timeout=120, headers=ADMIN) as client:
            answer = await client.request(method, f"/models/{MODEL}/{action}", **request)
            answer.raise_for_status()
            return dict(answer.json())

    async def phase(self, name: str, seconds: float, *, until: str = "") -> dict[str, Any] | None:
        """Let the clients send for `seconds`, or until the roll-out reaches the state `until`.

        Returns:
            The last report of the roll-out, if `until` is given.
        """
        traffic, began = self._traffic, time.monotonic()
        answered, failed = Counter(traffic.answered), Counter(traffic.failed)
        report: dict[str, Any] | None = None
        while time.monotonic() - began < seconds:
            await asyncio.sleep(0.25)
            if until and (report := await self.report())["state"] == until:
                break
        took = time.monotonic() - began
        by = ", ".join(f"{k}: {v:,}" for k, v in sorted((traffic.answered - answered).items()))
        errors = traffic.failed - failed
        state = report["state"] if report else ""
        self.table.add_row(name, f"{took:.1f}", by, str(dict(errors) or 0), state)
        return report


async def run(data: Path | None, source: Path, seconds: float) -> None:
    """Run a server under load, roll versions out, and print the results."""
    console = Console(width=150)
    with tempfile.TemporaryDirectory(prefix="rollouts-") as temporary:
        folder = Path(temporary)
        shutil.copytree(source, folder / "store" / MODEL / source.name)
        first = int(source.name)
        good, bad = first + 1, first + 2
        flags = (
            f"--model-store={folder / 'store'}", f"--state-dir={folder / 'state'}",
            f"--models={MODEL}", "--fronts=2", f"--admin-key={KEY}",
        )  # fmt: skip
        with ours(sorted(os.sched_getaffinity(0)), *flags) as server:
            add_version(folder / "store", good, source, exchange_labels=False)
            add_version(folder / "store", bad, source, exchange_labels=True)
            traffic = Traffic(server.url, texts_of(data, 2000))
            operator = Operator(server.url, traffic)
            callers = [asyncio.create_task(traffic.call()) for _ in range(CALLERS)]
            await operator.phase("one version", seconds)
            await operator.change("rollout", version=good, weight=0.2, shadow=0.5)
            await operator.phase(f"{good}: canary 0.2, shadow 0.5", seconds)
            await traffic.pause()
            server.kill()
            server.start()
            traffic.paused = False
            await operator.phase("the same, after kill -9 of the server", seconds)
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
            console.print(f"version {bad} was stopped:", stopped and stopped["reason"])
            failed = dict(traffic.failed) or 0
            console.print("answered:", traffic.answered.total(), "not answered:", failed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="table of texts; default: synthetic texts")
    parser.add_argument("--model", type=Path, default=Path("model_store/ag_news/3"))
    parser.add_argument("--seconds", type=float, default=10.0, help="duration of a phase")
    given = parser.parse_args()
    asyncio.run(run(given.data, given.model, given.seconds))


if __name__ == "__main__":
    main()
