"""The committed dashboards, as data."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "docker" / "grafana" / "dashboards"
BOARDS = {path.stem: path for path in sorted(FOLDER.glob("*.json"))}
MEASURING = [name for name in BOARDS if name != "runbooks"]


@dataclass(frozen=True)
class Query:
    """One query of one panel."""

    board: str
    panel: str
    ref: str
    expression: str

    def filled(self, window: str, span: str) -> str:
        """Return the query as Grafana sends it for all models and versions."""
        filled = self.expression.replace("$__rate_interval", window).replace("$__range", span)
        for variable in ("$model", "$version", "$first", "$second"):
            filled = filled.replace(variable, ".*")
        return filled

    def __str__(self) -> str:
        return f"{self.board}: {self.panel} {self.ref}"


def read_board(name: str) -> dict[str, Any]:
    """Return one dashboard."""
    return dict(json.loads(BOARDS[name].read_text(encoding="utf-8")))


def queries() -> list[Query]:
    """Return the queries of all panels."""
    return [
        Query(name, panel["title"], target["refId"], target["expr"])
        for name in MEASURING
        for panel in read_board(name)["panels"]
        for target in panel.get("targets") or []
    ]


def annotations() -> list[Query]:
    """Return the queries of all annotations."""
    return [
        Query(name, event["name"], "event", event["expr"])
        for name in MEASURING
        for event in read_board(name)["annotations"]["list"]
        if "expr" in event
    ]
