"""Cost of requests outside of passes: processor time of a server's processes."""

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
"""Smallest cost in seconds; smaller measurements are not distinguishable from zero."""


@dataclass(frozen=True)
class ProcessCost:
    """Seconds of one kind of process for each request, each of its texts, and each token."""

    request: float = 0.0
    text: float = 0.0
    token: float = 0.0

    def seconds(self, texts: float, tokens: float) -> float:
        """Return the seconds of a request."""
        return self.request + self.text * texts + self.token * tokens


@dataclass(frozen=True)
class EngineCost:
    """Seconds of an engine outside of passes, for each request, each text, and each pass."""

    request: float = 0.0
    text: float = 0.0
    run: float = 0.0


@dataclass(frozen=True)
class ServerCosts:
    """Processor time of a request outside of passes.

    Attributes:
        frontend: cost of parsing, tokenizing and writing the answer.
        engine: cost of reading requests, starting passes and answering.
        hub: cost of counting.
        way: remaining latency (s) of a lone request: transfer between processes, and to and from a
            client on the same machine.
        among: share of its cost that a request takes in a frontend or hub that is already busy. A
            request that wakes an idle process takes its full cost.
    """

    frontend: ProcessCost = ProcessCost()
    engine: EngineCost = EngineCost()
    hub: ProcessCost = ProcessCost()
    way: float = 0.0
    among: float = 1.0

    def lone(self, form: MeasuredRequests) -> float:
        """Return the seconds of a lone request in frontend and engine, without passes and `way`."""
        engine = self.engine
        in_engine = engine.request + engine.text * form.texts + engine.run * form.runs
        return self.frontend.seconds(form.texts, form.tokens) + in_engine

    def dump(self) -> str:
        """Return the costs as JSON."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"


@dataclass(frozen=True)
class MeasuredRequests:
    """Measured requests of one form.

    Attributes:
        texts, tokens, runs: mean numbers of texts, tokens and passes of a request.
        frontend, engine, hub: mean seconds of a request by process.
    """

    texts: float
    tokens: float
    runs: float
    frontend: float
    engine: float
    hub: float


def fit_server(forms: Sequence[MeasuredRequests]) -> ServerCosts:
    """Fit non-negative costs to lone requests of several forms, by least relative squares.

    `MeasuredRequests.engine` must not include the passes.
    """
    shapes = [[1.0, form.texts, form.tokens] for form in forms]
    runs = [[1.0, form.texts, form.runs] for form in forms]

    def fit(sizes: list[list[float]], seconds: Iterable[float]) -> list[float]:
        return fit_costs(sizes, [max(measured, LEAST) for measured in seconds])

    return ServerCosts(
        ProcessCost(*fit(shapes, (form.frontend for form in forms))),
        EngineCost(*fit(runs, (form.engine for form in forms))),
        ProcessCost(*fit(shapes, (form.hub for form in forms))),
    )


def read_costs(path: Path) -> ServerCosts:
    """Read the costs from a file, or from `server.json` in a folder.

    Raises:
        DataError: the file does not exist, or is invalid.
    """
    file = path / SERVER_FILE if path.is_dir() else path
    try:
        values = json.loads(file.read_text())
        if values.pop("format") != FORMAT:
            raise ValueError(f"this program reads format {FORMAT}")
        frontend = "front" if "front" in values else "frontend"  # the key of older files
        parts = (
            ProcessCost(**values.pop(frontend)),
            EngineCost(**values.pop("engine")),
            ProcessCost(**values.pop("hub")),
        )
        costs = ServerCosts(*parts, **values)
        numbers = [costs.way, costs.among, *(n for part in parts for n in astuple(part))]
        if not all(math.isfinite(n) and n >= 0 for n in numbers):
            raise ValueError("costs must be finite and not negative")
    except OSError as error:
        reason = f"{file}: {error.strerror or error}"
        raise DataError(f"{reason}; `budgetformer tune --url` writes it") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file}: not a valid file of server costs: {error}") from error
    return costs
