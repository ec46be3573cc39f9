"""Traces: off, and nothing imported, unless the usual OTEL_* variables name an exporter."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING

from budgetformer.errors import BudgetFormerError

if TYPE_CHECKING:
    from service.telemetry.otel import Tracing

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
EXPORTERS = ("otlp", "console")
PACKAGES = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")


class TracingError(BudgetFormerError):
    """Tracing is asked for in a way that cannot be had."""


def exporter_asked_for(environment: Mapping[str, str]) -> str | None:
    """Return the exporter of traces that the environment names; None: none.

    Raises:
        TracingError: it is none that this program has.
    """
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    default = "otlp" if any(environment.get(name) for name in ENDPOINTS) else "none"
    exporter = environment.get("OTEL_TRACES_EXPORTER", "").strip().lower() or default
    if exporter == "none":
        return None
    if exporter not in EXPORTERS:
        known = ", ".join((*EXPORTERS, "none"))
        raise TracingError(f"OTEL_TRACES_EXPORTER={exporter}: known are {known}")
    spoken = next((environment[name] for name in PROTOCOLS if environment.get(name)), None)
    if exporter == "otlp" and spoken not in (None, "http/protobuf"):
        raise TracingError(f"OTLP is spoken as http/protobuf only, not as {spoken}")
    return exporter


def check_tracing() -> None:
    """See that what the environment asks for can be had, before any process needs it.

    Raises:
        TracingError: it cannot.
    """
    if exporter_asked_for(os.environ) is None:
        return
    for package in PACKAGES:
        try:
            missing = find_spec(package) is None
        except ModuleNotFoundError:  # its parent is missing too
            missing = True
        if missing:
            raise TracingError(
                f"OTEL_* asks for traces, but {package} is not installed: "
                "pip install 'budgetformer-serving[tracing]'"
            )


def open_tracing(process: str, *, follow: bool = False) -> Tracing | None:
    """Start to export traces, if the environment asks for it.

    Args:
        process: name of this process among those of the server.
        follow: record whatever another process has chosen to record, and nothing else.

    Raises:
        TracingError: what is asked for cannot be had.
    """
    exporter = exporter_asked_for(os.environ)
    if exporter is None:
        return None
    from service.telemetry.otel import Tracing, make_exporter

    return Tracing(make_exporter(exporter), process, follow=follow)
