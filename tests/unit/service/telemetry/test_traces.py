"""When traces are exported, and the trace context of requests."""

from __future__ import annotations

import subprocess
import sys

import pytest

from service.telemetry import traces
from service.telemetry.context import RequestContext, current_request, serving
from service.telemetry.traces import TracingError, check_tracing, exporter_asked_for

ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}


@pytest.mark.parametrize(
    ("environment", "exporter"),
    [
        ({}, None),
        ({"OTEL_SERVICE_NAME": "classifier"}, None),
        ({"OTEL_TRACES_SAMPLER": "always_on"}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, None),
        (ENDPOINT, "otlp"),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://collector:4318/v1/traces"}, "otlp"),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, "otlp"),
        ({"OTEL_TRACES_EXPORTER": "console"}, "console"),
        (ENDPOINT | {"OTEL_TRACES_EXPORTER": "none"}, None),
        (ENDPOINT | {"OTEL_SDK_DISABLED": "true"}, None),
        (ENDPOINT | {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, "otlp"),
    ],
)
def test_the_standard_variables_select_the_exporter(
    environment: dict[str, str], exporter: str | None
) -> None:
    assert exporter_asked_for(environment) == exporter


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "zipkin"),
        (ENDPOINT | {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "grpc"),
    ],
)
def test_unsupported_exporters_and_protocols_are_refused(
    environment: dict[str, str], named: str
) -> None:
    with pytest.raises(TracingError, match=named):
        exporter_asked_for(environment)


@pytest.mark.parametrize("package", ["no_such_package", "no_such_package.inside"])
def test_a_missing_package_is_an_error_that_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "otlp")
    monkeypatch.setattr(traces, "PACKAGES", (package,))
    with pytest.raises(TracingError, match=rf"{package}.*budgetformer-serving\[tracing\]"):
        check_tracing()


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [("service.frontend", "opentelemetry.sdk"), ("service.engine.__main__", "opentelemetry")],
)
def test_opentelemetry_is_not_imported_without_tracing(module: str, unwanted: str) -> None:
    program = (
        f"import sys, {module}\n"
        "from service.telemetry.traces import open_tracing\n"
        "assert open_tracing('here') is None\n"
        f"print([name for name in sys.modules if name.startswith('{unwanted}')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=True,
        env={"PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.stdout.strip() == "[]"


def test_the_context_of_a_request_ends_with_it() -> None:
    context = RequestContext("r-1", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
    with serving(context):
        assert current_request() == context
    assert current_request() == RequestContext()


@pytest.mark.parametrize(("flags", "sampled"), [("01", True), ("00", False), ("03", True)])
def test_only_a_recorded_trace_is_an_exemplar(flags: str, sampled: bool) -> None:
    trace = "0af7651916cd43dd8448eb211c80319c"
    context = RequestContext("r-1", f"00-{trace}-b7ad6b7169203331-{flags}")
    assert context.exemplar == ({"trace_id": trace} if sampled else None)


def test_without_a_trace_there_is_no_exemplar() -> None:
    assert RequestContext("r-1").exemplar is None
