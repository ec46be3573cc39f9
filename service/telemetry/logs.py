"""Structured logs: JSON lines, or readable ones on a terminal. Never the text of an input."""

from __future__ import annotations

import atexit
import logging
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, TextIO, cast

import structlog
from structlog.typing import EventDict, WrappedLogger

from service.telemetry.context import current_request

MAX_LINES = 10_000
"""Lines that wait for a reader that is slow; further ones are dropped and counted."""
DRAIN_SECONDS = 1.0
"""How long a process that ends waits for its last lines to be written."""


class LogStream:
    """A stream on which writing neither waits nor fails: a thread writes the lines.

    A reader that stops reading would otherwise stop the server, and a full disk would fail it.
    Lines for which there is no room are dropped; the next line that is written says how many.

    Args:
        stream: where the lines go.
        notice: makes the line that says how many were dropped.
    """

    def __init__(self, stream: TextIO, notice: Callable[[int], str]) -> None:
        self._stream = stream
        self._notice = notice
        self._lines: SimpleQueue[str | threading.Event] = SimpleQueue()
        self._dropped = 0
        threading.Thread(target=self._write_lines, daemon=True, name="log").start()

    def write(self, line: str) -> None:
        """Have a line written, or drop it."""
        if self._lines.qsize() < MAX_LINES:
            self._lines.put(line)
        else:
            self._dropped += 1

    def flush(self) -> None:
        """Do nothing: each line is flushed as it is written."""

    def drain(self) -> None:
        """Wait until the lines so far are written, for `DRAIN_SECONDS` at most."""
        written = threading.Event()
        self._lines.put(written)
        written.wait(DRAIN_SECONDS)

    def _write_lines(self) -> None:
        while True:
            line = self._lines.get()
            if isinstance(line, threading.Event):
                line.set()
                continue
            dropped, self._dropped = self._dropped, 0
            with suppress(OSError, ValueError):  # the disk is full, the reader or stderr is gone
                self._stream.write(self._notice(dropped) + line if dropped else line)
                self._stream.flush()


_streams: list[LogStream] = []


def drain_logs() -> None:
    """Wait a moment for the last lines to be written, before this process ends."""
    for stream in _streams:
        stream.drain()


atexit.register(drain_logs)


_AllLevels: Any = structlog.make_filtering_bound_logger(logging.DEBUG)


def configure_logs(level: str, form: str, process: str | None = None) -> None:
    """Send structlog and the standard library's loggers to stderr in one form.

    Logging neither waits nor fails, see `LogStream`.

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
    stream = LogStream(sys.stderr, lambda lines: f"{renderer(None, 'warning', _dropped(lines))}\n")
    _streams[:] = [stream]
    structlog.configure(
        processors=[*shared, _format_exception, renderer],
        wrapper_class=_LevelledLogger,
        logger_factory=structlog.WriteLoggerFactory(cast(TextIO, stream)),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(stream)
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
    logging.basicConfig(handlers=[handler], force=True)
    logging.getLogger("uvicorn.access").disabled = True
    set_log_level(level)


def set_log_level(level: str) -> None:
    """Write lines of this level and above from now on, in this process."""
    _LevelledLogger.level = getattr(logging, level.upper())
    logging.getLogger().setLevel(level.upper())


class _LevelledLogger(_AllLevels):  # type: ignore[misc]
    """A logger whose level may change: structlog fixes it, once a module has used its logger."""

    level = logging.INFO

    def debug(self, event: str, *args: Any, **fields: Any) -> Any:
        """Write a line unless the level is higher; so do the others."""
        return super().debug(event, *args, **fields) if self.level <= logging.DEBUG else None

    def info(self, event: str, *args: Any, **fields: Any) -> Any:
        return super().info(event, *args, **fields) if self.level <= logging.INFO else None

    def warning(self, event: str, *args: Any, **fields: Any) -> Any:
        return super().warning(event, *args, **fields) if self.level <= logging.WARNING else None


def _dropped(lines: int) -> EventDict:
    return {"event": "log lines dropped: they were not read", "level": "warning", "lines": lines}


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
