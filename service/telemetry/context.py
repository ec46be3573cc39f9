"""Context of the request that the running code serves: ids for metrics, logs and engines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class RequestContext:
    """Id of a request, and its W3C `traceparent`; each is empty if there is none."""

    request_id: str = ""
    traceparent: str = ""

    @property
    def trace_id(self) -> str:
        """Id of the trace, 32 hexadecimal digits; empty: there is none."""
        return self.traceparent[3:35]

    @property
    def sampled(self) -> bool:
        """Whether the trace is recorded."""
        return bool(self.traceparent) and bool(int(self.traceparent[-2:], 16) & 1)

    @property
    def exemplar(self) -> dict[str, str] | None:
        """Exemplar for a metric: the trace id, if the trace is recorded."""
        return {"trace_id": self.trace_id} if self.sampled else None


_NO_REQUEST = RequestContext()
_current: ContextVar[RequestContext] = ContextVar("request", default=_NO_REQUEST)


def current_request() -> RequestContext:
    """Return the context of the request that is being served; empty outside of one."""
    return _current.get()


@contextmanager
def serving(context: RequestContext) -> Iterator[None]:
    """Set the context of a request: log lines and metrics in this block carry its ids."""
    token = _current.set(context)
    try:
        yield
    finally:
        _current.reset(token)
