"""What the store offers, and which version of each model is served."""

from __future__ import annotations

import re

from budgetformer.checkpoint.manifest import NAME
from budgetformer.checkpoint.store import Checkpoint, load_tokenizer, read_checkpoint, read_store
from budgetformer.errors import CheckpointError
from service.settings import Settings


class UnknownModelError(Exception):
    """The store has no such model or version, or it is not served."""


class Catalog:
    """The served version of every model.

    Args:
        settings: name the store, the models to serve, and the default model.

    Raises:
        CheckpointError: the store is no folder, or the default model is not in it.
    """

    def __init__(self, settings: Settings) -> None:
        store, default = settings.model_store, settings.default_model
        self.store = store
        self.served: dict[str, Checkpoint] = {}
        found = read_store(store)
        self.errors = list(found.errors)
        for spec in settings.models or sorted(found.checkpoints):
            try:
                self._serve_first(found.find(spec))
            except CheckpointError as error:
                self.errors.append(str(error))
        if default is not None and default.partition(":")[0] not in self.served:
            raise CheckpointError(f"the default model {default!r} is not in {store}")

    def _serve_first(self, checkpoint: Checkpoint) -> None:
        load_tokenizer(checkpoint)
        self.serve(checkpoint)

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
            raise CheckpointError(f"{folder}: leads out of the store")
        checkpoint = read_checkpoint(folder)
        load_tokenizer(checkpoint)
        return checkpoint
