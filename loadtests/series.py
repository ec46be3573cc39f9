"""Count the series of `/metrics` before, during and after many changes of models.

    python -m loadtests.series [--changes 50] [--retired-series-seconds 1]

Serves copies of one model, loads two versions of it in turns, loads and unloads other models, and
sends each loaded model a request. Then it waits until the series of unloaded models are removed.
The exit code is 1 if the series at the end differ from those at the beginning.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from budgetformer.checkpoint.manifest import write_manifest
from budgetformer.checkpoint.store import read_checkpoint
from loadtests.chaos.server import ADMIN, MODEL, STORE, Server, Setup, serving

STEADY, GUESTS = "steady", 5
"""Name of the model with two versions, and number of models that are loaded and unloaded."""
PATIENCE = 20.0
Series = tuple[str, frozenset[tuple[str, str]]]


def fill(store: Path) -> None:
    """Write copies of a shipped model into a store."""
    source = max((STORE / MODEL).glob("[0-9]*"), key=lambda folder: int(folder.name))
    manifest = read_checkpoint(source).manifest
    copies = [(STEADY, 1), (STEADY, 2), *((f"guest-{number}", 1) for number in range(GUESTS))]
    for name, version in copies:
        folder = store / name / str(version)
        shutil.copytree(source, folder)
        renamed = manifest.model_copy(update={"name": name, "version": version})
        write_manifest(folder, renamed)


def changes() -> Iterator[list[tuple[str, str, int | None]]]:
    """Yield groups of changes (action, model, version) without end."""
    for turn in itertools.count():
        guest = f"guest-{turn % GUESTS}"
        yield [("load", STEADY, 2 - turn % 2), ("load", guest, 1), ("unload", guest, None)]


async def scrape(server: Server) -> tuple[set[Series], int]:
    """Return the series of a scrape, and its size in bytes."""
    text = (await server.plain.get("/metrics")).raise_for_status().text
    families = text_string_to_metric_families(text)
    samples = (sample for family in families for sample in family.samples)
    return {(s.name, frozenset(s.labels.items())) for s in samples}, len(text.encode())


async def change(server: Server, action: str, model: str, version: int | None) -> None:
    """Load or unload a model; send a request to a loaded one."""
    body = {} if version is None else {"version": version}
    answer = await server.plain.post(f"/models/{model}/{action}", headers=ADMIN, json=body)
    answer.raise_for_status()
    if action == "load":
        request = {"input": "The striker scored twice.", "model": model, "quality": "best"}
        (await server.plain.post("/classify", json=request)).raise_for_status()


async def restore(server: Server) -> None:
    """Restore the models that were served at first."""
    await change(server, "load", STEADY, 1)
    served = (await server.plain.get("/v1/models")).raise_for_status().json()["data"]
    for model in served:
        if model["id"] != STEADY:
            await change(server, "unload", model["id"], None)


async def measure(count: int, seconds: float) -> bool:
    """Make `count` changes; print the figures, and return whether the series are the same again.

    `seconds` is the server's `retired-series-seconds`.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder)
        await asyncio.to_thread(fill, store)
        flags = {"model-store": store, "retired-series-seconds": seconds, "engines": 1, "fronts": 1}
        async with serving(Setup(flags, models=(f"{STEADY}:1",))) as server:
            await change(server, "load", STEADY, 1)
            before, before_bytes = await scrape(server)
            peak, memory = len(before), server.memory()
            for step in itertools.islice(itertools.chain.from_iterable(changes()), count):
                await change(server, *step)
                peak = max(peak, len((await scrape(server))[0]))
            await restore(server)
            limit = time.monotonic() + seconds + PATIENCE
            while (after := await scrape(server))[0] != before and time.monotonic() < limit:
                await asyncio.sleep(0.2)
            print(f"series before {count} changes: {len(before):,} ({before_bytes:,} bytes)")
            print(f"maximum meanwhile: {peak:,}")
            print(f"series afterwards: {len(after[0]):,} ({after[1]:,} bytes)")
            print(f"memory: {memory:,.0f} MiB before, {server.memory():,.0f} MiB after")
            for title, names in (("new", after[0] - before), ("gone", before - after[0])):
                for name, number in sorted(Counter(name for name, _ in names).items()):
                    print(f"{title}: {number} of {name}")
            return after[0] == before


def main() -> None:
    """Measure, print the figures, and set the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.series",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--changes", type=int, default=50)
    parser.add_argument("--retired-series-seconds", type=float, default=1.0)
    given = parser.parse_args()
    sys.exit(not asyncio.run(measure(given.changes, given.retired_series_seconds)))


if __name__ == "__main__":
    main()
