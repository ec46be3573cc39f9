"""Measure the processor time of metrics, logs and traces: `python loadtests/observing.py`.

Prints microseconds per request, or per call, of each part.
"""

from __future__ import annotations

import asyncio
import logging
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import structlog
from fastapi import FastAPI, Request
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.trace import NoOpTracer, Tracer
from prometheus_client import generate_latest

from service.http.app import create_app
from service.http.middleware import Observe
from service.ipc.control_messages import TO_HUB, CountsReport
from service.ipc.engine_client import Engines
from service.process import hub_socket
from service.settings import Settings
from service.telemetry.context import RequestContext, serving
from service.telemetry.counts import Counts
from service.telemetry.metrics import Metrics
from service.telemetry.otel import Tracing
from service.telemetry.pass_spans import PassItem, PassRun
from service.telemetry.recent_traffic import RecentTraffic

REPEATS, CALLS = 15, 2000
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
STAGES = {"tokenize": 4e-4, "budget": 6e-4, "queue": 2e-4, "compute": 3e-3, "respond": 1e-4}
TEXT = {"budgets": 2, "heads": 12, "tokens": 41, "macs": 11_000_000, "dense_macs": 66_000_000}
EXPECTED = {0: 0.76, 8: 0.24}


class DroppingExporter(SpanExporter):
    """A span exporter that drops spans, to measure only the cost of creating them."""

    def export(self, spans: Any) -> SpanExportResult:  # noqa: ARG002
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        pass


def microseconds(call: Callable[[], object], calls: int = CALLS) -> float:
    """Return the median processor time of a call in microseconds, over `REPEATS` rounds."""
    rounds = []
    for _ in range(REPEATS):
        started = time.process_time()
        for _ in range(calls):
            call()
        rounds.append((time.process_time() - started) / calls * 1e6)
    return statistics.median(rounds)


def metrics_of_two_models() -> Metrics:
    metrics = Metrics()
    metrics.register_routes(["/classify"])
    for model in ("ag_news", "banking77"):
        metrics.register_model(model, "1", range(13))
    return metrics


def count(counts: Counts, texts: int = 1, traceparent: str = "") -> None:
    """Count one request, as the frontend does."""
    columns = {name: [value] * texts for name, value in TEXT.items()}
    with serving(RequestContext("r", traceparent)):
        counts.classified(
            "ag_news", 1, **columns,
            heads_of_one=72, expected=EXPECTED, stages=STAGES, truncated=0,
        )  # fmt: skip
        counts.request_ended("/classify", "ok", 5e-3)


def send_report(counts: Counts, metrics: Metrics) -> None:
    """Count a request, and add the counts to the registry as the hub does 4 times a second."""
    count(counts)
    received = TO_HUB.decode(msgspec.msgpack.encode(CountsReport(0, counts.take())))
    metrics.add(received.difference)


def app(tracing: Tracing | None) -> FastAPI:
    """Return an application whose only route answers at once."""
    telemetry = {
        "tracer_provider": tracing.provider if tracing else None,
        "tracing": tracing is not None,
        "metrics": False,
        "logs": False,
        "operation_spans": False,
        "auto_configure": False,
    }
    application = FastAPI(telemetry=telemetry)  # type: ignore[arg-type]

    @application.get("/")
    async def answer(_: Request) -> dict[str, str]:
        return {}

    return application


def observed_app(log_share: float) -> Observe:
    """Return an application that is measured, counted and logged as in a frontend."""
    settings = Settings(access_log=log_share)
    state = create_app(settings, Engines([]), hub_socket(Path())).state
    return Observe(app(None), state.shared, state.dialects)


def request_sender(application: Any) -> Callable[[], None]:
    """Return a function that sends one request through an application, without a socket."""
    scope = {
        "type": "http", "method": "GET", "path": "/", "raw_path": b"/", "query_string": b"",
        "headers": [(b"host", b"localhost")], "http_version": "1.1", "scheme": "http",
        "server": ("localhost", 80), "client": ("localhost", 1), "root_path": "",
    }  # fmt: skip
    loop = asyncio.new_event_loop()

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(_: Any) -> None:
        return None

    return lambda: loop.run_until_complete(application(dict(scope), receive, send))


def trace_tokenization(tracer: Tracer) -> None:
    """Run the frontend's instrumentation of tokenization."""
    with tracer.start_as_current_span(
        "tokenize", record_exception=False, set_status_on_exception=False
    ) as span:
        span.set_attribute("budgetformer.items", 1)
        span.set_attribute("budgetformer.tokens", 41)


def costs() -> dict[str, float]:
    """Return the processor time of each part in microseconds, by the part's description."""
    metrics = metrics_of_two_models()
    frontend = Tracing(DroppingExporter(), "frontend")
    engine = Tracing(DroppingExporter(), "engine-0", follow=True)
    spans = engine.pass_spans()
    now = time.monotonic()
    pass_item = PassItem(RequestContext("r", TRACEPARENT), now, 2)
    runs = [
        PassRun(stage, "ag_news:1", 2, 41, [pass_item], now, now) for stage in ("budget", "compute")
    ]

    def record_passes() -> None:
        for run in runs:
            spans.ran(run)

    tracer, no_tracer = frontend.provider.get_tracer("budgetformer"), NoOpTracer()
    counts = Counts()
    bare, traced = app(None), app(frontend)
    observed, logged = observed_app(log_share=0.01), observed_app(log_share=1.0)
    recent = RecentTraffic(metrics)
    bare_cost = microseconds(request_sender(bare))
    return {
        "metrics of a request": microseconds(lambda: count(counts)),
        "metrics of a request, with exemplars": microseconds(lambda: count(counts, 1, TRACEPARENT)),
        "metrics of a request of 64 texts": microseconds(lambda: count(counts, 64)),
        "report of counts to the registry": microseconds(lambda: send_report(counts, metrics)),
        "middleware (id, context, count, 1 % logged)": microseconds(request_sender(observed))
        - bare_cost,
        "middleware, every request logged": microseconds(request_sender(logged)) - bare_cost,
        "tracing off: instrumentation of a stage": microseconds(
            lambda: trace_tokenization(no_tracer)
        ),
        "tracing on: HTTP span": microseconds(request_sender(traced)) - bare_cost,
        "tracing on: span of a stage": microseconds(lambda: trace_tokenization(tracer)),
        "tracing on: engine, both passes of one text": microseconds(record_passes),
        "recent traffic of the playground, once in 5 s": microseconds(
            lambda: recent.sample(now), calls=20
        ),
        "one scrape": microseconds(lambda: generate_latest(metrics.registry), calls=2),
    }


def main() -> None:
    with Path(os.devnull).open("w") as null:
        structlog.configure(
            processors=[
                structlog.contextvars.merge_contextvars,
                structlog.processors.add_log_level,
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                structlog.processors.JSONRenderer(),
            ],
            wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
            logger_factory=structlog.PrintLoggerFactory(null),
            cache_logger_on_first_use=True,
        )
        for name, cost in costs().items():
            print(f"{name:48} {cost:9.1f} us")


if __name__ == "__main__":
    main()
