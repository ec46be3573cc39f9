"""What a frontend admits, and until when it counts: connections, requests, bodies and texts.

Every refusal is an `ApiError` of status 429 or 503. Engines admit texts to their queues by
themselves (`service/scheduling/admission.py`).
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
"""Connections above the limit that are answered 503; further ones are closed at once."""
MAX_BODIES = 16
"""As many bodies of the largest size may be arriving at once."""
_AFTER_WORK = (500, 504)
"""Errors of requests that were admitted, and cost what others cost."""


class Admission:
    """Decide what is admitted to a frontend, and count it until it is released.

    A connection is released by uvicorn, a request of a key by `end`, a body and texts at the end of
    their block.

    Args:
        settings: of the server.
        engines: whose queues take the texts.
        counts: where what is admitted and refused is counted.
    """

    def __init__(self, settings: Settings, engines: Engines, counts: Counts) -> None:
        self.draining = False
        """Whether the server is shutting down."""
        self.shedding = LoadShedding(settings.timeout_ms / 1000)
        self.body_bytes = 0
        """Bytes of the bodies that are arriving."""
        self._settings = settings
        self._engines = engines
        self._counts = counts

    def configure(self, settings: Settings) -> None:
        """Go by other settings."""
        self._settings = settings

    def connection(self, count: int) -> None:
        """Admit a connection, the `count`th of those open now.

        Raises:
            ApiError: 503, there are too many.
        """
        limit = self._settings.max_connections
        if count > limit:
            message = f"too many open connections (limit {limit}); retry in 1 s"
            raise ApiError(503, message, code="too_many_connections", retry_after=1)

    def closes_at_once(self, count: int) -> bool:
        """Say whether a connection is closed without an answer, beside `count` others."""
        full = count >= self._settings.max_connections + REFUSED_CONNECTIONS
        if full:
            self.connection_broken("too_many")
        return full

    def connection_broken(self, reason: str) -> None:
        """Count a connection that ended before a request was there."""
        self._counts.connection_ended(reason)

    def seconds_until_read(self, size: int, now: float) -> int | None:
        """Return after how many seconds a body of so many bytes may be read; None: now."""
        if self.shedding.sheds(size, now):
            return self.shedding.shed_seconds(size, now)
        return None

    def refused_unread(self, route: str) -> None:
        """Count a request that was refused before its body was read."""
        self._counts.request_ended(route, "rejected", 0.0, refusal="queue_full")

    def request(self, caller: Caller, state: MutableMapping[str, Any]) -> None:
        """Admit a request of a key, until `end` is told the request's state.

        Raises:
            ApiError: 429, the key has as many requests under way as it may.
        """
        if not caller.begin():
            message = "this key has as many requests under way as it may; try again in 1 s"
            raise ApiError(429, message, code="too_many_requests", retry_after=1)
        state["under_way"] = caller

    def end(self, state: MutableMapping[str, Any]) -> None:
        """Release a request, if it was admitted."""
        if "under_way" in state:
            state["under_way"].end()

    @contextmanager
    def body(self) -> Iterator[Callable[[int], int]]:
        """Count a body that arrives: many callers may send large ones slowly.

        Yields a function that is told the bytes of every part and returns those of all by now.

        Raises:
            ApiError: 429, by the function: there is no room.
        """
        size, most = 0, MAX_BODIES * self._settings.max_body_bytes

        def receive(count: int) -> int:
            nonlocal size
            size += count
            self.body_bytes += count
            if count and self.body_bytes > most:
                message = "the server receives all the bytes that it can; try again in 1 s"
                raise ApiError(429, message, code="queue_full", retry_after=1)
            return size

        try:
            yield receive
        finally:
            self.body_bytes -= size

    def refuse_if_draining(self) -> None:
        """Refuse what a server that is shutting down does not begin.

        Raises:
            ApiError: 503, it is.
        """
        if self.draining:
            raise ApiError(503, "the server is shutting down", code="draining", retry_after=1)

    @contextmanager
    def texts(
        self, caller: Caller, model: str, count: int, size: int | None, seconds: float
    ) -> Iterator[None]:
        """Hold texts, no more in all than the engines' queues take, and charge them to a key.

        What engines would refuse is refused before it is tokenized: under overload that work alone
        would make everybody late. A request that is refused costs its key nothing.

        Args:
            caller: who asks.
            model: name of the model that reads them.
            count: texts of the request.
            size: bytes of its body as it travelled, if that is known.
            seconds: to its deadline.

        Raises:
            ApiError: 429, there is no room, or the key has spent its rate.
        """
        shedding, now = self.shedding, time.monotonic()
        most = self._settings.max_queue_items * max(1, len(self._engines.alive))
        if shedding.texts and shedding.texts + count > most:
            shedding.learn_refusal(size, shedding.texts)
            raise no_room(shedding.retry_after(shedding.texts + count - most, now))
        if wait := caller.take(count, now):
            retry = math.ceil(wait)
            message = f"this key may not ask for so many texts yet; try again in {retry} s"
            raise ApiError(429, message, code="rate", retry_after=retry)
        self._counts.texts_asked(caller.name, count)
        shedding.enter(count, seconds, now)
        answered = False
        try:
            yield
            answered = True
        except RefusedError as error:
            # A model's own share of the queue says nothing of other models.
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


def no_room(seconds: int) -> ApiError:
    """Return the error of a request for which there is room in so many seconds."""
    message = f"the server holds all the texts that it can; try again in {seconds} s"
    return ApiError(429, message, code="queue_full", retry_after=seconds)


def _refusal(error: RefusedError) -> ApiError:
    seconds = error.retry_after
    if error.reason == "deadline":
        message = f"the deadline cannot be met at the present load; try again in {seconds} s"
    else:
        message = f"the queue is full; try again in {seconds} s"
    return ApiError(429, message, code=error.reason, retry_after=seconds)
