"""Mutated checkpoint folders are opened, or refused by a `CheckpointError` of one line."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from budgetformer.checkpoint.store import load_tokenizer, read_checkpoint
from budgetformer.classifier import load_network
from budgetformer.errors import CheckpointError, PolicyError
from tests.support.mutation import fuzzed, mutated_bytes, mutated_json
from tests.support.stores import TOPICS, sign

CORPUS = sorted((Path(__file__).parent / "corpus" / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def folder(model_store: Path, scratch: Path) -> Path:
    copy = scratch / "store" / TOPICS / "1"
    shutil.copytree(model_store / TOPICS / "1", copy)
    return copy


@contextlib.contextmanager
def changed(folder: Path, name: str, content: bytes) -> Iterator[None]:
    """Replace the content of a file within the block."""
    path = folder / name
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


def open_checkpoint(folder: Path, whole: bool = False) -> None:
    try:
        checkpoint = read_checkpoint(folder)
        checkpoint.verify()
        for quality in ("fast", "balanced", "best", 1.0, None):
            if quality is None or checkpoint.calibrated:
                with contextlib.suppress(PolicyError):  # the level may be missing
                    checkpoint.rule(quality)
        load_tokenizer(checkpoint)
        if whole:
            load_network(checkpoint, "cpu", "float32")
    except CheckpointError as error:
        message = str(error)
        assert message
        assert "\n" not in message


def encoded(value: Any) -> bytes:
    return json.dumps(value).encode()


@fuzzed(0.45)
def test_mutated_fields_of_the_manifest(folder: Path, random: Random) -> None:
    sample = json.loads((folder / "manifest.json").read_bytes())
    with changed(folder, "manifest.json", encoded(mutated_json(random, sample))):
        open_checkpoint(folder)


@fuzzed(0.25)
def test_mutated_bytes_of_the_manifest(folder: Path, random: Random) -> None:
    sample = (folder / "manifest.json").read_bytes()
    with changed(folder, "manifest.json", mutated_bytes(random, sample)):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
@fuzzed(0.1)
def test_mutated_files_that_agree_with_the_manifest(
    folder: Path, name: str, random: Random
) -> None:
    sample = json.loads((folder / name).read_bytes())
    manifest = (folder / "manifest.json").read_bytes()
    with (
        changed(folder, "manifest.json", manifest),
        changed(folder, name, encoded(mutated_json(random, sample))),
    ):
        with contextlib.suppress(CheckpointError):
            sign(folder)
        open_checkpoint(folder, whole=name == "config.json")


@fuzzed(0.1)
def test_mutated_weights(folder: Path, random: Random) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    if random.randrange(2):
        changed_weights = mutated_bytes(random, whole[:length]) + whole[length:]
    else:
        head = encoded(mutated_json(random, json.loads(whole[8:length])))
        changed_weights = len(head).to_bytes(8, "little") + head + whole[length:]
    manifest = (folder / "manifest.json").read_bytes()
    with (
        changed(folder, "manifest.json", manifest),
        changed(folder, "model.safetensors", changed_weights),
    ):
        sign(folder)
        open_checkpoint(folder, whole=True)


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name)
def test_inputs_that_once_failed(folder: Path, path: Path) -> None:
    """The name of a file in the corpus ends with the name of the file that it replaces."""
    name = path.name.partition("-")[2]
    manifest = (folder / "manifest.json").read_bytes()
    with changed(folder, "manifest.json", manifest), changed(folder, name, path.read_bytes()):
        if name != "manifest.json":
            with contextlib.suppress(CheckpointError):
                sign(folder)
        open_checkpoint(folder, whole=name != "tokenizer.json")
