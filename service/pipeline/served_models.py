"""The models as a front knows them: checkpoints, tokenizers, and who uses them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from budgetformer.checkpoint.deciding import load_decider
from budgetformer.checkpoint.store import Checkpoint, load_encoder, read_checkpoint, read_store
from budgetformer.errors import CheckpointError
from budgetformer.inference.decider import Decider
from budgetformer.tokenization import TextEncoder
from service.ipc.control_messages import ServedVersion
from service.process import return_memory

log = structlog.get_logger()


class UnknownModelError(Exception):
    """No such model is served, or it is in another version."""


@dataclass(eq=False)
class ServedModel:
    """A checkpoint, its tokenizer, which cuts texts to the model's length, and its decider.

    `decider` None: budgets are decided by the engine, as its network reads embeddings for that.

    It counts who uses it, so that it is not taken from the engines before the last is done.
    """

    checkpoint: Checkpoint
    encoder: TextEncoder
    decider: Decider | None
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


def open_model(path: Path, shared: Path | None = None) -> ServedModel:
    """Load what the front needs of a checkpoint folder.

    Args:
        path: the folder.
        shared: see `load_decider`.

    Raises:
        CheckpointError: it is damaged.
    """
    checkpoint = read_checkpoint(path)
    encoder, decider = load_encoder(checkpoint), load_decider(checkpoint, shared)
    served = ServedModel(checkpoint, encoder, decider)
    return_memory()
    return served


class Models:
    """The served version of every model, and the default one.

    Args:
        store: folder of checkpoints.
        default: model of requests that name none, `name` or `name:version`; None: the first by
            name.
        shared: folder through which the frontends of a server hold tables once.
    """

    def __init__(self, store: Path, default: str | None, shared: Path | None = None) -> None:
        self.store = store
        self._shared = shared
        self.served: dict[str, ServedModel] = {}
        self._default = default and default.partition(":")[0]

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
            raise UnknownModelError(f"no model {name[:100]!r} is served (there are: {known})")
        if version and version != str(model.checkpoint.version):
            raise UnknownModelError(
                f"{name} is served in version {model.checkpoint.version}, not {version[:100]}"
            )
        return model

    async def serve(self, versions: list[ServedVersion]) -> list[ServedModel]:
        """Serve exactly these from now on, and return those that are served no more."""
        now: dict[str, ServedModel] = {}
        for wanted in versions:
            served = self.served.get(wanted.name)
            if served is not None and served.checkpoint.version == wanted.version:
                now[wanted.name] = served
                continue
            try:
                now[wanted.name] = await asyncio.to_thread(
                    open_model, Path(wanted.path), self._shared
                )
            except CheckpointError as error:  # the hub has read it a moment ago
                log.error("checkpoint left out", reason=str(error))
        before, self.served = self.served, now
        return [model for name, model in before.items() if now.get(name) is not model]

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
