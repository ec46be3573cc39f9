"""What both clients do, without I/O: split, ask, judge, wait, ask again.

`attempts` is a generator of steps. Whoever drives it sends or waits, and hands back what came.
"""

from __future__ import annotations

import email.utils
import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from http import HTTPStatus
from itertools import count
from json import JSONDecodeError
from typing import Any, TypedDict

import httpx

from budgetformer.client.errors import (
    ClientError,
    DeadlineExceededError,
    OverloadedError,
    ServerError,
    UnreachableError,
)
from budgetformer.client.results import Result, read_results, shift

Text = str | tuple[str, str] | Mapping[str, str]
"""A text; a text and its pair; or both as `text` and `text_pair`."""

CONNECT_SECONDS = 5.0
GRACE_SECONDS = 1.0
"""How long past the deadline the server may take to say that it has passed."""
PATIENCE = httpx.Timeout(120.0, connect=CONNECT_SECONDS)
"""How long one answer is awaited where no deadline was given."""
_BUSY = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)


class Options(TypedDict, total=False):
    """Fields of POST /classify; see docs/api.md."""

    model: str | None
    quality: str | float | None
    heads: int | None
    max_heads: int | None
    top_k: int | None
    threshold: float | None
    use_activation: bool
    truncate: bool
    return_heads: bool


@dataclass(frozen=True)
class Retry:
    """When to try again: after 429, 503 and broken connections.

    The server's Retry-After is waited for, and up to `jitter` of it more, so that many clients do
    not come back at once. Where the server does not say, the wait doubles from `first_wait` to
    `longest_wait`, and a random share of it is taken.

    Attributes:
        attempts: how often one request is sent at most.
        first_wait, longest_wait: seconds.
        jitter: share of Retry-After that may be added.
    """

    attempts: int = 6
    first_wait: float = 0.1
    longest_wait: float = 10.0
    jitter: float = 0.25

    def wait(self, attempt: int, retry_after: float | None, chance: float) -> float:
        """Return the seconds to wait after attempt number `attempt` (from 0); chance 0..1."""
        if retry_after is not None:
            return retry_after + chance * max(self.first_wait, self.jitter * retry_after)
        return chance * min(self.longest_wait, self.first_wait * 2.0**attempt)


@dataclass(frozen=True)
class Budget:
    """The time that a call may take: until `end` of a monotonic clock."""

    clock: Callable[[], float]
    end: float

    @classmethod
    def of(cls, clock: Callable[[], float], seconds: float) -> Budget:
        """Return a budget of so many seconds from now."""
        return cls(clock, clock() + seconds)

    def remaining(self) -> float:
        """Return the seconds that are left.

        Raises:
            DeadlineExceededError: none are.
        """
        left: float = self.end - self.clock()
        if left <= 0:
            raise DeadlineExceededError("the time for this call is over")
        return left


@dataclass(frozen=True)
class Chunk:
    """Texts that go into one request; the first is the caller's text number `start`."""

    start: int
    texts: list[Any]


@dataclass(frozen=True)
class Send:
    """Step: send this body to POST /classify; the answer to it is a response or what went wrong."""

    body: dict[str, Any]
    timeout: httpx.Timeout


@dataclass(frozen=True)
class Wait:
    """Step: let some seconds pass."""

    seconds: float


Outcome = httpx.Response | httpx.TransportError | None
Attempts = Generator[Send | Wait, Outcome, list[Result]]


DEFAULT_RETRY = Retry()


def headers_of(given: Mapping[str, str] | None, api_key: str | None) -> dict[str, str]:
    """Return the headers of every request."""
    return dict(given or {}) | ({"Authorization": f"Bearer {api_key}"} if api_key else {})


def texts_of(given: Text | Iterable[Text]) -> Iterable[Text]:
    """Return the texts of what may be one text."""
    return [given] if isinstance(given, (str, tuple, Mapping)) else given


def size_of(texts: Iterable[Text]) -> int | None:
    """Return how many texts there are; None: not known before they are drawn."""
    return len(texts) if isinstance(texts, Sized) else None


def split(texts: Iterable[Text], most_items: int, most_characters: int) -> Iterator[Chunk]:
    """Cut texts into chunks of at most so many items and, unless one alone has more, characters."""
    chunk: list[Any] = []
    size = 0
    start = 0
    for index, text in zip(count(), texts):
        item = {"text": text[0], "text_pair": text[1]} if isinstance(text, tuple) else text
        length = sum(map(len, [item] if isinstance(item, str) else item.values()))
        if chunk and (len(chunk) == most_items or size + length > most_characters):
            yield Chunk(start, chunk)
            chunk, size, start = [], 0, index
        chunk.append(item)
        size += length
    if chunk:
        yield Chunk(start, chunk)


def attempts(
    chunk: Chunk, options: Options, budget: Budget, retry: Retry, chance: Callable[[], float]
) -> Attempts:
    """Take a chunk to its results.

    Raises:
        DeadlineExceededError: the budget is spent, or would be before the server has room.
        OverloadedError, UnreachableError: every attempt failed.
        ServerError: the server refused; trying again would not help.
    """
    for attempt in count():
        outcome = yield _send(chunk, options, budget.remaining())
        if isinstance(outcome, httpx.Response) and outcome.is_success:
            return read_results(outcome.json(), chunk.start)
        error, retry_after = _judge(outcome, chunk.start)
        wait = retry.wait(attempt, retry_after, chance())
        if attempt + 1 >= retry.attempts or wait >= budget.remaining():
            raise error
        yield Wait(wait)
    raise AssertionError("unreachable: counting does not end")


def _send(chunk: Chunk, options: Options, remaining: float) -> Send:
    body: dict[str, Any] = {"input": chunk.texts, **options}
    if math.isinf(remaining):
        return Send(body, PATIENCE)
    body["timeout_ms"] = max(1, int(remaining * 1000))
    whole = httpx.Timeout(remaining + GRACE_SECONDS, connect=min(CONNECT_SECONDS, remaining))
    return Send(body, whole)


def _judge(outcome: Outcome, start: int) -> tuple[ClientError, float | None]:
    """Return the error of an attempt after which another makes sense, and when.

    Raises:
        ClientError: another attempt makes no sense.
    """
    if not isinstance(outcome, httpx.Response):
        if isinstance(outcome, (httpx.ReadTimeout, httpx.WriteTimeout)):
            raise DeadlineExceededError("the server did not answer in time") from outcome
        return unreachable(outcome), None
    told = read_error(outcome, start)
    if isinstance(told, OverloadedError):
        return told, told.retry_after
    if outcome.status_code == HTTPStatus.GATEWAY_TIMEOUT:
        raise DeadlineExceededError(str(told)) from told
    raise told


def unreachable(cause: httpx.TransportError | None) -> UnreachableError:
    """Return the error for a connection that could not be made, or broke."""
    error = UnreachableError(f"the server cannot be reached: {cause}")
    error.__cause__ = cause
    return error


def read_body(response: httpx.Response) -> dict[str, Any]:
    """Return the object that an answer holds.

    Raises:
        ServerError: it is no success.
    """
    if not response.is_success:
        raise read_error(response)
    return dict(response.json())


def read_error(response: httpx.Response, start: int = 0) -> ServerError:
    """Read an answer that is no success."""
    status = response.status_code
    try:
        body = response.json()
        told = body["error"] if isinstance(body["error"], dict) else {"message": str(body["error"])}
    except (JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        told = {"message": f"the server answered {status} {response.reason_phrase}"}
    kind = OverloadedError if status in _BUSY else ServerError
    param = told.get("param")
    error = kind(
        status,
        shift(str(told.get("message")), start),
        told.get("code"),
        shift(param, start) if isinstance(param, str) else None,
        response.headers.get("x-request-id"),
    )
    if isinstance(error, OverloadedError):
        error.retry_after = read_retry_after(response.headers.get("retry-after"))
    return error


def read_retry_after(value: str | None, now: Callable[[], float] = time.time) -> float | None:
    """Return the seconds that a Retry-After header asks for; it holds a number or a date."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - now())
    except ValueError:
        return None
