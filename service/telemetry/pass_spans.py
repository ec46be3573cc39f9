"""Description of an engine's passes, from which spans of traced requests are made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from service.telemetry.context import RequestContext

Stage = Literal["budget", "compute"]


@dataclass(frozen=True)
class PassItem:
    """An item in a pass.

    Attributes:
        request: context of its request.
        waits_since: time at which it arrived or its last pass ended, on the engine's clock.
        budget: its ladder step after the pass.
    """

    request: RequestContext
    waits_since: float
    budget: int


@dataclass(frozen=True)
class PassRun:
    """One pass on the device.

    Attributes:
        stage: kind of pass: a decision of budgets, or a batch at a ladder step.
        model: model version, as `name:version`.
        step: ladder step of a batch.
        tokens: number of tokens of all items.
        items: its items.
        started, ended: times on the engine's clock.
    """

    stage: Stage
    model: str
    step: int
    tokens: int
    items: Sequence[PassItem]
    started: float
    ended: float


class PassSpans(Protocol):
    """Recorder of an engine's passes."""

    def ran(self, run: PassRun) -> None:
        """Record a pass for its traced requests."""
