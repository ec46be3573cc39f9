"""Admission of connections, requests, bodies and texts to a frontend.

Every refusal is an `ApiError` with status 429 or 503. Engines have an admission of their own
(`service/scheduling/admission.py`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

from service.http.errors import ApiError
from service.ipc.engine_client import Engines, RefusedError
from service.keys import Caller
from service.scheduling.load_shedding import LoadShedding
from service.settings import Settings
from service.telemetry.counts import Counts

REFUSED_CONNECTIONS = 128
"""Number of connections above the limit that get 503; further ones are closed at once."""
MAX_BODIES = 16
"""Limit of the bytes of all bodies that are being received, in bodies of `max_body_bytes`."""
_AFTER_WORK = (500, 504)
"""Statuses of errors after the work was done, so that the texts are charged to the key."""


class Admission:
    """Admit or refuse, and count what is admitted until it is released.

    Uvicorn counts connections. `end` releases a request of a key. The contexts of `body` and
    `texts` release what they count.

    Args:
        settings: settings of the server.
        engines: engines of the server, whose number limits the texts.
        counts: counts of admissions and refusals.
    """

    def __init__(self, settings: Settings, engines: Engines, counts: Counts) -> None:
        self.draining = False
        """Whether the server is shutting down."""
        self.shedding = LoadShedding(settings.timeout_ms / 1000)
        self.body_bytes = 0
        """Bytes of all bodies that are being received."""
        self._settings = settings
        self._engines = engines
        self._counts = counts

    def configure(self, settings: Settings) -> None:
        """Apply new settings."""
        self._settings = settings

    def connection(self, count: int) -> None:
        """Admit a new connection if `count`, the number of open ones, is within the limit.

        Raises:
            ApiError: 503, there are too many connections.
        """
        limit = self._settings.max_connections
        if count > limit:
            message = f"too many open connections (limit {limit}); retry in 1 s"
            raise ApiError(503, message, code="too_many_connections", retry_after=1)

    def closes_at_once(self, count: int) -> bool:
        """Return whether a new connection is closed without an answer; `count` others are open."""
        full = count >= self._settings.max_connections + REFUSED_CONNECTIONS
        if full:
            self.connection_broken("too_many")
        return full

    def connection_broken(self, reason: str) -> None:
        """Count a connection that ended because of an error."""
        self._counts.connection_ended(reason)

    def seconds_until_read(self, size: int, now: float) -> int | None:
        """Return the `Retry-After` for a body of `size` bytes; None: the body is read now."""
        if self.shedding.sheds(size, now):
            return self.shedding.shed_seconds(size, now)
        return None

    def refused_unread(self, route: str) -> None:
        """Count a request that was refused before its body was read."""
        self._counts.request_ended(route, "rejected", 0.0, refusal="queue_full")

    def request(self, caller: Caller, state: MutableMapping[str, Any]) -> None:
        """Admit a request of a key, until `end` is called with the request's state.

        Raises:
            ApiError: 429, the key has too many requests in progress.
        """
        if not caller.begin():
            message = "this key has too many requests in progress; try again in 1 s"
            raise ApiError(429, message, code="too_many_requests", retry_after=1)
        state["under_way"] = caller

    def end(self, state: MutableMapping[str, Any]) -> None:
        """Release a request, if it was admitted."""
        if "under_way" in state:
            state["under_way"].end()

    @contextmanager
    def body(self) -> Iterator[Callable[[int], int]]:
        """Count the bytes of a body while it is received, since many clients may send slowly.

        Yields a function to call with the size of each part; it returns the size so far.

        Raises:
            ApiError: 429, by the function: all bodies together exceed the limit.
        """
        size, limit = 0, MAX_BODIES * self._settings.max_body_bytes

        def receive(count: int) -> int:
            nonlocal size
            size += count
            self.body_bytes += count
            if count and self.body_bytes > limit:
                message = "too many request bodies are being received; try again in 1 s"
                raise ApiError(429, message, code="queue_full", retry_after=1)
            return size

        try:
            yield receive
        finally:
            self.body_bytes -= size

    def refuse_if_draining(self) -> None:
        """Refuse new work while the server is shutting down.

        Raises:
            ApiError: 503, the server is shutting down.
        """
        if self.draining:
            raise ApiError(503, "the server is shutting down", code="draining", retry_after=1)

    @contextmanager
    def texts(
        self, caller: Caller, model: str, count: int, size: int | None, seconds: float
    ) -> Iterator[None]:
        """Admit texts, up to the capacity of the engines' queues, and charge them to a key.

        Texts that the engines would refuse are refused before tokenization, which alone would
        delay all requests under overload. Refused texts are not charged.

        Args:
            caller: key of the request.
            model: name of the model.
            count: number of texts.
            size: size of the body in bytes, as sent; None: unknown.
            seconds: seconds to the deadline.

        Raises:
            ApiError: 429, the queues are full, or the key has reached its rate limit.
        """
        shedding, now = self.shedding, time.monotonic()
        capacity = self._settings.max_queue_items * max(1, len(self._engines.alive))
        if shedding.texts and shedding.texts + count > capacity:
            shedding.learn_refusal(size, shedding.texts)
            raise queue_full(shedding.retry_after(shedding.texts + count - capacity, now))
        if wait := caller.take(count, now):
            retry = math.ceil(wait)
            message = f"the rate limit of this key is reached; try again in {retry} s"
            raise ApiError(429, message, code="rate", retry_after=retry)
        self._counts.texts_asked(caller.name, count)
        shedding.enter(count, seconds, now)
        answered = False
        try:
            yield
            answered = True
        except RefusedError as error:
            # A refusal by the limit of one model does not mean that the queue is full for others.
            shared = model not in self._settings.queue_items()
            if shedding.is_late_deadline(seconds) if error.reason == "deadline" else shared:
                shedding.learn_refusal(size, shedding.texts - count)
            caller.give_back(count)
            raise _refusal(error) from None
        except ApiError as error:
            if error.status not in _AFTER_WORK:
                caller.give_back(count)
            raise
        finally:
            shedding.leave(count, answered, time.monotonic())


def queue_full(seconds: int) -> ApiError:
    """Return the error for a request that exceeds the capacity; it may be retried in `seconds`."""
    message = f"the server has as many texts as it can queue; try again in {seconds} s"
    return ApiError(429, message, code="queue_full", retry_after=seconds)


def _refusal(error: RefusedError) -> ApiError:
    seconds = error.retry_after
    if error.reason == "deadline":
        message = f"the deadline cannot be met at the present load; try again in {seconds} s"
    else:
        message = f"the queue is full; try again in {seconds} s"
    return ApiError(429, message, code=error.reason, retry_after=seconds)
