"""Spans of the stages of a request in a frontend."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from opentelemetry.trace import INVALID_SPAN, Span, Tracer

_NO_SPAN = nullcontext(INVALID_SPAN)


def stage_span(tracer: Tracer | None, name: str) -> AbstractContextManager[Span]:
    """Open the span of a stage of a request; it records nothing if tracing is off.

    Exceptions are not recorded, since they may quote texts.
    """
    if tracer is None:
        return _NO_SPAN
    return tracer.start_as_current_span(name, record_exception=False, set_status_on_exception=False)
