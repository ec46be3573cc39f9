"""Spans through the OpenTelemetry SDK. Imported only where somebody traces."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

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
from service.telemetry.pass_spans import PassRun, Rider

MAX_LINKS = 1024
"""A batch names every request in it; the SDK's own limit of 128 would cut some off."""
CLOSE_SECONDS = 1.0


def make_exporter(name: str) -> SpanExporter:
    """Return the exporter of that name; OTLP reads where to send from OTEL_EXPORTER_OTLP_*."""
    return ConsoleSpanExporter() if name == "console" else OTLPSpanExporter()


class Tracing:
    """Where the spans of one process go.

    Args:
        exporter: takes finished spans.
        process: name of this process among those of the server.
        follow: record what another process chose to record; else OTEL_TRACES_SAMPLER chooses.
        at_once: export each span as it ends, instead of many together in the background.
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
        """Return what makes spans of an engine's passes; `clock` is the engine's."""
        return OtelPassSpans(self.provider.get_tracer("budgetformer"), clock)

    def close(self) -> None:
        """Export what is left; a collector that does not answer is not waited for."""
        closing = threading.Thread(target=self.provider.shutdown, daemon=True, name="last-spans")
        closing.start()
        closing.join(CLOSE_SECONDS)


class OtelPassSpans:
    """Make spans of passes.

    A pass is a span of its own, linked to every request in it. Each of these gets, in its own
    trace, how long it waited for the pass and the pass itself, linked to the span of the pass.
    """

    def __init__(self, tracer: Tracer, clock: Callable[[], float]) -> None:
        self._tracer = tracer
        self._clock = clock

    def ran(self, run: PassRun) -> None:
        """Record a pass, for those of its requests that are traced."""
        served: dict[RequestContext, list[Rider]] = {}
        for rider in run.riders:
            if rider.request.sampled:
                served.setdefault(rider.request, []).append(rider)
        if not served:
            return
        since_epoch = time.time_ns() - int(self._clock() * 1e9)

        def wall(moment: float) -> int:
            return since_epoch + int(moment * 1e9)

        common: dict[str, str | int] = {
            "budgetformer.model": run.model,
            "budgetformer.batch.items": len(run.riders),
            "budgetformer.batch.tokens": run.tokens,
        }
        if run.stage == "compute":
            common["budgetformer.batch.budget"] = run.step
        parents = {request: _span_context(request) for request in served}
        whole = self._tracer.start_span(
            f"{run.stage} batch",
            context=Context(),
            attributes=common | {"budgetformer.batch.requests": len(served)},
            links=[Link(parent) for parent in parents.values()],
            start_time=wall(run.started),
        )
        whole.end(wall(run.ended))
        for request, riders in served.items():
            within = set_span_in_context(NonRecordingSpan(parents[request]), Context())
            queued = min(rider.waits_since for rider in riders)
            self._tracer.start_span("queue", within, start_time=wall(queued)).end(wall(run.started))
            own: dict[str, str | int] = {
                "budgetformer.budget": max(rider.budget for rider in riders),
                "budgetformer.items": len(riders),
            }
            self._tracer.start_span(
                run.stage,
                within,
                attributes=common | own,
                links=[Link(whole.get_span_context())],
                start_time=wall(run.started),
            ).end(wall(run.ended))


def _span_context(request: RequestContext) -> SpanContext:
    _, trace_id, span_id, flags = request.traceparent.split("-")
    return SpanContext(
        int(trace_id, 16), int(span_id, 16), is_remote=True, trace_flags=TraceFlags(int(flags, 16))
    )
