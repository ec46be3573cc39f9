"""Spans with the OpenTelemetry SDK. This module is imported only if tracing is on."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import SpanLimits, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import (
    BatchSpanProcessor,
    ConsoleSpanExporter,
    SimpleSpanProcessor,
    SpanExporter,
)
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    SpanContext,
    TraceFlags,
    Tracer,
    set_span_in_context,
)

import budgetformer
from service.telemetry.context import RequestContext
from service.telemetry.pass_spans import PassItem, PassRun

MAX_LINKS = 1024
"""A batch links to each of its requests; the SDK's default limit of 128 would cut some off."""
CLOSE_SECONDS = 1.0


def make_exporter(name: str) -> SpanExporter:
    """Create an exporter by name; OTLP reads its destination from OTEL_EXPORTER_OTLP_*."""
    return ConsoleSpanExporter() if name == "console" else OTLPSpanExporter()


class Tracing:
    """Recording and export of the spans of one process.

    Args:
        exporter: exports finished spans.
        process: name of this process.
        follow: record the traces that another process chose; otherwise OTEL_TRACES_SAMPLER chooses.
        at_once: export each span when it ends, instead of batches in the background.
    """

    def __init__(
        self, exporter: SpanExporter, process: str, *, follow: bool = False, at_once: bool = False
    ) -> None:
        named = Resource(
            {
                "service.name": "budgetformer",
                "service.version": budgetformer.__version__,
                "service.instance.id": f"{process}-{os.getpid()}",
                "budgetformer.process": process,
            }
        )
        self.provider = TracerProvider(
            sampler=ALWAYS_ON if follow else None,
            resource=named.merge(OTELResourceDetector().detect()),
            shutdown_on_exit=False,
            span_limits=SpanLimits(max_links=MAX_LINKS),
        )
        processor: SpanProcessor = (
            SimpleSpanProcessor(exporter) if at_once else BatchSpanProcessor(exporter)
        )
        self.provider.add_span_processor(processor)

    def pass_spans(self, clock: Callable[[], float] = time.monotonic) -> OtelPassSpans:
        """Return a recorder of an engine's passes; `clock` is the engine's clock."""
        return OtelPassSpans(self.provider.get_tracer("budgetformer"), clock)

    def close(self) -> None:
        """Export the last spans, within `CLOSE_SECONDS`."""
        closing = threading.Thread(target=self.provider.shutdown, daemon=True, name="last-spans")
        closing.start()
        closing.join(CLOSE_SECONDS)


@dataclass(frozen=True)
class OtelPassSpans:
    """Record passes as spans.

    A pass is the root span of a new trace, linked to each request in it. Each of these requests
    gets two spans in its own trace: its wait for the pass, and the pass, linked to the root span.
    """

    tracer: Tracer
    clock: Callable[[], float]

    def ran(self, run: PassRun) -> None:
        """Record a pass for its traced requests."""
        served: dict[RequestContext, list[PassItem]] = {}
        for item in run.items:
            if item.request.sampled:
                served.setdefault(item.request, []).append(item)
        if not served:
            return
        since_epoch = time.time_ns() - int(self.clock() * 1e9)

        def wall(moment: float) -> int:
            return since_epoch + int(moment * 1e9)

        common: dict[str, str | int] = {
            "budgetformer.model": run.model,
            "budgetformer.batch.items": len(run.items),
            "budgetformer.batch.tokens": run.tokens,
        }
        if run.stage == "compute":
            common["budgetformer.batch.budget"] = run.step
        parents = {request: _span_context(request) for request in served}
        whole = self.tracer.start_span(
            f"{run.stage} batch",
            context=Context(),
            attributes=common | {"budgetformer.batch.requests": len(served)},
            links=[Link(parent) for parent in parents.values()],
            start_time=wall(run.started),
        )
        whole.end(wall(run.ended))
        for request, items in served.items():
            within = set_span_in_context(NonRecordingSpan(parents[request]), Context())
            queued = min(item.waits_since for item in items)
            self.tracer.start_span("queue", within, start_time=wall(queued)).end(wall(run.started))
            details: dict[str, str | int] = {
                "budgetformer.budget": max(item.budget for item in items),
                "budgetformer.items": len(items),
            }
            self.tracer.start_span(
                run.stage,
                within,
                attributes=common | details,
                links=[Link(whole.get_span_context())],
                start_time=wall(run.started),
            ).end(wall(run.ended))


def _span_context(request: RequestContext) -> SpanContext:
    _, trace_id, span_id, flags = request.traceparent.split("-")
    return SpanContext(
        int(trace_id, 16), int(span_id, 16), is_remote=True, trace_flags=TraceFlags(int(flags, 16))
    )
