"""The models as a frontend knows them: checkpoints, tokenizers, and who uses them."""

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
    """Load what the frontend needs of a checkpoint folder.

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


@dataclass(frozen=True)
class Candidate:
    """A version that is being rolled out beside the served one.

    Attributes:
        model: the version.
        weight: share of the requests that it answers.
        shadow: share of the other requests that it computes too.
    """

    model: ServedModel
    weight: float
    shadow: float

    def answers(self, request_id: str) -> bool:
        """Say whether it answers a request: the same one always, in every frontend."""
        return _place(request_id) < self.weight

    def shadows(self, request_id: str) -> bool:
        """Say whether it also computes a request that it does not answer."""
        return _place(request_id) >= 1 - self.shadow * (1 - self.weight)


def _place(request_id: str) -> float:
    """Return a number in [0, 1) that every frontend derives from the id."""
    return zlib.crc32(request_id.encode()) / 2**32


class Models:
    """The served version of every model, its candidate if it has one, and the default model.

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
        self.candidates: dict[str, Candidate] = {}
        self._default = default and default.partition(":")[0]

    @property
    def default(self) -> str | None:
        """Name of the default model; None when nothing is served."""
        return self._default or next(iter(sorted(self.served)), None)

    def get(self, spec: str | None, request_id: str | None = None) -> ServedModel:
        """Return the model for `name`, `name:version`, or None, the default.

        Args:
            spec: what a request names; with a version it may be that of a candidate.
            request_id: of a request that a candidate may answer in place of the served version;
                None: it may not.

        Raises:
            UnknownModelError: there is none.
        """
        name, _, version = (spec or self.default or "").partition(":")
        model = self.served.get(name)
        if model is None:
            known = ", ".join(sorted(self.served)) or "none"
            raise UnknownModelError(f"no model {name[:100]!r} is served (there are: {known})")
        candidate = self.candidates.get(name)
        if not version:
            if candidate is not None and request_id is not None and candidate.answers(request_id):
                return candidate.model
            return model
        choice = [model] if candidate is None else [model, candidate.model]
        for one in choice:
            if version == str(one.checkpoint.version):
                return one
        served = " and ".join(str(one.checkpoint.version) for one in choice)
        raise UnknownModelError(f"{name} is served in version {served}, not {version[:100]}")

    def shadow_of(self, model: ServedModel, request_id: str) -> ServedModel | None:
        """Return the candidate that also computes a request that this model answered, if any."""
        candidate = self.candidates.get(model.checkpoint.name)
        if candidate is None or candidate.model is model or not candidate.shadows(request_id):
            return None
        return candidate.model

    async def serve(self, versions: list[ServedVersion]) -> list[ServedModel]:
        """Serve exactly these from now on, and return those that are served no more."""
        before = self.all()
        known = {(one.checkpoint.name, one.checkpoint.version): one for one in before}
        served: dict[str, ServedModel] = {}
        candidates: dict[str, Candidate] = {}
        for wanted in versions:
            model = known.get((wanted.name, wanted.version))
            if model is None:
                try:
                    model = await asyncio.to_thread(open_model, Path(wanted.path), self._shared)
                except CheckpointError as error:  # the hub has read it a moment ago
                    log.error("checkpoint skipped", reason=str(error))
                    continue
            if wanted.candidate:
                candidates[wanted.name] = Candidate(model, wanted.weight, wanted.shadow)
            else:
                served[wanted.name] = model
        self.served, self.candidates = served, candidates
        kept = {id(model) for model in self.all()}
        return [model for model in before if id(model) not in kept]

    def all(self) -> list[ServedModel]:
        """Return every version that is served, candidates too."""
        return [*self.served.values(), *(one.model for one in self.candidates.values())]

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
