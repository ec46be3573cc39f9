"""What both clients do, without I/O: split, ask, judge, wait, ask again.

`Call.attempts` is a generator of steps. The caller sends or waits, and hands back the outcome.
"""

from __future__ import annotations

import email.utils
import json
import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from http import HTTPStatus
from itertools import count
from json import JSONDecodeError
from typing import Any, TypedDict, TypeVar

import httpx

from budgetformer.client.errors import (
    ClientError,
    DeadlineExceededError,
    InputError,
    OverloadedError,
    ServerError,
    UnreachableError,
)
from budgetformer.client.results import Result, read_results, shift
from budgetformer.proxies import is_loopback, proxy_variables

Text = str | tuple[str, str] | Mapping[str, str]
"""A text; a text and its pair; or both as `text` and `text_pair`."""

Item = str | dict[str, str]
"""A text as a request holds it."""

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
    texts: list[Item]


@dataclass(frozen=True)
class Send:
    """Step: send this body to POST /classify; the answer to it is a response or what went wrong."""

    body: dict[str, Any]
    timeout: httpx.Timeout


@dataclass(frozen=True)
class Wait:
    """Step: let some seconds pass."""

    seconds: float


Http = TypeVar("Http", httpx.Client, httpx.AsyncClient)
Outcome = httpx.Response | httpx.TransportError | None
Attempts = Generator[Send | Wait, Outcome, list[Result]]


DEFAULT_RETRY = Retry()


def headers_of(given: Mapping[str, str] | None, api_key: str | None) -> dict[str, str]:
    """Return the headers of every request."""
    return dict(given or {}) | ({"Authorization": f"Bearer {api_key}"} if api_key else {})


@dataclass(frozen=True)
class Connecting:
    """How a client connects to a server.

    Attributes:
        proxies: names of the proxy variables that it heeds; for a server on this host none.
        options: of the httpx client.
    """

    proxies: list[str]
    options: dict[str, Any]

    @classmethod
    def to(cls, url: str) -> Connecting:
        """Return how to connect to the server at this URL."""
        if is_loopback(url):
            # Without the environment httpx would miss SSL_CERT_FILE, too.
            verify = httpx.create_ssl_context() if url.startswith("https") else True
            return cls([], {"trust_env": False, "verify": verify})
        return cls(proxy_variables(), {})

    def open(self, kind: Callable[..., Http], connections: int) -> Http:
        """Return an httpx client with so many connections.

        Raises:
            UnreachableError: a proxy variable cannot be used.
        """
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        try:
            return kind(limits=limits, **self.options)
        except (ImportError, ValueError) as error:  # SOCKS needs a package, socks:// is unknown
            message = f"no connection is possible: {error}{_heeded(self.proxies)}"
            raise UnreachableError(message) from error


def is_one(given: Any) -> bool:
    """Say whether this is one text, not many; a tuple that holds a string is a pair."""
    if isinstance(given, tuple):
        return any(isinstance(part, str) for part in given)
    return isinstance(given, (str, Mapping))


def items_of(given: Text | Iterable[Text]) -> list[Item]:
    """Return one text or many as items of requests.

    Raises:
        InputError: an element is not a text; the error names its index.
    """
    return list(_items([given] if is_one(given) else given))


def drawn(texts: Iterable[Text]) -> Iterable[Item]:
    """Return texts as items; what is there already is checked now, the rest as it is drawn.

    Raises:
        InputError: see `items_of`.
    """
    return items_of(texts) if is_one(texts) or isinstance(texts, Sized) else _items(texts)


def _items(given: Any) -> Iterator[Item]:
    return (item_of(text, index) for index, text in enumerate(_iterate(given)))


def _iterate(given: Any) -> Iterator[Any]:
    dimensions = getattr(given, "ndim", 1)  # of NumPy and pandas
    if dimensions != 1:
        hint = "give one column" if dimensions else "give a string or a list"
        raise InputError(f"input has {dimensions} dimensions: {hint}")
    if isinstance(given, (bytes, bytearray, memoryview)):
        raise InputError(f"input is {type(given).__name__}, not text: decode it first")
    try:
        return iter(given)
    except TypeError:
        raise InputError(f"input is {_shown(given)}, not a text or an iterable of texts") from None


def item_of(text: Text, index: int) -> Item:
    """Return a text as an item of a request.

    Raises:
        InputError: it is not a text.
    """
    place = f"input[{index}]"
    if isinstance(text, str):
        return _checked(text, place)
    if isinstance(text, tuple):
        if len(text) != 2:
            raise InputError(
                f"{place} is a tuple of {len(text)}: a pair has two strings; many texts go in a "
                "list"
            )
        return {
            "text": _checked(text[0], f"{place}[0]"),
            "text_pair": _checked(text[1], f"{place}[1]"),
        }
    if not isinstance(text, Mapping):
        raise InputError(
            f"{place} is {_shown(text)}, not a text: give a string, a pair of strings as a tuple, "
            'or {"text": ..., "text_pair": ...}'
        )
    item = {"text": _checked(text.get("text"), f"{place}.text")}
    for name, part in text.items():
        if name not in ("text", "text_pair"):
            raise InputError(f"{place} has the unknown key {name!r}: known are text, text_pair")
        if name == "text_pair" and part is not None:
            item["text_pair"] = _checked(part, f"{place}.text_pair")
    return item


def _checked(text: Any, place: str) -> str:
    if not isinstance(text, str):
        raise InputError(f"{place} is {_shown(text)}, not a string")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            at = f"character {error.start}"
            raise InputError(f"{place}: {at} is half of a surrogate pair, no text") from None
    return text


def _shown(value: Any) -> str:
    """Return what a value is, without quoting what it may hold."""
    if value is None or isinstance(value, float):
        return f"{value!r}"
    return f"of the type {type(value).__name__}"


def check_options(options: Options) -> None:
    """Check that options can be sent.

    Raises:
        InputError: one cannot be written as JSON, such as NaN.
    """
    for name, value in options.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InputError(f"{name}: {error}") from None


def size_of(texts: Iterable[Item]) -> int | None:
    """Return how many texts there are; None: not known before they are drawn."""
    return len(texts) if isinstance(texts, Sized) else None


@dataclass
class Limits:
    """What goes into one request at most; a server that takes fewer items lowers it.

    Attributes:
        items: texts.
        characters: of all texts together, unless one alone has more.
    """

    items: int
    characters: int


def split(items: Iterable[Item], limits: Limits) -> Iterator[Chunk]:
    """Cut items into chunks within the limits.

    Raises:
        InputError: an element is not a text.
    """
    chunk: list[Item] = []
    size = 0
    start = 0
    for index, item in enumerate(items):
        length = sum(map(len, [item] if isinstance(item, str) else item.values()))
        if chunk and (len(chunk) >= limits.items or size + length > limits.characters):
            yield Chunk(start, chunk)
            chunk, size, start = [], 0, index
        chunk.append(item)
        size += length
    if chunk:
        yield Chunk(start, chunk)


@dataclass(frozen=True)
class Call:
    """What all requests of one call have in common."""

    options: Options
    budget: Budget
    retry: Retry
    chance: Callable[[], float]
    limits: Limits
    proxies: Sequence[str] = ()
    """Names of the proxy variables that the connections heed."""

    def attempts(self, chunk: Chunk) -> Attempts:
        """Take a chunk to its results; one that the server finds too large goes in two halves.

        Raises:
            DeadlineExceededError: the budget is spent, or would be before the server has room.
            OverloadedError, UnreachableError: every attempt failed.
            ServerError: the server refused; trying again would not help.
        """
        for attempt in count():
            if len(chunk.texts) > self.limits.items:
                return (yield from self._parts(chunk, self.limits.items))
            outcome = yield _send(chunk, self.options, self.budget.remaining())
            if isinstance(outcome, httpx.Response) and outcome.is_success:
                return read_results(outcome.json(), chunk.start)
            try:
                error, retry_after = _judge(outcome, chunk.start, self.proxies)
            except ServerError as refused:
                half = len(chunk.texts) // 2
                if refused.status != HTTPStatus.REQUEST_ENTITY_TOO_LARGE or not half:
                    raise
                if refused.code == "too_many_items":
                    self.limits.items = min(self.limits.items, half)
                return (yield from self._parts(chunk, half))
            wait = self.retry.wait(attempt, retry_after, self.chance())
            if attempt + 1 >= self.retry.attempts or wait >= self.budget.remaining():
                raise error
            yield Wait(wait)
        raise AssertionError("unreachable: counting does not end")

    def _parts(self, chunk: Chunk, items: int) -> Attempts:
        results: list[Result] = []
        for at in range(0, len(chunk.texts), items):
            part = Chunk(chunk.start + at, chunk.texts[at : at + items])
            results += yield from self.attempts(part)
        return results


def _send(chunk: Chunk, options: Options, remaining: float) -> Send:
    body: dict[str, Any] = {"input": chunk.texts, **options}
    if math.isinf(remaining):
        return Send(body, PATIENCE)
    body["timeout_ms"] = max(1, int(remaining * 1000))
    whole = httpx.Timeout(remaining + GRACE_SECONDS, connect=min(CONNECT_SECONDS, remaining))
    return Send(body, whole)


def _judge(
    outcome: Outcome, start: int, proxies: Sequence[str]
) -> tuple[ClientError, float | None]:
    """Return the error of an attempt after which another makes sense, and when.

    Raises:
        ClientError: another attempt makes no sense.
    """
    if not isinstance(outcome, httpx.Response):
        if isinstance(outcome, (httpx.ReadTimeout, httpx.WriteTimeout)):
            raise DeadlineExceededError("the server did not answer in time") from outcome
        return unreachable(outcome, proxies), None
    told = read_error(outcome, start, proxies)
    if isinstance(told, OverloadedError):
        return told, told.retry_after
    if outcome.status_code == HTTPStatus.GATEWAY_TIMEOUT:
        raise DeadlineExceededError(str(told)) from told
    raise told


def unreachable(
    cause: httpx.TransportError | None, proxies: Sequence[str] = ()
) -> UnreachableError:
    """Return the error for a connection that could not be made, or broke."""
    why = str(cause) or type(cause).__name__
    error = UnreachableError(f"the server cannot be reached: {why}{_heeded(proxies)}")
    error.__cause__ = cause
    return error


def _heeded(proxies: Sequence[str]) -> str:
    """Return what to say of proxy variables where something else than the server may answer."""
    if not proxies:
        return ""
    return f" (proxy variables are set: {', '.join(proxies)}; no_proxy may exempt the server)"


def read_body(response: httpx.Response, proxies: Sequence[str] = ()) -> dict[str, Any]:
    """Return the object that an answer holds.

    Raises:
        ServerError: it is no success.
    """
    if not response.is_success:
        raise read_error(response, proxies=proxies)
    return dict(response.json())


def read_error(
    response: httpx.Response, start: int = 0, proxies: Sequence[str] = ()
) -> ServerError:
    """Read an answer that is no success."""
    status = response.status_code
    try:
        body = response.json()
        told = body["error"] if isinstance(body["error"], dict) else {"message": str(body["error"])}
    except (JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        answered = f"the server answered {status} {response.reason_phrase}"
        told = {"message": f"{answered}{_heeded(proxies)}"}
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
