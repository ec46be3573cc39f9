"""Bring a checkpoint into a model store: whole and verified, or not at all."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from pathlib import Path

from pydantic import ValidationError

from budgetformer.checkpoint.install.sources import MAX_BYTES, Source, Tell, open_source
from budgetformer.checkpoint.manifest import CARD, MANIFEST, Manifest, write_manifest
from budgetformer.checkpoint.staging import disk_errors, place, scratch_folder
from budgetformer.checkpoint.store import Checkpoint, load_tokenizer, next_version, read_checkpoint
from budgetformer.errors import CheckpointError

__all__ = ["install"]

MAX_TEXT_BYTES = 4 * 2**20
COPY_BYTES = 2**20


def install(
    source: str,
    model_store: Path,
    version: int | None = None,
    tell: Tell | None = None,
    try_out: bool = True,
) -> Checkpoint:
    """Add the checkpoint in `source` to a store and return it.

    Only what its manifest names is read, and no more of it than the manifest says; the folder
    appears in the store when the network has been loaded from it.

    Args:
        source: a folder, a tar or zip file, an http(s) URL of one of these files, or any URL that
            fsspec knows.
        model_store: the store; it is made if it is not there.
        version: whole number; by default the manifest's own, or the next one if it is not higher
            than those that are there.
        try_out: load the network as serving does; without, its hashes are checked and no more.
        tell: is called with bytes fetched and bytes in all (None: not known).

    Raises:
        CheckpointError: it cannot be fetched, is damaged or unsafe, or the version is there.
    """
    with scratch_folder(model_store, ".adding-") as staging, disk_errors(source):
        folder = staging / "checkpoint"
        folder.mkdir()
        with ExitStack() as stack:
            opened = stack.enter_context(open_source(source, staging, tell or (lambda *_: None)))
            manifest = _copy(opened, folder)
        number = version or max(manifest.version, next_version(model_store / manifest.name))
        write_manifest(folder, manifest.model_copy(update={"version": number}))
        _try_out(folder, source, try_out)
        target = model_store / manifest.name / str(number)
        place(folder, target)
        return read_checkpoint(target)


def _copy(source: Source, folder: Path) -> Manifest:
    """Copy what the manifest of a source names, and return the manifest."""
    manifests = sorted((n for n in source.names() if _base(n) == MANIFEST), key=len)
    if not manifests:
        raise CheckpointError(f"{source.label}: holds no {MANIFEST}")
    if len(manifests) > 1:
        raise CheckpointError(f"{source.label}: holds {len(manifests)} checkpoints, give one")
    root = manifests[0].removesuffix(MANIFEST)
    with source.open(manifests[0]) as file:
        text = file.read(MAX_TEXT_BYTES + 1)
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise CheckpointError(f"{source.label}: {MANIFEST}: {place}: {first['msg']}") from error
    sizes = {name: entry.bytes for name, entry in manifest.files.items()}
    for name in sizes:
        if name in {"", ".", "..", MANIFEST} or Path(name).name != name:
            raise CheckpointError(
                f"{source.label}: {MANIFEST}: file name {name!r} leaves the folder"
            )
    total, free = sum(sizes.values()), shutil.disk_usage(folder).free
    if total > min(MAX_BYTES, free):
        raise CheckpointError(
            f"{source.label}: {total} bytes; allowed are {MAX_BYTES}, free on the disk {free}"
        )
    if root + CARD in source.names():
        sizes.setdefault(CARD, MAX_TEXT_BYTES)
    for name in [n for n in source.names() if n.startswith(root) and n[len(root) :] in sizes]:
        _copy_file(source, name, folder / _base(name), sizes[_base(name)])
    return manifest


def _copy_file(source: Source, name: str, target: Path, most: int) -> None:
    with source.open(name) as file, target.open("xb") as written:
        while part := file.read(COPY_BYTES):
            if written.tell() + len(part) > most:
                raise CheckpointError(f"{source.label}: {name} is longer than {most} bytes")
            written.write(part)


def _try_out(folder: Path, label: str, network: bool) -> None:
    """Read and check everything that serving reads, and load the network too if that is asked."""
    try:
        checkpoint = read_checkpoint(folder)
        checkpoint.verify()
        load_tokenizer(checkpoint)
        if network:
            from budgetformer.checkpoint.loading import load_network

            load_network(checkpoint)
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(str(folder), label)) from error


def _base(name: str) -> str:
    return name.rpartition("/")[2]
