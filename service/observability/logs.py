"""Structured logs: JSON lines, or readable ones on a terminal. Never the text of an input."""

from __future__ import annotations

import logging
import sys
import traceback
from contextlib import suppress
from typing import Any, TextIO, cast

import structlog
from structlog.typing import EventDict, WrappedLogger

from service.observability.context import current_request


class _Lossy:
    """A stream that loses lines rather than failing whoever writes: its disk may be full."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        with suppress(OSError):
            self._stream.write(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()


def configure_logs(level: str, form: str, process: str | None = None) -> None:
    """Send structlog and the standard library's loggers to stderr in one form.

    A line that cannot be written is lost, and nothing else happens.

    Args:
        level: the least important line to write.
        form: `json`, `console` (for reading), or `auto`: the latter on a terminal.
        process: name of this process in its lines, whichever thread writes them.
    """
    readable = form == "console" or (form == "auto" and sys.stderr.isatty())

    def name_process(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
        return event if process is None else {"process": process, **event}

    shared: list[Any] = [
        name_process,
        _name_request,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderer: Any = (
        structlog.dev.ConsoleRenderer() if readable else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[*shared, _format_exception, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.WriteLoggerFactory(cast(TextIO, _Lossy(sys.stderr))),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                _format_exception,
                renderer,
            ],
            foreign_pre_chain=shared,
        )
    )
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    logging.getLogger("uvicorn.access").disabled = True


def _name_request(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Write whose request is being served."""
    context = current_request()
    if context.traceparent:
        event["trace_id"] = context.trace_id
    if context.request_id:
        event["request_id"] = context.request_id
    return event


def _format_exception(logger: WrappedLogger, name: str, event: EventDict) -> EventDict:
    """Write an exception's stack; one that a request met goes without its message.

    Whatever raised it may have quoted the text that it was given.
    """
    if "request_id" not in event or not event.get("exc_info"):
        return structlog.processors.format_exc_info(logger, name, event)
    given = event.pop("exc_info")
    error = given if isinstance(given, BaseException) else sys.exc_info()[1]
    if isinstance(given, tuple):
        error = given[1]
    if error is not None:
        event["exception"] = "".join(_stack(error)).rstrip()
    return event


def _stack(error: BaseException) -> list[str]:
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    before = [*_stack(cause), "\nwhile that was handled:\n\n"] if cause else []
    return [*before, *traceback.format_tb(error.__traceback__), f"{type(error).__qualname__}\n"]
