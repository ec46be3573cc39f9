"""Content negotiation by Accept and Accept-Encoding (RFC 9110, 12.5)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from fastapi import Request

ARROW = "application/vnd.apache.arrow.stream"
JSON = ("application/json", "application/*", "*/*")
"""Media ranges that include JSON, in order of precedence."""


class Choice(NamedTuple):
    """A media range or coding in lower case, its parameters, and its weight (0 to 1)."""

    kind: str
    parameters: dict[str, str]
    weight: float


def accepted(request: Request) -> str:
    """Return all Accept headers of a request, joined."""
    return ",".join(request.headers.getlist("accept"))


def choices(accept: str) -> Iterator[Choice]:
    """Parse an Accept header; an invalid weight counts as 0."""
    for choice in accept.lower().split(","):
        kind, *given = (part.strip() for part in choice.split(";"))
        parameters = {k.strip(): v.strip(' "') for k, _, v in (p.partition("=") for p in given)}
        yield Choice(kind, parameters, _weight(parameters.get("q", "1")))


def _weight(text: str) -> float:
    return float(text) if re.fullmatch(r"(0(\.\d{0,3})?|1(\.0{0,3})?)", text) else 0.0


def _weights(accept: str) -> dict[str, float]:
    """Return the highest weight of each media range or coding."""
    weights: dict[str, float] = {}
    for kind, _, weight in choices(accept):
        weights[kind] = max(weights.get(kind, 0.0), weight)
    return weights


def prefers_openmetrics(accept: str) -> bool:
    """Return whether an Accept header asks for OpenMetrics 1.0.0 rather than Prometheus text."""
    weights = {"application/openmetrics-text": 0.0, "text/plain": 0.0}
    for kind, parameters, weight in choices(accept):
        if kind == "application/openmetrics-text" and parameters.get("version", "1.0.0") != "1.0.0":
            continue
        if kind in weights:
            weights[kind] = max(weights[kind], weight)
    openmetrics, text = weights.values()
    return openmetrics > 0 and openmetrics >= text


def prefers_arrow(accept: str) -> bool:
    """Return whether an Accept header names Arrow's stream format with a higher weight than JSON's.

    A range such as `*/*` does not ask for Arrow.
    """
    if ARROW not in accept.lower():
        return False
    weights = _weights(accept)
    json = next((weights[kind] for kind in JSON if kind in weights), 0.0)
    return weights.get(ARROW, 0.0) > json


def prefers_gzip(accept_encoding: str) -> bool:
    """Return whether an Accept-Encoding header allows gzip with at least the weight of identity."""
    weights = _weights(accept_encoding)
    gzip = next((weights[name] for name in ("gzip", "x-gzip", "*") if name in weights), 0.0)
    return gzip > 0 and gzip >= weights.get("identity", 0.0)
