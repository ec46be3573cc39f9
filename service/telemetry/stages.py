"""Spans of the stages of a request in a frontend."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry.trace import INVALID_SPAN, Span, Tracer


@contextmanager
def stage_span(tracer: Tracer | None, name: str) -> Iterator[Span]:
    """Open the span of a stage of a request; it records nothing if tracing is off.

    Exceptions are not recorded, since they may quote texts.
    """
    if tracer is None:
        yield INVALID_SPAN
        return
    with tracer.start_as_current_span(
        name, record_exception=False, set_status_on_exception=False
    ) as span:
        yield span
