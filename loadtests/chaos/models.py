"""Faults of models: changes, damaged files, non-finite weights, failing tokenizers."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from budgetformer.checkpoint.manifest import (
    CONFIG,
    MANIFEST,
    TOKENIZER,
    WEIGHTS,
    file_entries,
    write_manifest,
)
from budgetformer.checkpoint.store import load_tokenizer, read_checkpoint
from loadtests.chaos.load import Seen, under_load
from loadtests.chaos.server import MODEL, OTHER, STORE, Server, Setup, serving

BROKEN = "broken"
POISON = "harbour"
"""A token whose embedding makes the network overflow."""
OVERFLOWING = 3e38
EMBEDDINGS = "encoder.embeddings.word.weight"
TEXTS = ("The council met.", f"The {POISON} is closed.", "A striker scored twice.")


@contextmanager
def _store(*names: str) -> Iterator[Path]:
    """Create a store with the latest version of some models."""
    with tempfile.TemporaryDirectory(prefix="budgetformer-store-") as folder:
        for name in names:
            shutil.copytree(_latest(name), Path(folder) / name / _latest(name).name)
        yield Path(folder)


def _latest(name: str) -> Path:
    versions = [p for p in (STORE / name).iterdir() if p.name.isdecimal()]
    return max(versions, key=lambda p: int(p.name))


def _add(store: Path, name: str, change: Callable[[Path], None]) -> None:
    """Add a changed copy of a model with a matching manifest."""
    folder = store / name / "1"
    shutil.copytree(_latest(MODEL), folder)
    change(folder)
    manifest = read_checkpoint(folder).manifest
    named = {"name": name, "version": 1, "files": file_entries(folder)}
    write_manifest(folder, manifest.model_copy(update=named))


async def swaps(repeats: int) -> Seen:
    """Reload the served model, and unload and load the other one."""
    async with serving() as server:

        async def work(seen: Seen) -> None:
            changes = (("load", MODEL), ("unload", OTHER), ("load", OTHER))
            for turn in range(repeats * 5 // 2):
                for action, name in changes:
                    (await server.change(action, name)).raise_for_status()
                if turn >= 2:  # by then all weights have been packed once
                    await asyncio.sleep(1.5)  # until freed memory is returned to the system
                    seen.memory.append(server.memory())
                    if not turn % 10:
                        print(f"{seen.memory[-1]:.0f} MiB", file=sys.stderr)
            seen.notes.append(f"{repeats * 5 // 2 * len(changes)} changes")

        return await under_load(server, work)


def _overwrite(path: Path) -> None:
    """Overwrite bytes in the middle of a file, in place."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes([0x3C]) * 2**20)


def _cut(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


DAMAGES: tuple[tuple[str, Callable[[Path], None]], ...] = (
    (WEIGHTS, _overwrite),
    (WEIGHTS, _cut),
    (WEIGHTS, Path.unlink),
    (TOKENIZER, _cut),
    (CONFIG, _cut),
    (MANIFEST, _cut),
)
LOAD_SECONDS = 0.3
"""Seconds after the start of loading within which the file is damaged."""


async def damaged(repeats: int) -> Seen:
    """Damage a file of a model while it is loaded, and repair it; at the end, load the model."""
    with _store(MODEL, OTHER) as store:
        folder = next((store / MODEL).iterdir())
        async with serving(Setup({"model-store": store})) as server:

            async def work(seen: Seen) -> None:
                statuses: Counter[int] = Counter()
                for turn in range(2 * repeats):
                    name, damage = DAMAGES[turn % len(DAMAGES)]
                    loading = asyncio.create_task(server.change("load", MODEL))
                    await asyncio.sleep(random.uniform(0, LOAD_SECONDS))
                    damage(folder / name)
                    statuses[(await loading).status_code] += 1
                    await asyncio.sleep(0.2)
                    shutil.copy2(_latest(MODEL) / name, folder / name)
                    seen.recovery.append(await server.until_whole())
                loads = ", ".join(f"{code}: {count}" for code, count in sorted(statuses.items()))
                seen.notes.append(f"answers to loads: {loads}")
                (await server.change("load", MODEL)).raise_for_status()

            return await under_load(server, work)


def _add_nans(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    weights[EMBEDDINGS][1000] = float("nan")
    save_file(weights, folder / WEIGHTS, {"format": "pt"})


def _poison(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    token = load_tokenizer(read_checkpoint(folder)).token_to_id(POISON)
    assert token is not None
    weights[EMBEDDINGS] = weights[EMBEDDINGS].to(torch.float32)
    weights[EMBEDDINGS][token] = OVERFLOWING
    save_file(weights, folder / WEIGHTS, {"format": "pt"})


async def _load_is_refused(server: Server, name: str) -> str:
    """Check that a load fails and that the error names the model; return a note."""
    answer = await server.change("load", name)
    assert answer.status_code != 200, f"{name} was loaded"
    message: str = answer.json()["error"]["message"]
    assert name in message, message
    return f"the load got {answer.status_code}"


async def not_finite(repeats: int) -> Seen:
    """Load non-finite weights, and send texts to a model that overflows at one token."""
    with _store(MODEL) as store:
        _add(store, "poisoned", _poison)
        _add(store, BROKEN, _add_nans)
        models = (MODEL, "poisoned")
        async with serving(Setup({"model-store": store}, models=models)) as server:

            async def work(seen: Seen) -> None:
                seen.notes.append(await _load_is_refused(server, BROKEN))
                body = {"model": "poisoned", "heads": 12}
                clean = await _answers(server, body, [TEXTS[0], TEXTS[2]])
                for _ in range(repeats):
                    mixed = await _answers(server, body, list(TEXTS))
                    assert "error" in mixed[1], mixed[1]
                    for found, right in ((mixed[0], clean[0]), (mixed[2], clean[1])):
                        seen.wrong += found.get("label") != right["label"]
                    alone = await server.plain.post("/classify", json=body | {"input": TEXTS[1]})
                    assert alone.status_code == 500, alone.text
                seen.notes.append(f"such a text got {alone.status_code} {_code(alone.json())}")
                await server.until_whole()

            return await under_load(server, work)


async def _answers(server: Server, body: dict[str, object], texts: list[str]) -> list[dict]:  # type: ignore[type-arg]
    answer = await server.plain.post("/classify", json=body | {"input": texts})
    assert answer.status_code == 200, answer.text
    found: list[dict] = answer.json()["data"]  # type: ignore[type-arg]
    return found


def _code(body: dict[str, dict[str, str]]) -> str:
    return f"`{body['error']['code']}`"


def _tokenizer(**parts: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / TOKENIZER
        path.write_text(json.dumps(json.loads(path.read_text()) | parts))

    return change


PANICS_AT_A_TEXT = {"type": "FixedLength", "length": 0}
PANICS_AT_LOAD = {
    "type": "BPE", "vocab": {"a": 0, "aa": 1}, "merges": [["a", "a"]],
    "continuing_subword_prefix": "####",
}  # fmt: skip


async def panics(repeats: int) -> Seen:
    """Send texts to a model whose tokenizer panics on them, and load one that panics at once."""
    with _store(MODEL) as store:
        _add(store, "panicking", _tokenizer(pre_tokenizer=PANICS_AT_A_TEXT))
        _add(store, BROKEN, _tokenizer(model=PANICS_AT_LOAD))
        models = (MODEL, "panicking")
        async with serving(Setup({"model-store": store}, models=models)) as server:

            async def work(seen: Seen) -> None:
                seen.notes.append(await _load_is_refused(server, BROKEN))
                for _ in range(repeats):
                    body = {"input": TEXTS[0], "model": "panicking"}
                    answer = await server.plain.post("/classify", json=body)
                    assert answer.status_code == 500, answer.text
                seen.notes.append(f"a text got {answer.status_code} {_code(answer.json())}")
                await server.until_whole()

            return await under_load(server, work)
