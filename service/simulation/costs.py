"""What requests cost a server outside of its passes: processor time of its processes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

from budgetformer.cost.table import SERVER_FILE, fit_costs
from budgetformer.errors import DataError

FORMAT = 1
LEAST = 1e-6
"""Seconds; what took less cannot be told from nothing."""


@dataclass(frozen=True)
class ProcessCost:
    """Seconds of one kind of process: for each request, for each of its texts, for each token."""

    request: float = 0.0
    text: float = 0.0
    token: float = 0.0

    def seconds(self, texts: int, tokens: int) -> float:
        """Return what a request takes."""
        return self.request + self.text * texts + self.token * tokens


@dataclass(frozen=True)
class EngineCost:
    """Seconds of an engine beside its passes: for each request, each text, and each pass."""

    request: float = 0.0
    text: float = 0.0
    run: float = 0.0


@dataclass(frozen=True)
class ServerCosts:
    """Seconds of processor time that a request takes outside of the passes.

    Attributes:
        frontend: parsing, tokenizing, writing the answer.
        engine: reading a request, handing passes to the device, answering.
        hub: counting.
        way: seconds that a lone request takes beyond all of this: between processes, and from and
            to a client on the same machine.
        among: part of its cost that a request takes which a frontend or the hub goes on to from
            another; what wakes them costs all of it.
    """

    frontend: ProcessCost = ProcessCost()
    engine: EngineCost = EngineCost()
    hub: ProcessCost = ProcessCost()
    way: float = 0.0
    among: float = 1.0

    def lone(self, asked: Asked) -> float:
        """Return the seconds of a request in frontend and engine, passes and `way` left out."""
        engine = self.engine
        beside = engine.request + engine.text * asked.texts + engine.run * asked.runs
        frontend = self.frontend
        return (
            frontend.request + frontend.text * asked.texts + frontend.token * asked.tokens + beside
        )

    def dump(self) -> str:
        """Return the costs as JSON."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"


@dataclass(frozen=True)
class Asked:
    """Lone requests of one form: of each, the texts, tokens and passes; seconds by process."""

    texts: float
    tokens: float
    runs: float
    frontend: float
    engine: float
    hub: float


def fit_server(asked: Sequence[Asked]) -> ServerCosts:
    """Fit costs to lone requests of several forms, by least relative squares, none below zero.

    `Asked.engine` is what the engine took beside its passes.
    """
    shapes = [[1.0, form.texts, form.tokens] for form in asked]
    runs = [[1.0, form.texts, form.runs] for form in asked]

    def fit(sizes: list[list[float]], seconds: Iterable[float]) -> list[float]:
        return fit_costs(sizes, [max(taken, LEAST) for taken in seconds])

    return ServerCosts(
        ProcessCost(*fit(shapes, (form.frontend for form in asked))),
        EngineCost(*fit(runs, (form.engine for form in asked))),
        ProcessCost(*fit(shapes, (form.hub for form in asked))),
    )


def read_costs(path: Path) -> ServerCosts:
    """Read the costs of a file, or of `server.json` in a folder.

    Raises:
        DataError: there is none, or it is damaged.
    """
    file = path / SERVER_FILE if path.is_dir() else path
    try:
        values = json.loads(file.read_text())
        if values.pop("format") != FORMAT:
            raise ValueError(f"this program reads format {FORMAT}")
        costs = ServerCosts(
            ProcessCost(
                **values.pop("front" if "front" in values else "frontend")
            ),  # the key of older files
            EngineCost(**values.pop("engine")),
            ProcessCost(**values.pop("hub")),
            **values,
        )
        numbers = [
            *astuple(costs.frontend),
            *astuple(costs.engine),
            *astuple(costs.hub),
            costs.way,
            costs.among,
        ]
        if not all(math.isfinite(n) and n >= 0 for n in numbers):
            raise ValueError("costs must be finite and not negative")
    except OSError as error:
        reason = f"{file}: {error.strerror or error}"
        raise DataError(f"{reason}; `budgetformer tune --url` measures it") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file}: no costs of a server: {error}") from error
    return costs
