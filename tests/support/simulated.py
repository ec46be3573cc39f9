"""Models, texts and servers for tests of the simulation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from budgetformer.cost.table import CostTable, StepCost
from budgetformer.inference.policy import QUALITY_NAMES
from service.scheduling.price import Outlook
from service.settings import Settings
from service.simulation.costs import EngineCost, ProcessCost, ServerCosts
from service.simulation.engine import SimModel
from service.simulation.fleet import Fleet
from service.simulation.server import Records, SimServer
from service.simulation.texts import Population, Text

FREE = StepCost(0.0, 0.0, 0.0)
NOTHING = ServerCosts()
COSTS = ServerCosts(
    ProcessCost(8e-4, 2e-5, 1e-6), EngineCost(1e-4, 5e-5, 2e-4), ProcessCost(3e-5, 1e-5), 3e-4
)


def model(*steps: StepCost) -> SimModel:
    """Return a model of these steps, 1 and up, whose decision costs nothing."""
    table = CostTable("news:1", "cpu", "float32", (FREE, *steps))
    return SimModel(table, dict.fromkeys(QUALITY_NAMES, Outlook({len(steps): 1.0})))


def text(*steps: int, tokens: int = 100, fast: Sequence[int] | None = None) -> Text:
    """Return a text that runs these steps, or `fast` at that level if given."""
    levels = dict.fromkeys(QUALITY_NAMES, tuple(steps))
    return Text(tokens, levels if fast is None else levels | {"fast": tuple(fast)}, tokens)


def settings(**chosen: Any) -> Settings:
    """Return settings of a server with one engine and very long deadlines."""
    endless = {"timeout_ms": 10**8, "max_timeout_ms": 10**8}
    return Settings(**{"engines": 1, "quality": "balanced"} | endless | chosen)


def server(
    model: SimModel, costs: ServerCosts, cores: int = 1, **chosen: Any
) -> tuple[SimServer, Records]:
    """Return a server and its records."""
    records = Records()
    return SimServer(model, settings(**chosen), cores, costs, records), records


def fleet(model: SimModel, *texts: Text, cores: int = 1, **more: Any) -> Fleet:
    """Return a fleet; `more` are further arguments of `Fleet`."""
    own = {"settings": settings(), "costs": NOTHING} | more
    return Fleet(model, Population(texts), cores=cores, **own)
