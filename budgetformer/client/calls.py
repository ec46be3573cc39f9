"""The logic that both clients share, without I/O: split texts into requests, and retry.

`Call.attempts` is a generator of steps. The client executes each step (send a request, or wait) and
sends the outcome back into the generator.
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
"""A text as an item of a request."""

CONNECT_SECONDS = 5.0
GRACE_SECONDS = 1.0
"""Seconds that the client waits after the deadline for the server's answer that it has passed."""
PATIENCE = httpx.Timeout(120.0, connect=CONNECT_SECONDS)
"""Timeout of a request without a deadline."""
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
    """The retry policy, for 429, 503 and broken connections.

    The client waits for the server's Retry-After plus a random part of `jitter` times that, so that
    many clients do not retry at once. Without a Retry-After, it waits for a random part of a delay
    that doubles from `first_wait` to `longest_wait`.

    Attributes:
        attempts: maximum number of times that a request is sent.
        first_wait: first delay without a Retry-After, in seconds.
        longest_wait: longest delay without a Retry-After, in seconds.
        jitter: maximum share of Retry-After that is added to it.
    """

    attempts: int = 6
    first_wait: float = 0.1
    longest_wait: float = 10.0
    jitter: float = 0.25

    def wait(self, attempt: int, retry_after: float | None, chance: float) -> float:
        """Return the seconds to wait after an attempt.

        Args:
            attempt: number of the attempt, from 0.
            retry_after: the server's Retry-After in seconds, if any.
            chance: random number in 0..1.
        """
        if retry_after is not None:
            return retry_after + chance * max(self.first_wait, self.jitter * retry_after)
        return chance * min(self.longest_wait, self.first_wait * 2.0**attempt)


@dataclass(frozen=True)
class Budget:
    """The deadline of a call: the time `end` of a monotonic clock."""

    clock: Callable[[], float]
    end: float

    @classmethod
    def of(cls, clock: Callable[[], float], seconds: float) -> Budget:
        """Return the deadline that is `seconds` from now."""
        return cls(clock, clock() + seconds)

    def remaining(self) -> float:
        """Return the seconds until the deadline.

        Raises:
            DeadlineExceededError: the deadline has passed.
        """
        left: float = self.end - self.clock()
        if left <= 0:
            raise DeadlineExceededError("the deadline of this call has passed")
        return left


@dataclass(frozen=True)
class Chunk:
    """The texts of one request; the first has the index `start` in the caller's list."""

    start: int
    texts: list[Item]


@dataclass(frozen=True)
class Send:
    """Step: send a body to POST /classify; the outcome is a response or a transport error."""

    body: dict[str, Any]
    timeout: httpx.Timeout


@dataclass(frozen=True)
class Wait:
    """Step: wait; the outcome is None."""

    seconds: float


Http = TypeVar("Http", httpx.Client, httpx.AsyncClient)
Outcome = httpx.Response | httpx.TransportError | None
Attempts = Generator[Send | Wait, Outcome, list[Result]]


DEFAULT_RETRY = Retry()


def headers_of(given: Mapping[str, str] | None, api_key: str | None) -> dict[str, str]:
    """Return the headers of every request."""
    return dict(given or {}) | ({"Authorization": f"Bearer {api_key}"} if api_key else {})


def connect(kind: Callable[..., Http], url: str, connections: int) -> tuple[Http, list[str]]:
    """Return an httpx client with at most `connections` connections to the server at a URL.

    Returns:
        The client, and the names of the proxy variables that it uses; none for a server on this
        host.

    Raises:
        UnreachableError: a proxy variable has an unsupported value.
    """
    limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
    if is_loopback(url):
        # `trust_env=False` would also ignore SSL_CERT_FILE, which this context reads.
        verify = httpx.create_ssl_context() if url.startswith("https") else True
        return kind(limits=limits, trust_env=False, verify=verify), []
    proxies = proxy_variables()
    try:
        return kind(limits=limits), proxies
    except (ImportError, ValueError) as error:  # SOCKS needs a package, socks:// is unknown
        message = f"no connection is possible: {error}{_proxy_hint(proxies)}"
        raise UnreachableError(message) from error


def is_one(given: Any) -> bool:
    """Return whether this is a single text; a tuple with a string is a pair, so a single text."""
    if isinstance(given, tuple):
        return any(isinstance(part, str) for part in given)
    return isinstance(given, (str, Mapping))


def items_of(given: Text | Iterable[Text]) -> list[Item]:
    """Return one or several texts as items of requests.

    Raises:
        InputError: an element is not a text; the message names its index.
    """
    return list(_items([given] if is_one(given) else given))


def drawn(texts: Iterable[Text]) -> Iterable[Item]:
    """Return texts as items: a collection is checked at once, an iterator element by element.

    Raises:
        InputError: an element is not a text; the message names its index.
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
        InputError: the element is not a text; the message names its index.
    """
    param = f"input[{index}]"
    if isinstance(text, str):
        return _checked(text, param)
    if isinstance(text, tuple):
        if len(text) != 2:
            raise InputError(
                f"{param} is a tuple of {len(text)}: a pair has two strings; use a list for "
                "several texts"
            )
        return {
            "text": _checked(text[0], f"{param}[0]"),
            "text_pair": _checked(text[1], f"{param}[1]"),
        }
    if not isinstance(text, Mapping):
        raise InputError(
            f"{param} is {_shown(text)}, not a text: give a string, a pair of strings as a tuple, "
            'or {"text": ..., "text_pair": ...}'
        )
    item = {"text": _checked(text.get("text"), f"{param}.text")}
    for name, part in text.items():
        if name not in ("text", "text_pair"):
            raise InputError(f"{param} has the unknown key {name!r}; known keys: text, text_pair")
        if name == "text_pair" and part is not None:
            item["text_pair"] = _checked(part, f"{param}.text_pair")
    return item


def _checked(text: Any, param: str) -> str:
    if not isinstance(text, str):
        raise InputError(f"{param} is {_shown(text)}, not a string")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"{param}: character {error.start} is half of a surrogate pair, which cannot be "
                "encoded as UTF-8"
            ) from None
    return text


def _shown(value: Any) -> str:
    """Describe a value without quoting its content."""
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
    """Return the number of texts; None if it is only known after iterating."""
    return len(texts) if isinstance(texts, Sized) else None


@dataclass
class Limits:
    """The maximum size of a request; a server with a lower limit lowers `items`.

    Attributes:
        items: maximum number of texts.
        characters: maximum number of characters of all texts; a single longer text is sent alone.
    """

    items: int
    characters: int


def split(items: Iterable[Item], limits: Limits) -> Iterator[Chunk]:
    """Split items into chunks within the limits.

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
    """The settings that all requests of one call share.

    Attributes:
        options: fields of POST /classify.
        budget: deadline of the call.
        retry: retry policy.
        chance: returns random numbers in 0..1.
        limits: maximum size of a request.
        proxies: names of the proxy variables that the connections use.
    """

    options: Options
    budget: Budget
    retry: Retry
    chance: Callable[[], float]
    limits: Limits
    proxies: Sequence[str]

    def attempts(self, chunk: Chunk) -> Attempts:
        """Send a chunk and retry until its results are there; yield the steps.

        A chunk that is too large for the server is sent as two halves.

        Raises:
            DeadlineExceededError: the deadline has passed.
            OverloadedError, UnreachableError: every attempt before the deadline failed.
            ServerError: the server refused the request, and a retry would not help.
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
    timeout = httpx.Timeout(remaining + GRACE_SECONDS, connect=min(CONNECT_SECONDS, remaining))
    return Send(body, timeout)


def _judge(
    outcome: Outcome, start: int, proxies: Sequence[str]
) -> tuple[ClientError, float | None]:
    """Return the error of a failed attempt that can be retried, and the server's Retry-After.

    Raises:
        ClientError: a retry would not help.
    """
    if not isinstance(outcome, httpx.Response):
        if isinstance(outcome, (httpx.ReadTimeout, httpx.WriteTimeout)):
            raise DeadlineExceededError("the server did not answer in time") from outcome
        return unreachable(outcome, proxies), None
    error = read_error(outcome, start, proxies)
    if isinstance(error, OverloadedError):
        return error, error.retry_after
    if outcome.status_code == HTTPStatus.GATEWAY_TIMEOUT:
        raise DeadlineExceededError(str(error)) from error
    raise error


def unreachable(cause: httpx.TransportError | None, proxies: Sequence[str]) -> UnreachableError:
    """Return the error for a connection that could not be opened, or that broke."""
    reason = str(cause) or type(cause).__name__
    error = UnreachableError(f"the server cannot be reached: {reason}{_proxy_hint(proxies)}")
    error.__cause__ = cause
    return error


def _proxy_hint(proxies: Sequence[str]) -> str:
    """Return a hint that a proxy may have answered instead of the server; empty without proxies."""
    if not proxies:
        return ""
    return f" (proxy variables are set: {', '.join(proxies)}; no_proxy may exempt the server)"


def read_body(response: httpx.Response, proxies: Sequence[str]) -> dict[str, Any]:
    """Return the JSON object of a response.

    Raises:
        ServerError: the response is an error.
    """
    if not response.is_success:
        raise read_error(response, 0, proxies)
    return dict(response.json())


def read_error(response: httpx.Response, start: int, proxies: Sequence[str]) -> ServerError:
    """Return the error that a response describes; `start` is added to indices of texts."""
    status = response.status_code
    try:
        body = response.json()
        fields = body["error"]
        fields = fields if isinstance(fields, dict) else {"message": str(fields)}
    except (JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        answered = f"the server answered {status} {response.reason_phrase}"
        fields = {"message": f"{answered}{_proxy_hint(proxies)}"}
    kind = OverloadedError if status in _BUSY else ServerError
    param = fields.get("param")
    error = kind(
        status,
        shift(str(fields.get("message")), start),
        fields.get("code"),
        shift(param, start) if isinstance(param, str) else None,
        response.headers.get("x-request-id"),
    )
    if isinstance(error, OverloadedError):
        error.retry_after = read_retry_after(response.headers.get("retry-after"))
    return error


def read_retry_after(value: str | None, now: Callable[[], float] = time.time) -> float | None:
    """Return the seconds of a Retry-After header (a number or a date); None if there are none."""
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
