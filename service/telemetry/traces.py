"""Traces: off, with nothing imported, unless the usual OTEL_* variables name an exporter."""

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
    """The environment asks for tracing that is not available."""


def exporter_asked_for(environment: Mapping[str, str]) -> str | None:
    """Return the trace exporter that the environment names; None: tracing is off.

    Raises:
        TracingError: the exporter or its protocol is not supported.
    """
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    default = "otlp" if any(environment.get(name) for name in ENDPOINTS) else "none"
    exporter = environment.get("OTEL_TRACES_EXPORTER", "").strip().lower() or default
    if exporter == "none":
        return None
    if exporter not in EXPORTERS:
        supported = ", ".join((*EXPORTERS, "none"))
        raise TracingError(
            f"OTEL_TRACES_EXPORTER={exporter} is not supported; set it to one of {supported}"
        )
    protocol = next((environment[name] for name in PROTOCOLS if environment.get(name)), None)
    if exporter == "otlp" and protocol not in (None, "http/protobuf"):
        raise TracingError(f"OTLP over {protocol} is not supported; set it to http/protobuf")
    return exporter


def check_tracing() -> None:
    """Check at the start that the tracing that the environment asks for is available.

    Raises:
        TracingError: it is not available.
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
        process: name of this process.
        follow: record the traces that another process has chosen, and no others.

    Raises:
        TracingError: the exporter or its protocol is not supported.
    """
    exporter = exporter_asked_for(os.environ)
    if exporter is None:
        return None
    from service.telemetry.otel import Tracing, make_exporter

    return Tracing(make_exporter(exporter), process, follow=follow)
