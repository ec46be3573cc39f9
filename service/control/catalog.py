"""The model versions in the store, and which of them are served."""

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
    """The model or version is not in the store, or not served."""


class Catalog:
    """The served version of every model, and the candidates of running roll-outs.

    At the start, the version that the settings name is served, else the version that was promoted
    or rolled back to, else the highest.

    Args:
        settings: settings with the store, the models to serve, and the default model.

    Attributes:
        state: decisions of operators, and the roll-outs.
        served: served version of each model, by name.
        candidates: candidate of each roll-out, by name of the model.
        errors: problems with the store or the decisions, each a line for people.

    Raises:
        CheckpointError: the store is not a folder, or the default model is not in it.
    """

    def __init__(self, settings: Settings) -> None:
        store, default = settings.model_store, settings.default_model
        self.store = store
        self.state = ServedState(settings.state_dir)
        self.served: dict[str, Checkpoint] = {}
        self.candidates: dict[str, Checkpoint] = {}
        stored = read_store(store)
        self.errors = [*stored.errors, *filter(None, [self.state.error])]
        for spec in settings.models or sorted(stored.checkpoints):
            try:
                checkpoint = stored.find(self._version_at_start(spec, stored, settings))
                load_tokenizer(checkpoint)
            except CheckpointError as error:
                self.errors.append(str(error))
                continue
            self.serve(checkpoint)
            self._resume(checkpoint, stored)
        if default is not None and default.partition(":")[0] not in self.served:
            raise CheckpointError(f"the default model {default!r} is not in {store}")

    def _version_at_start(self, spec: str, stored: Store, settings: Settings) -> str:
        """Return `name:version` of the version to serve first; `spec` may lack the version."""
        name, _, version = spec.partition(":")
        versions = [checkpoint.version for checkpoint in stored.checkpoints.get(name, [])]
        if version or not versions:
            return spec
        named = settings.version_of(name)
        if named is not None:
            return f"{name}:{named}"
        decided = self.state.version(name, max(versions))
        if decided in versions:
            return f"{name}:{decided}"
        self.errors.append(
            f"{name}: version {decided} was promoted or rolled back to, but is not in the store"
        )
        return spec

    def _resume(self, served: Checkpoint, stored: Store) -> None:
        """Resume the roll-out of a model if it was running and both versions are still there."""
        rollout = self.state.running(served.name)
        if rollout is None:
            return
        reason = f"version {served.version} is served since a restart"
        if rollout.served == served.version:
            try:
                candidate = stored.find(f"{served.name}:{rollout.candidate}")
                load_tokenizer(candidate)
            except CheckpointError as error:
                reason = str(error)
            else:
                self.candidates[served.name] = candidate
                return
        rollout.state, rollout.reason, rollout.ended = "stopped", reason, time.time()
        self.errors.append(f"roll-out of {served.name}:{rollout.candidate} stopped: {reason}")

    def __iter__(self) -> Iterator[Checkpoint]:
        """Yield every served version, including candidates."""
        yield from self.served.values()
        yield from self.candidates.values()

    def get(self, name: str, version: int) -> Checkpoint | None:
        """Return a served version or a candidate; None: this version is neither."""
        return next((c for c in self if (c.name, c.version) == (name, version)), None)

    def serve(self, checkpoint: Checkpoint) -> Checkpoint | None:
        """Serve a version, and return the version that it replaces, if any."""
        before = self.served.get(checkpoint.name)
        self.served[checkpoint.name] = checkpoint
        return before

    def withdraw(self, name: str) -> Checkpoint:
        """Stop serving a model, and return the version that was served.

        Raises:
            UnknownModelError: the model is not served.
        """
        try:
            return self.served.pop(name)
        except KeyError:
            raise UnknownModelError(f"no model {name!r} is served") from None

    def candidate(self, name: str, version: int | None) -> Checkpoint:
        """Read a version (None: the highest) from the store; it is not served yet.

        Raises:
            UnknownModelError: the version is not in the store.
            CheckpointError: the checkpoint is damaged.
        """
        folder = self.store / name
        if not re.fullmatch(NAME, name) or not folder.is_dir():
            raise UnknownModelError(f"no model {name!r} in the store")
        versions = sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal())
        if not versions:
            raise UnknownModelError(f"the store has no version of {name!r}")
        if version is not None and version not in versions:
            raise UnknownModelError(f"the store has no version {version} of {name!r}")
        folder /= str(versions[-1] if version is None else version)
        if not folder.resolve().is_relative_to(self.store.resolve()):
            raise CheckpointError(f"{folder}: is a link to a folder outside the store")
        checkpoint = read_checkpoint(folder)
        load_tokenizer(checkpoint)
        return checkpoint
