"""What an engine tells of its passes, for those of its requests that are traced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from service.telemetry.context import RequestContext

Stage = Literal["budget", "compute"]


@dataclass(frozen=True)
class Rider:
    """An item in a pass.

    Attributes:
        request: whose item it is.
        waits_since: when it arrived or its last pass ended, on the engine's clock.
        budget: its ladder step after the pass.
    """

    request: RequestContext
    waits_since: float
    budget: int


@dataclass(frozen=True)
class PassRun:
    """One pass over the device, and whom it served.

    Attributes:
        stage: what it was for: decide budgets, or compute a batch.
        model: `name:version`.
        step: ladder step of a batch.
        tokens: of all its items.
        riders: its items.
        started, ended: on the engine's clock.
    """

    stage: Stage
    model: str
    step: int
    tokens: int
    riders: Sequence[Rider]
    started: float
    ended: float


class PassSpans(Protocol):
    """What an engine tells of its passes."""

    def ran(self, run: PassRun) -> None:
        """Record a pass, for those of its requests that are traced."""
