"""The served models of a frontend: checkpoints, tokenizers, deciders, and requests in flight."""

from __future__ import annotations

import asyncio
import zlib
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
    """The requested model or version is not served."""


@dataclass(eq=False)
class ServedModel:
    """A served version, and the number of requests that use it.

    Engines keep the version until the last request that uses it has ended.

    Attributes:
        checkpoint: description of the checkpoint.
        encoder: tokenizer, which truncates texts to the length of the model.
        decider: decides budgets; None: the engine does, as the network reads embeddings for that.
    """

    checkpoint: Checkpoint
    encoder: TextEncoder
    decider: Decider | None
    _users: int = 0
    _idle: asyncio.Event = field(default_factory=asyncio.Event)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Count a request as in flight while the context is open."""
        self._users += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._users -= 1
            if not self._users:
                self._idle.set()

    async def until_idle(self) -> None:
        """Wait until no request uses this version."""
        if self._users:
            await self._idle.wait()


def open_model(path: Path, shared: Path | None = None) -> ServedModel:
    """Load the parts of a checkpoint that a frontend needs.

    Args:
        path: folder of the checkpoint.
        shared: see `load_decider`.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    checkpoint = read_checkpoint(path)
    model = ServedModel(checkpoint, load_encoder(checkpoint), load_decider(checkpoint, shared))
    return_memory()
    return model


@dataclass(frozen=True)
class Candidate:
    """A version that is being rolled out beside the served one.

    Attributes:
        model: candidate version.
        weight: share of the requests that it answers.
        shadow: share of the other requests that it computes too.
    """

    model: ServedModel
    weight: float
    shadow: float

    def answers(self, request_id: str) -> bool:
        """Return whether the candidate answers a request; every frontend returns the same."""
        return _unit_hash(request_id) < self.weight

    def shadows(self, request_id: str) -> bool:
        """Return whether the candidate also computes a request that it does not answer."""
        return _unit_hash(request_id) >= 1 - self.shadow * (1 - self.weight)


def _unit_hash(request_id: str) -> float:
    """Return a hash in [0, 1), the same one in every process."""
    return zlib.crc32(request_id.encode()) / 2**32


class Models:
    """The served version of every model, its candidate if it has one, and the default model.

    Args:
        store: folder of checkpoints.
        default: model for requests that name none, as `name` or `name:version`; None: the first by
            name.
        shared: folder for tables that the frontends of a server share; see `load_decider`.
    """

    def __init__(self, store: Path, default: str | None, shared: Path | None = None) -> None:
        self.store = store
        self._shared = shared
        self.served: dict[str, ServedModel] = {}
        self.candidates: dict[str, Candidate] = {}
        self._default = default and default.partition(":")[0]

    @property
    def default(self) -> str | None:
        """Name of the default model; None: no model is served."""
        return self._default or next(iter(sorted(self.served)), None)

    def get(self, spec: str | None, request_id: str | None = None) -> ServedModel:
        """Return the model that a request names.

        Args:
            spec: `name`, or `name:version`, which may be a candidate; None: the default model.
            request_id: id of a request that a candidate may answer instead of the served version;
                None: no candidate may.

        Raises:
            UnknownModelError: the model or the version is not served.
        """
        name, _, version = (spec or self.default or "").partition(":")
        model = self.served.get(name)
        if model is None:
            names = ", ".join(sorted(self.served)) or "none"
            raise UnknownModelError(f"no model {name[:100]!r} is served (served models: {names})")
        candidate = self.candidates.get(name)
        if not version:
            if candidate is not None and request_id is not None and candidate.answers(request_id):
                return candidate.model
            return model
        versions = {str(model.checkpoint.version): model}
        if candidate is not None:
            versions[str(candidate.model.checkpoint.version)] = candidate.model
        if version not in versions:
            served = " and ".join(versions)
            raise UnknownModelError(f"{name} is served in version {served}, not {version[:100]}")
        return versions[version]

    def shadow_of(self, model: ServedModel, request_id: str) -> ServedModel | None:
        """Return the candidate that also computes a request that `model` answers; None: none."""
        candidate = self.candidates.get(model.checkpoint.name)
        if candidate is None or candidate.model is model or not candidate.shadows(request_id):
            return None
        return candidate.model

    async def serve(self, versions: list[ServedVersion]) -> list[ServedModel]:
        """Serve exactly these versions from now on, and return the models that this retires."""
        before = self.all()
        loaded = {(model.checkpoint.name, model.checkpoint.version): model for model in before}
        served: dict[str, ServedModel] = {}
        candidates: dict[str, Candidate] = {}
        for version in versions:
            model = loaded.get((version.name, version.version))
            if model is None:
                try:
                    model = await asyncio.to_thread(open_model, Path(version.path), self._shared)
                except CheckpointError as error:  # changed since the hub has read it
                    log.error("checkpoint skipped", reason=str(error))
                    continue
            if version.candidate:
                candidates[version.name] = Candidate(model, version.weight, version.shadow)
            else:
                served[version.name] = model
        self.served, self.candidates = served, candidates
        kept = {id(model) for model in self.all()}
        return [model for model in before if id(model) not in kept]

    def all(self) -> list[ServedModel]:
        """Return every served version, including candidates."""
        return [*self.served.values(), *(each.model for each in self.candidates.values())]

    def versions(self, name: str) -> list[int]:
        """Return the versions of a model in the store."""
        checkpoints = read_store(self.store).checkpoints.get(name, [])
        return [checkpoint.version for checkpoint in checkpoints]

    def stored(self) -> list[tuple[str, int]]:
        """Return the name and version of every readable checkpoint in the store."""
        return [
            (name, checkpoint.version)
            for name, versions in sorted(read_store(self.store).checkpoints.items())
            for checkpoint in versions
        ]
