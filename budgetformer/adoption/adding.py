"""Add classifiers to a store unchanged, each of them once.

A classifier that the store already has is found by the digest of its files, without torch and
Transformers, whose loading takes seconds.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from budgetformer import __version__
from budgetformer.checkpoint.manifest import MANIFEST, NAME, digest_of
from budgetformer.checkpoint.store import Checkpoint, next_version, read_checkpoint
from budgetformer.errors import CheckpointError, DataError
from budgetformer.model_folder import files_of, is_model, model_folder, model_name

Log = Callable[[str], None]

ORIGIN, TEXTS = "origin", "texts"
"""Keys of a manifest's recipe: digests of the converted classifier, and of the texts for int8."""


def find_classifier(source: str) -> Path | None:
    """Return the folder of a classifier, or None if the source is a checkpoint or something else.

    Args:
        source: folder that Transformers wrote, or id of a model on the Hugging Face hub, which is
            downloaded.

    Raises:
        CheckpointError: the hub does not have the model, or cannot be reached.
    """
    folder = model_folder(source)
    return folder if is_model(folder) and not (folder / MANIFEST).exists() else None


def add_classifier(
    folder: Path,
    model_store: Path,
    log: Log,
    name: str | None = None,
    version: int | None = None,
    texts: Path | None = None,
) -> Checkpoint:
    """Convert a classifier without training, and add it to a store.

    Weights keep their precision, so answers equal those of Transformers' pipeline. All quality
    levels are the same: every text gets all heads. If `version` is None and the store has a version
    that this release made of the same files, that version is returned.

    Args:
        folder: output of `save_pretrained`: a classifier of a supported family and its tokenizer.
        model_store: folder of the store.
        log: called with one line per event.
        name: name of the model; None: the folder's name.
        version: version to write; None: the next one.
        texts: texts similar to production traffic, to measure state ranges for int8; None: no int8,
            so CPUs without AMX compute in float32.

    Raises:
        CheckpointError: the folder cannot be converted, or the version exists.
        DataError: the texts, or a file of the classifier, cannot be read.
    """
    name = name or Path(model_name(folder)).name
    if not re.match(NAME, name):
        raise CheckpointError(
            f"{name!r} is not a valid model name (letters, digits, '.', '_' and '-', at most 64); "
            "choose another (--name)"
        )
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    try:
        recipe = {ORIGIN: _digest_of_model(folder)}
        if texts is not None:
            recipe[TEXTS] = digest_of(texts)
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}") from error
    if version is None:
        for existing in _versions(model_store / name):
            if recipe.items() <= existing.manifest.recipe.items():
                log(f"{existing.label} already is this classifier")
                return existing
    from budgetformer.adoption.as_is import write_unchanged

    target = model_store / name / str(version or next_version(model_store / name))
    write_unchanged(folder, target, log, texts, recipe)
    log(f"wrote {target}")
    return read_checkpoint(target)


def _digest_of_model(folder: Path) -> str:
    """Return a digest of a model's files and of this release, which defines the conversion."""
    files = {path.name: digest_of(path) for path in files_of(folder)}
    return hashlib.sha256(f"{__version__} {files}".encode()).hexdigest()


def _versions(folder: Path) -> Iterator[Checkpoint]:
    """Yield the valid checkpoints of a model, newest first."""
    numbers = (int(path.name) for path in folder.glob("*") if path.name.isdecimal())
    for number in sorted(numbers, reverse=True):
        try:
            yield read_checkpoint(folder / str(number))
        except CheckpointError:  # the store reports it
            continue
