"""Install a checkpoint into a model store, verified and atomically."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from pathlib import Path

from pydantic import ValidationError

from budgetformer.checkpoint.install.sources import MAX_BYTES, Source, Tell, open_source
from budgetformer.checkpoint.manifest import CARD, MANIFEST, Manifest, write_manifest
from budgetformer.checkpoint.staging import disk_errors, move_into_place, scratch_folder
from budgetformer.checkpoint.store import (
    Checkpoint,
    first_problem,
    load_tokenizer,
    next_version,
    read_checkpoint,
)
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
    """Install the checkpoint in `source` into a model store and return it.

    Only files that the manifest lists are read, up to the sizes that it states. The folder appears
    in the store after all checks.

    Args:
        source: folder, tar or zip file, http(s) URL of such a file, or URL that fsspec supports.
        model_store: folder of the store; created if it does not exist.
        version: version in the store; None: the version in the manifest, or the next free one if
            the store has that version or a higher one.
        tell: function that is called with the bytes fetched and the total (None: unknown).
        try_out: whether to load the network as serving does, or only to check the hashes.

    Raises:
        CheckpointError: the checkpoint cannot be fetched, is damaged or unsafe, or the version
            exists.
    """
    with scratch_folder(model_store, ".adding-") as staging, disk_errors(source):
        folder = staging / "checkpoint"
        folder.mkdir()
        with ExitStack() as stack:
            files = stack.enter_context(open_source(source, staging, tell or (lambda *_: None)))
            manifest = _copy(files, folder)
        number = version or max(manifest.version, next_version(model_store / manifest.name))
        write_manifest(folder, manifest.model_copy(update={"version": number}))
        _try_out(folder, source, try_out)
        target = model_store / manifest.name / str(number)
        move_into_place(folder, target)
        return read_checkpoint(target)


def _copy(source: Source, folder: Path) -> Manifest:
    """Copy the files that the manifest of a source lists, and return the manifest."""
    manifests = sorted((n for n in source.names() if _base(n) == MANIFEST), key=len)
    if not manifests:
        raise CheckpointError(f"{source.label}: has no {MANIFEST}")
    if len(manifests) > 1:
        raise CheckpointError(
            f"{source.label}: has {len(manifests)} checkpoints; only one can be installed at a time"
        )
    root = manifests[0].removesuffix(MANIFEST)
    with source.open(manifests[0]) as file:
        text = file.read(MAX_TEXT_BYTES + 1)
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        raise CheckpointError(f"{source.label}: {MANIFEST}: {first_problem(error)}") from error
    sizes = {name: entry.bytes for name, entry in manifest.files.items()}
    for name in sizes:
        if name in {"", ".", "..", MANIFEST} or Path(name).name != name:
            raise CheckpointError(
                f"{source.label}: {MANIFEST}: file name {name!r} leaves the folder"
            )
    total, free = sum(sizes.values()), shutil.disk_usage(folder).free
    if total > min(MAX_BYTES, free):
        raise CheckpointError(
            f"{source.label}: too large: {total} bytes (limit {MAX_BYTES}, free on the disk {free})"
        )
    if root + CARD in source.names():
        sizes.setdefault(CARD, MAX_TEXT_BYTES)
    for name in [n for n in source.names() if n.startswith(root) and n[len(root) :] in sizes]:
        _copy_file(source, name, folder / _base(name), sizes[_base(name)])
    return manifest


def _copy_file(source: Source, name: str, target: Path, max_bytes: int) -> None:
    with source.open(name) as file, target.open("xb") as written:
        while part := file.read(COPY_BYTES):
            if written.tell() + len(part) > max_bytes:
                raise CheckpointError(f"{source.label}: {name} is larger than {max_bytes} bytes")
            written.write(part)


def _try_out(folder: Path, label: str, load: bool) -> None:
    """Check every file that serving reads, and load the network if `load` is true."""
    try:
        checkpoint = read_checkpoint(folder)
        checkpoint.verify()
        load_tokenizer(checkpoint)
        if load:
            from budgetformer.checkpoint.loading import load_network

            load_network(checkpoint)
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(str(folder), label)) from error


def _base(name: str) -> str:
    return name.rpartition("/")[2]
