"""Structured logs: JSON lines, or readable lines on a terminal. They never hold input texts."""

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
"""Most lines that wait for a slow reader; further ones are dropped and counted."""
DRAIN_SECONDS = 1.0
"""Longest time that an ending process waits until its last lines are written."""


class LogStream:
    """A stream whose writes neither block nor fail: a thread writes the lines.

    Otherwise a reader that stops reading would block the server, and a full disk would break it.
    Lines for which there is no room are dropped; a notice before the next line tells their number.

    Args:
        stream: stream to write the lines to.
        notice: returns the notice for a number of dropped lines.
    """

    def __init__(self, stream: TextIO, notice: Callable[[int], str]) -> None:
        self._stream = stream
        self._notice = notice
        self._lines: SimpleQueue[str | threading.Event] = SimpleQueue()
        self._dropped = 0
        threading.Thread(target=self._write_lines, daemon=True, name="log").start()

    def write(self, line: str) -> None:
        """Queue a line, or drop it if too many wait."""
        if self._lines.qsize() < MAX_LINES:
            self._lines.put(line)
        else:
            self._dropped += 1

    def flush(self) -> None:
        """Do nothing: each line is flushed as it is written."""

    def drain(self) -> None:
        """Wait until all queued lines are written, at most `DRAIN_SECONDS`."""
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
    """Wait until the last lines are written, at most `DRAIN_SECONDS`."""
    for stream in _streams:
        stream.drain()


atexit.register(drain_logs)


_AllLevels: Any = structlog.make_filtering_bound_logger(logging.DEBUG)


def configure_logs(level: str, form: str, process: str | None = None) -> None:
    """Send structlog and the standard library's loggers to stderr in one format.

    Logging neither blocks nor fails, see `LogStream`.

    Args:
        level: lowest level of lines to write.
        form: `json`, `console` (readable), or `auto`: readable on a terminal, else JSON.
        process: name of this process, for its lines.
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
    """Set the lowest level of lines that this process writes."""
    _LevelledLogger.level = getattr(logging, level.upper())
    logging.getLogger().setLevel(level.upper())


class _LevelledLogger(_AllLevels):  # type: ignore[misc]
    """A logger whose level can change; structlog's own is fixed once a module has used it."""

    level = logging.INFO

    def debug(self, event: str, *args: Any, **fields: Any) -> Any:
        """Write a line unless the level is higher; the other methods do the same."""
        return super().debug(event, *args, **fields) if self.level <= logging.DEBUG else None

    def info(self, event: str, *args: Any, **fields: Any) -> Any:
        return super().info(event, *args, **fields) if self.level <= logging.INFO else None

    def warning(self, event: str, *args: Any, **fields: Any) -> Any:
        return super().warning(event, *args, **fields) if self.level <= logging.WARNING else None


def _dropped(lines: int) -> EventDict:
    return {"event": "log lines dropped: they were not read", "level": "warning", "lines": lines}


def _name_request(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Add the ids of the request that is being served."""
    context = current_request()
    if context.traceparent:
        event["trace_id"] = context.trace_id
    if context.request_id:
        event["request_id"] = context.request_id
    return event


def _format_exception(logger: WrappedLogger, name: str, event: EventDict) -> EventDict:
    """Add the stack of an exception; within a request, without its message.

    The message may quote the request's text.
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
