"""Whose request the running code serves: its id and its trace, for metrics, logs and engines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class RequestContext:
    """A request's id, and its place in a trace as a W3C `traceparent`; empty: it has none."""

    request_id: str = ""
    traceparent: str = ""

    @property
    def trace_id(self) -> str:
        """The trace's id, 32 hexadecimal digits, or nothing."""
        return self.traceparent[3:35]

    @property
    def sampled(self) -> bool:
        """Whether somebody records the trace."""
        return bool(self.traceparent) and bool(int(self.traceparent[-2:], 16) & 1)

    @property
    def exemplar(self) -> dict[str, str] | None:
        """What a metric points to: the trace, if it is recorded."""
        return {"trace_id": self.trace_id} if self.sampled else None


_NOBODY = RequestContext()
_current: ContextVar[RequestContext] = ContextVar("request", default=_NOBODY)


def current_request() -> RequestContext:
    """Return the context of the request that is being served; empty outside of one."""
    return _current.get()


@contextmanager
def serving(context: RequestContext) -> Iterator[None]:
    """Serve one request: log lines and metrics of this block carry its ids."""
    token = _current.set(context)
    try:
        yield
    finally:
        _current.reset(token)
