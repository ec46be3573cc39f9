"""A measured table of the seconds that passes take on a device.

The seconds of a batch at a ladder step are a constant plus a cost per token plus a cost per item.
Schedulers and simulators read these tables, so this module does not import torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from budgetformer.errors import DataError

FORMAT = 1
SERVER_FILE = "server.json"
"""File in a folder of tables, with the costs of requests outside passes."""


@dataclass(frozen=True)
class StepCost:
    """Seconds of a batch at one step: a `constant`, plus `token` per token and `item` per item."""

    constant: float
    token: float
    item: float

    def seconds(self, tokens: int, items: int) -> float:
        """Return the seconds of a batch."""
        return self.constant + self.token * tokens + self.item * items


@dataclass(frozen=True)
class Measurement:
    """One timed batch: its step (0: the decision), total tokens, items, and seconds."""

    step: int
    tokens: int
    items: int
    seconds: float


@dataclass(frozen=True)
class CostTable:
    """Seconds by ladder step on one device.

    Attributes:
        model: `name:version` of the model.
        device, dtype: device and precision of the measurement; "" for an estimate.
        steps: costs of steps 0..S; step 0 is the decision, which every item needs.
    """

    model: str
    device: str
    dtype: str
    steps: tuple[StepCost, ...]

    def batch(self, step: int, tokens: int, items: int) -> float:
        """Return the seconds of a batch at a step."""
        return self.steps[step].seconds(tokens, items)

    def share(self, step: int, tokens: int, items: int = 1) -> float:
        """Return the seconds that items, with `tokens` in total, add to a batch at a step."""
        return self.steps[step].token * tokens + self.steps[step].item * items

    def constant(self, step: int) -> float:
        """Return the constant seconds of a batch at a step, independent of its content."""
        return self.steps[step].constant

    def dump(self) -> str:
        """Return the table as JSON."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"


def fit_table(model: str, device: str, dtype: str, measured: Sequence[Measurement]) -> CostTable:
    """Fit a cost table to timed batches; see `fit_costs`.

    Raises:
        ValueError: a step from 0 to the highest one has fewer than three batches.
    """
    last = max((m.step for m in measured), default=0)
    by_step = [[m for m in measured if m.step == step] for step in range(last + 1)]
    if any(len(of_step) < 3 for of_step in by_step):
        raise ValueError("each step needs at least three timed batches")
    return CostTable(model, device, dtype, tuple(_fit(of_step) for of_step in by_step))


def _fit(measured: Sequence[Measurement]) -> StepCost:
    sizes = [[1.0, m.tokens, m.items] for m in measured]
    return StepCost(*fit_costs(sizes, [m.seconds for m in measured]))


def fit_costs(sizes: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Return the seconds per unit of each column of `sizes`, none negative.

    The fit minimises the squared relative errors.

    Args:
        sizes: sizes of each timed batch, such as [1, tokens, items].
        seconds: seconds of each batch, above 0.
    """
    import numpy as np  # here, to save its memory in processes that only read tables

    measured = np.array(seconds)
    relative = np.array(sizes) / measured[:, None]
    columns = list(range(relative.shape[1]))
    while True:
        fitted = np.linalg.lstsq(relative[:, columns], np.ones(len(measured)), rcond=None)[0]
        if (fitted >= 0).all() or len(columns) == 1:
            break
        # Drop the most negative term, and fit the others again.
        del columns[int(fitted.argmin())]
    costs = np.zeros(relative.shape[1])
    costs[columns] = np.maximum(fitted, 0.0)
    return [float(cost) for cost in costs]


def guess_table(
    model: str, token_macs: Sequence[float], seconds_per_mac: float, constant: float
) -> CostTable:
    """Estimate a cost table for a device without measurements, from multiply-adds only.

    Args:
        model: `name:version` of the model.
        token_macs: multiply-adds per token at steps 0..S.
        seconds_per_mac: seconds per multiply-add on the device.
        constant: constant seconds per batch.
    """
    steps = tuple(StepCost(constant, macs * seconds_per_mac, 0.0) for macs in token_macs)
    return CostTable(model, "", "", steps)


def read_tables(path: Path) -> dict[str, CostTable]:
    """Return the tables in a file, or in all JSON files of a folder, by model.

    Raises:
        DataError: there is no table, or one is damaged.
    """
    files = [path]
    if path.is_dir():
        files = [file for file in sorted(path.glob("*.json")) if file.name != SERVER_FILE]
    if not files:
        raise DataError(f"{path}: the folder has no cost table (*.json)")
    tables = [_read(file) for file in files]
    return {table.model: table for table in tables}


def _read(path: Path) -> CostTable:
    try:
        values = json.loads(path.read_text())
        return _parse(values)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not a valid cost table: {error}") from error


def _parse(values: Mapping[str, object]) -> CostTable:
    if values["format"] != FORMAT:
        raise ValueError(f"format {values['format']} is not supported, only {FORMAT}")
    rows = values["steps"]
    if not isinstance(rows, list) or not rows:
        raise ValueError("steps must be a list with at least one step")
    steps = tuple(StepCost(**{k: float(v) for k, v in row.items()}) for row in rows)
    if not all(math.isfinite(x) and x >= 0 for step in steps for x in asdict(step).values()):
        raise ValueError("costs must be finite and not negative")
    return CostTable(str(values["model"]), str(values["device"]), str(values["dtype"]), steps)
