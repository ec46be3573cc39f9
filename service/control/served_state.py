"""Decisions of operators on which versions to serve: `rollouts.json` in the state folder."""

from __future__ import annotations

from pathlib import Path

import msgspec

from budgetformer.errors import BudgetFormerError
from service.control.rollout import RollOut
from service.state_files import replace_file

FILE = "rollouts.json"


class StateError(BudgetFormerError):
    """The state folder cannot be read or written."""


class ModelState(msgspec.Struct):
    """Decision on one model.

    Attributes:
        served: version to serve.
        highest: highest version when the decision was made. A higher version that is added to the
            store later is served at the next start, as without any decision.
        rollout: last roll-out of the model.
    """

    served: int
    highest: int
    rollout: RollOut | None = None


class ServedState:
    """The decisions of a server, and the file that stores them.

    Args:
        folder: the state folder; it is created with the first decision.

    Attributes:
        models: decisions by name of the model.
        error: why the file could not be read; the server then starts without decisions.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self.models: dict[str, ModelState] = {}
        self.error = ""
        try:
            self.models = msgspec.json.decode(self._path.read_bytes(), type=dict[str, ModelState])
        except (FileNotFoundError, NotADirectoryError):
            pass
        except (OSError, msgspec.MsgspecError) as error:
            reason = getattr(error, "strerror", None) or error
            self.error = f"{self._path}: {reason}; earlier roll-outs and rollbacks are lost"

    def version(self, model: str, highest: int) -> int:
        """Return the version to serve, given the highest in the store."""
        decision = self.models.get(model)
        if decision is None or (highest > decision.highest and not self.running(model)):
            return highest
        return decision.served

    def running(self, model: str) -> RollOut | None:
        """Return the roll-out of a model that has not ended."""
        rollout = self.last(model)
        return rollout if rollout is not None and rollout.state == "running" else None

    def last(self, model: str) -> RollOut | None:
        """Return the last roll-out of a model."""
        decision = self.models.get(model)
        return decision.rollout if decision is not None else None

    def save(self) -> None:
        """Write the file; once this returns, the decisions survive a crash of the machine.

        Raises:
            StateError: the file cannot be written.
        """
        content = msgspec.json.format(msgspec.json.encode(self.models)) + b"\n"
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            replace_file(self._path, content)
        except OSError as error:
            reason = error.strerror or error
            raise StateError(
                f"{self._path}: {reason}; set state_dir to a folder that can be written"
            ) from None
