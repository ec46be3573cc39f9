"""Traces: the spans of a request in frontend and engine, and links to its batches."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, format_span_id, format_trace_id

from service.telemetry.otel import Tracing
from tests.support.serving import Service, held, service
from tests.support.stores import sentences
from tests.support.waiting import until

TEXT = "otter"
TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{CALLER}-01"


@dataclass
class Traced:
    """A service with the spans that it exported."""

    service: Service
    exporter: InMemorySpanExporter

    def spans(self, name: str | None = None) -> list[ReadableSpan]:
        """Return the finished spans, all or those of one name."""
        finished = self.exporter.get_finished_spans()
        return [span for span in finished if name in (None, span.name)]

    def only_span(self, name: str) -> ReadableSpan:
        """Return the only span of a name."""
        (span,) = self.spans(name)
        return span


@pytest_asyncio.fixture
async def traced(model_store: Path) -> AsyncIterator[Traced]:
    exporter = InMemorySpanExporter()
    frontend = Tracing(exporter, "frontend", at_once=True)
    engine_tracing = Tracing(exporter, "engine-0", follow=True, at_once=True)
    async with service(
        model_store, models=["topics"], tracer_provider=frontend.provider
    ) as running:
        running.core.spans = engine_tracing.pass_spans()
        exporter.clear()
        yield Traced(running, exporter)
    frontend.close()
    engine_tracing.close()


def trace_of(span: ReadableSpan) -> str:
    assert span.context is not None
    return format_trace_id(span.context.trace_id)


def id_of(span: ReadableSpan) -> str:
    assert span.context is not None
    return format_span_id(span.context.span_id)


def parent_of(span: ReadableSpan) -> str | None:
    return None if span.parent is None else format_span_id(span.parent.span_id)


def linked(span: ReadableSpan) -> set[str]:
    return {format_span_id(link.context.span_id) for link in span.links}


async def test_a_trace_has_a_span_for_every_stage(traced: Traced) -> None:
    await traced.service.answer(TEXT, heads=2)
    request = traced.only_span("POST /classify")
    assert request.kind is SpanKind.SERVER
    stages = [span for span in traced.spans() if parent_of(span) == id_of(request)]
    assert sorted(span.name for span in stages) == [
        "budget", "compute", "queue", "tokenize",
    ]  # fmt: skip
    assert {trace_of(span) for span in stages} == {trace_of(request)}
    processes = {span.name: span.resource.attributes["budgetformer.process"] for span in stages}
    assert processes["tokenize"] == processes["budget"] == "frontend"
    assert processes["compute"] == processes["queue"] == "engine-0"


async def test_the_stages_are_consecutive_within_the_request(traced: Traced) -> None:
    await traced.service.answer(TEXT, heads=2)
    request = traced.only_span("POST /classify")
    stages = [span for span in traced.spans() if parent_of(span) == id_of(request)]
    stages.sort(key=lambda span: (span.start_time or 0, span.end_time or 0))
    assert [span.name for span in stages] == ["tokenize", "budget", "queue", "compute"]
    slack = 2_000_000  # nanoseconds: two clocks are read one after the other
    moments = [moment or 0 for span in stages for moment in (span.start_time, span.end_time)]
    assert all(
        later >= earlier - slack for earlier, later in zip(moments, moments[1:], strict=False)
    )
    assert request.start_time is not None
    assert request.end_time is not None
    assert request.start_time - slack <= moments[0]
    assert moments[-1] <= request.end_time + slack


async def test_spans_have_budget_and_batch_size(traced: Traced) -> None:
    await traced.service.answer([TEXT, TEXT], heads=3)
    compute = traced.only_span("compute").attributes or {}
    assert compute["budgetformer.budget"] == 3
    assert compute["budgetformer.items"] == 2
    assert compute["budgetformer.batch.items"] == 2
    assert compute["budgetformer.batch.budget"] == 3
    assert compute["budgetformer.model"] == "topics:2"
    assert (traced.only_span("budget").attributes or {})["budgetformer.budget"] == 3
    tokenize = traced.only_span("tokenize").attributes or {}
    assert tokenize["budgetformer.items"] == 2
    assert tokenize["budgetformer.tokens"] == compute["budgetformer.batch.tokens"]


async def test_an_item_answered_at_step_0_has_no_compute_span(traced: Traced) -> None:
    await traced.service.answer(TEXT, heads=0)
    assert not traced.spans("compute")
    assert (traced.only_span("budget").attributes or {})["budgetformer.budget"] == 0


async def test_an_escalation_has_its_own_queue_and_compute_spans(traced: Traced) -> None:
    answers = [await traced.service.item(text, quality="best") for text in sentences("music")[:12]]
    escalated = [answer for answer in answers if answer["heads"]["used"] > 2 * 3]
    assert len(traced.spans("compute")) == len(answers) + len(escalated)
    assert len(traced.spans("queue")) == len(answers) + len(escalated)


async def test_the_trace_of_the_caller_is_continued(traced: Traced) -> None:
    headers = {"traceparent": TRACEPARENT}
    await traced.service.client.post("/classify", json={"input": TEXT}, headers=headers)
    request = traced.only_span("POST /classify")
    assert trace_of(request) == TRACE
    assert parent_of(request) == CALLER
    assert trace_of(traced.only_span("budget")) == TRACE


async def test_traces_that_the_caller_does_not_sample_are_not_recorded(traced: Traced) -> None:
    headers = {"traceparent": f"00-{TRACE}-{CALLER}-00"}
    await traced.service.client.post("/classify", json={"input": TEXT}, headers=headers)
    assert not traced.spans()


@pytest.mark.parametrize("header", ["", "nonsense", f"ff-{TRACE}-{CALLER}-01", "00-0-0-01"])
async def test_an_invalid_traceparent_starts_a_new_trace(traced: Traced, header: str) -> None:
    headers = {"traceparent": header}
    answer = await traced.service.client.post("/classify", json={"input": TEXT}, headers=headers)
    assert answer.status_code == 200
    assert trace_of(traced.only_span("POST /classify")) != TRACE


async def test_a_batch_is_linked_to_every_request_in_it(traced: Traced) -> None:
    with held(traced.service.core):
        first = asyncio.create_task(traced.service.answer(TEXT, heads=1))
        await until(lambda: traced.service.in_flight() == 1, "arrival of the first")
        rest = [asyncio.create_task(traced.service.answer(TEXT, heads=4)) for _ in range(3)]
        await until(lambda: traced.service.in_flight() == 4, "arrival of all")
    await asyncio.gather(first, *rest)
    batch = max(traced.spans("compute batch"), key=lambda span: len(span.links))
    assert (batch.attributes or {})["budgetformer.batch.requests"] == 3
    compute_spans = [span for span in traced.spans("compute") if linked(span) == {id_of(batch)}]
    assert linked(batch) == {parent_of(span) for span in compute_spans}
    assert len(linked(batch)) == 3
    assert trace_of(batch) not in {trace_of(span) for span in compute_spans}


async def test_probes_and_scrapes_are_not_traced(traced: Traced) -> None:
    for path in ("/metrics", "/health", "/health/ready", "/v2/health/live", "/ping"):
        await traced.service.client.get(path)
    assert not traced.spans()


async def test_no_span_contains_a_text(traced: Traced) -> None:
    secret = "xyzzy"
    await traced.service.ask(f"{secret} otter")
    await traced.service.ask([secret, 5])
    await traced.service.ask(secret, model="nothing")
    await traced.service.client.post(f"/classify?text={secret}", json={"input": secret})
    assert len(traced.spans("POST /classify")) == 4
    assert secret not in "".join(span.to_json() for span in traced.spans())


async def test_metrics_have_exemplars_with_the_trace(traced: Traced) -> None:
    await traced.service.answer(TEXT)
    headers = {"Accept": "application/openmetrics-text; version=1.0.0"}
    shown = (await traced.service.client.get("/metrics", headers=headers)).text
    trace = trace_of(traced.only_span("POST /classify"))
    named = [line.split("{")[0] for line in shown.splitlines() if f'trace_id="{trace}"' in line]
    assert "budgetformer_request_duration_seconds_bucket" in named
    assert "budgetformer_stage_duration_seconds_bucket" in named


async def test_without_tracing_exemplars_have_the_trace_of_the_caller(
    model_store: Path,
) -> None:
    async with service(model_store, models=["topics"]) as plain:
        await plain.client.post(
            "/classify", json={"input": TEXT}, headers={"traceparent": TRACEPARENT}
        )
        headers = {"Accept": "application/openmetrics-text; version=1.0.0"}
        shown = (await plain.client.get("/metrics", headers=headers)).text
    assert f'trace_id="{TRACE}"' in shown
