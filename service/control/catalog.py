"""What the store offers, and which version of each model is served."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

from budgetformer.checkpoint.manifest import NAME
from budgetformer.checkpoint.store import (
    Checkpoint,
    Store,
    load_tokenizer,
    read_checkpoint,
    read_store,
)
from budgetformer.errors import CheckpointError
from service.control.served_state import ServedState
from service.settings import Settings


class UnknownModelError(Exception):
    """The store has no such model or version, or it is not served."""


class Catalog:
    """The served version of every model, and the candidate of those that are rolled out.

    Which version is served first: the one that the settings name, else the one that was decided,
    else the highest.

    Args:
        settings: name the store, the models to serve, and the default model.

    Attributes:
        state: what operators decided, and the roll-outs.
        served, candidates: by name.

    Raises:
        CheckpointError: the store is no folder, or the default model is not in it.
    """

    def __init__(self, settings: Settings) -> None:
        store, default = settings.model_store, settings.default_model
        self.store = store
        self.state = ServedState(settings.state_dir)
        self.served: dict[str, Checkpoint] = {}
        self.candidates: dict[str, Checkpoint] = {}
        found = read_store(store)
        self.errors = [*found.errors, *filter(None, [self.state.error])]
        for spec in settings.models or sorted(found.checkpoints):
            try:
                checkpoint = found.find(self._first(spec, found, settings))
                load_tokenizer(checkpoint)
            except CheckpointError as error:
                self.errors.append(str(error))
                continue
            self.serve(checkpoint)
            self._resume(checkpoint, found)
        if default is not None and default.partition(":")[0] not in self.served:
            raise CheckpointError(f"the default model {default!r} is not in {store}")

    def _first(self, spec: str, found: Store, settings: Settings) -> str:
        name, _, version = spec.partition(":")
        versions = [checkpoint.version for checkpoint in found.checkpoints.get(name, [])]
        if version or not versions:
            return spec
        named = settings.version_of(name)
        if named is not None:
            return f"{name}:{named}"
        decided = self.state.version(name, max(versions))
        if decided in versions:
            return f"{name}:{decided}"
        self.errors.append(f"{name}: version {decided}, which was decided on, is not in the store")
        return spec

    def _resume(self, served: Checkpoint, found: Store) -> None:
        """Go on with the roll-out of a model, if it was running and both versions are there."""
        rollout = self.state.running(served.name)
        if rollout is None:
            return
        reason = f"version {served.version} is served since a restart"
        if rollout.served == served.version:
            try:
                candidate = found.find(f"{served.name}:{rollout.candidate}")
                load_tokenizer(candidate)
            except CheckpointError as error:
                reason = str(error)
            else:
                self.candidates[served.name] = candidate
                return
        rollout.state, rollout.reason, rollout.ended = "stopped", reason, time.time()
        self.errors.append(f"roll-out of {served.name}:{rollout.candidate} stopped: {reason}")

    def __iter__(self) -> Iterator[Checkpoint]:
        """Yield every version that is served, candidates too."""
        yield from self.served.values()
        yield from self.candidates.values()

    def get(self, name: str, version: int) -> Checkpoint | None:
        """Return a version that is served, or a candidate."""
        found = (one for one in self if (one.name, one.version) == (name, version))
        return next(found, None)

    def serve(self, checkpoint: Checkpoint) -> Checkpoint | None:
        """Serve a version, and return what it takes the place of."""
        before = self.served.get(checkpoint.name)
        self.served[checkpoint.name] = checkpoint
        return before

    def withdraw(self, name: str) -> Checkpoint:
        """Stop serving a model.

        Raises:
            UnknownModelError: it is not served.
        """
        try:
            return self.served.pop(name)
        except KeyError:
            raise UnknownModelError(f"no model {name!r} is served") from None

    def candidate(self, name: str, version: int | None) -> Checkpoint:
        """Read a version (None: the highest) as the store has it now; it is not served yet.

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
        folder /= str(numbers[-1] if version is None else version)
        if not folder.resolve().is_relative_to(self.store.resolve()):
            raise CheckpointError(f"{folder}: is a link to a folder outside the store")
        checkpoint = read_checkpoint(folder)
        load_tokenizer(checkpoint)
        return checkpoint
