"""The models as the front knows them.

Checkpoints, tokenizers and the rules that requests may ask for.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Encoding, Tokenizer

from budgetformer.checkpoint import NAME, Checkpoint, load_tokenizer, read_checkpoint, read_store
from budgetformer.errors import CheckpointError


class UnknownModelError(Exception):
    """The store has no such model, or another version of it is served."""


@dataclass(eq=False)
class ServedModel:
    """A checkpoint and its tokenizer, which truncates to the model's length.

    It counts who uses it, so that it is not taken from the engines before the last is done.
    """

    checkpoint: Checkpoint
    tokenizer: Tokenizer
    _users: int = 0
    _idle: asyncio.Event = field(default_factory=asyncio.Event)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Count a request that is on its way."""
        self._users += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._users -= 1
            if not self._users:
                self._idle.set()

    async def until_idle(self) -> None:
        """Wait for the requests on their way."""
        if self._users:
            await self._idle.wait()

    def encode(self, texts: list[str | tuple[str, str]]) -> list[Encoding]:
        """Tokenize texts and pairs; an encoding that overflows was truncated."""
        return self.tokenizer.encode_batch(texts)


def open_model(checkpoint: Checkpoint) -> ServedModel:
    """Load what the front needs of a checkpoint.

    Raises:
        CheckpointError: its tokenizer is damaged.
    """
    return ServedModel(checkpoint, load_tokenizer(checkpoint))


class Models:
    """The served version of every model, and the default one.

    Args:
        store: folder of checkpoints.
        names: models to serve, each `name` (its highest version) or `name:version`; empty: all.
        default: model of requests that name none; None: the first by name.

    Raises:
        CheckpointError: the store is no folder, or the default model is not in it.
    """

    def __init__(self, store: Path, names: list[str], default: str | None) -> None:
        self.store = store
        self.errors: list[str] = []
        self.served: dict[str, ServedModel] = {}
        self.loading: dict[tuple[str, int], ServedModel] = {}
        found = read_store(store)
        self.errors += found.errors
        for spec in names or sorted(found.checkpoints):
            try:
                checkpoint = found.find(spec)
                self.served[checkpoint.name] = open_model(checkpoint)
            except CheckpointError as error:
                self.errors.append(str(error))
        default = default and default.partition(":")[0]
        if default is not None and default not in self.served:
            raise CheckpointError(f"the default model {default!r} is not in {store}")
        self._default = default

    @property
    def default(self) -> str | None:
        """Name of the default model; None when nothing is served."""
        return self._default or next(iter(sorted(self.served)), None)

    def get(self, spec: str | None) -> ServedModel:
        """Return the model for `name`, `name:version`, or None, the default.

        Raises:
            UnknownModelError: there is none.
        """
        name, _, version = (spec or self.default or "").partition(":")
        model = self.served.get(name)
        if model is None:
            known = ", ".join(sorted(self.served)) or "none"
            raise UnknownModelError(f"no model {name!r} is served (there are: {known})")
        if version and version != str(model.checkpoint.version):
            raise UnknownModelError(
                f"{name} is served in version {model.checkpoint.version}, not {version}"
            )
        return model

    @property
    def known(self) -> dict[tuple[str, int], ServedModel]:
        """Every model that engines may speak of, by name and version.

        The served, and one being loaded.
        """
        served = {(name, m.checkpoint.version): m for name, m in self.served.items()}
        return served | self.loading

    def versions(self, name: str) -> list[int]:
        """Return the versions of a model in the store."""
        checkpoints = read_store(self.store).checkpoints.get(name, [])
        return [checkpoint.version for checkpoint in checkpoints]

    def stored(self) -> list[tuple[str, int]]:
        """Return the name and version of every sound checkpoint in the store."""
        return [
            (name, checkpoint.version)
            for name, versions in sorted(read_store(self.store).checkpoints.items())
            for checkpoint in versions
        ]

    def candidate(self, name: str, version: int | None) -> ServedModel:
        """Open a version (None: the highest) as the store has it now; it is not served yet.

        Raises:
            UnknownModelError: the store has none.
            CheckpointError: it is damaged.
        """
        folder = self.store / name
        if not re.fullmatch(NAME, name) or not folder.is_dir():
            raise UnknownModelError(f"no model {name!r} in the store")
        numbers = sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal())
        if not numbers or (version is not None and version not in numbers):
            raise UnknownModelError(f"the store has no version {version or ''} of {name!r}")
        chosen = numbers[-1] if version is None else version
        folder /= str(chosen)
        if not folder.resolve().is_relative_to(self.store.resolve()):
            raise CheckpointError(f"{folder}: leads out of the store")
        return open_model(read_checkpoint(folder))
