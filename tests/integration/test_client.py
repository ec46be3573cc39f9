"""The client against a scripted server: inputs, splitting, retries, deadlines, progress.

tests/e2e/test_client.py tests it against the service.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from threading import Barrier, Lock
from typing import Any

import httpx
import numpy as np
import pytest

from budgetformer.client import (
    AsyncClient,
    Classification,
    Client,
    DeadlineExceededError,
    Failure,
    InputError,
    ItemFailedError,
    OverloadedError,
    Retry,
    ServerError,
    UnreachableError,
)
from budgetformer.client.calls import Limits, drawn, read_retry_after, split
from tests.support.scripted import Reply, Scripted, answer, refusal, scripted

TEXTS = [f"text {index}" for index in range(23)]
JITTER = Retry().jitter


class Clock:
    """A clock that only advances by `sleep`, and records the waits."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.waits: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds

    async def sleep_async(self, seconds: float) -> None:
        self.sleep(seconds)


class EitherClient:
    """The blocking or the asynchronous client behind one interface."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.clock = Clock()

    def run(self, url: str, *call: Any, method: str = "classify", **settings: Any) -> Any:
        """Call a method of a new client with these settings."""
        fields = settings.pop("fields", {})
        common = {"clock": self.clock, "chance": lambda: 0.5, **settings}
        if self.kind == "blocking":
            with Client(url, sleep=self.clock.sleep, **common) as client:
                return getattr(client, method)(*call, **fields)

        async def main() -> Any:
            async with AsyncClient(url, sleep=self.clock.sleep_async, **common) as client:
                return await getattr(client, method)(*call, **fields)

        return asyncio.run(main())


@pytest.fixture(params=["blocking", "awaiting"])
def either(request: pytest.FixtureRequest) -> EitherClient:
    return EitherClient(request.param)


def echo(_: int, body: dict[str, Any]) -> Reply:
    return answer(body["input"])


@pytest.fixture
def echoing() -> Iterator[Scripted]:
    with scripted(echo) as server:
        yield server


def replies_first(*replies: Reply) -> Callable[[int, dict[str, Any]], Reply]:
    """Answer with these replies first, and then correctly."""
    return lambda number, body: replies[number] if number < len(replies) else echo(number, body)


def labels(results: Any) -> list[str]:
    return [result.label for result in results]


class TestResults:
    def test_results_are_typed_and_in_order(self, either: EitherClient, echoing: Scripted) -> None:
        results = either.run(echoing.url, TEXTS)
        assert labels(results) == TEXTS
        assert [result.index for result in results] == list(range(len(TEXTS)))
        assert results[3] == Classification(
            index=3, label="text 3", score=1.0, probs=(1.0,), labels=results[3].labels,
            budget=1, predicted=1, steps=(0, 1), heads=2, heads_total=8, per_layer=None, macs=10,
            dense_macs=100, tokens=3, truncated=False, quality="auto", model="echo:1",
        )  # fmt: skip

    def test_one_text_gives_one_result(self, either: EitherClient, echoing: Scripted) -> None:
        assert labels(either.run(echoing.url, "alone")) == ["alone"]
        assert labels(either.run(echoing.url, ("a", "b"))) == ["a+b"]
        assert labels(either.run(echoing.url, {"text": "a", "text_pair": "b"})) == ["a+b"]

    def test_without_texts_no_request_is_sent(
        self, either: EitherClient, echoing: Scripted
    ) -> None:
        assert either.run(echoing.url, []) == []
        assert echoing.bodies == []

    def test_a_failed_item_is_a_failure_among_the_results(
        self, either: EitherClient, echoing: Scripted
    ) -> None:
        results = either.run(echoing.url, [*TEXTS[:5], "broken", "last"], batch_items=4)
        assert results[5] == Failure(5, "input[5]: it failed", "item_failed")
        assert labels([*results[:5], results[6]]) == [*TEXTS[:5], "last"]

    def test_options_are_sent_unchanged(self, either: EitherClient, echoing: Scripted) -> None:
        either.run(echoing.url, "a", fields={"quality": 1.5, "return_heads": True, "model": "m"})
        (body,) = echoing.bodies
        del body["timeout_ms"]
        assert body == {"input": ["a"], "quality": 1.5, "return_heads": True, "model": "m"}


class TestSplitting:
    def test_requests_have_at_most_batch_items_texts(
        self, either: EitherClient, echoing: Scripted
    ) -> None:
        assert labels(either.run(echoing.url, TEXTS, batch_items=5)) == TEXTS
        assert sorted(len(body["input"]) for body in echoing.bodies) == [3, 5, 5, 5, 5]

    def test_requests_have_a_limited_number_of_characters(self) -> None:
        texts = ["a" * 4, "b" * 4, ("c" * 5, "d" * 5), {"text": "e" * 30, "text_pair": ""}, "f"]
        chunks = list(split(drawn(texts), Limits(items=100, characters=10)))
        assert [chunk.start for chunk in chunks] == [0, 2, 3, 4]
        assert [len(chunk.texts) for chunk in chunks] == [2, 1, 1, 1]

    def test_concurrency_limits_the_requests_in_flight(self, either: EitherClient) -> None:
        lock, barrier = Lock(), Barrier(3)
        now, most = 0, 0

        def together(number: int, body: dict[str, Any]) -> Reply:
            nonlocal now, most
            with lock:
                now += 1
                most = max(most, now)
            barrier.wait(20)
            with lock:
                now -= 1
            return echo(number, body)

        with scripted(together) as server:
            results = either.run(server.url, TEXTS[:18], batch_items=2, concurrency=3)
        assert labels(results) == TEXTS[:18]
        assert most == 3

    def test_connections_are_reused(self, either: EitherClient, echoing: Scripted) -> None:
        either.run(echoing.url, TEXTS, batch_items=1, concurrency=2)
        assert len(echoing.bodies) == len(TEXTS)
        assert len(echoing.connections) <= 2

    def test_a_stream_draws_texts_as_they_are_needed(self, echoing: Scripted) -> None:
        drawn = 0

        def endless() -> Iterator[str]:
            nonlocal drawn
            while True:
                drawn += 1
                yield f"text {drawn}"

        with Client(echoing.url, batch_items=5, concurrency=2) as client:
            stream = client.stream(endless())
            assert [next(stream).index for _ in range(12)] == list(range(12))
            stream.close()
        assert drawn <= 40

    async def test_an_asynchronous_stream_can_be_closed_early(self, echoing: Scripted) -> None:
        async with AsyncClient(echoing.url, batch_items=1, concurrency=2) as client:
            stream = client.stream(TEXTS)
            assert labels([await anext(stream), await anext(stream)]) == TEXTS[:2]
            await stream.aclose()
        assert len(echoing.bodies) < len(TEXTS)

    def test_errors_number_texts_as_in_the_call(self, either: EitherClient) -> None:
        def refuse(number: int, body: dict[str, Any]) -> Reply:
            if TEXTS[11] in body["input"]:
                return refusal(422, "text_too_long")
            return echo(number, body)

        with scripted(refuse) as server, pytest.raises(ServerError) as caught:
            either.run(server.url, TEXTS, batch_items=10)
        error = caught.value
        assert (error.status, error.code, error.param) == (422, "text_too_long", "input[11]")
        assert error.message == "text_too_long at input[11]"
        assert str(error.request_id).startswith("request-")


class Series:
    """A column like that of pandas, which is neither a list nor a sequence."""

    ndim = 1

    def __init__(self, values: list[Any]) -> None:
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._values)


class TestInputs:
    @pytest.mark.parametrize(
        "given",
        [
            lambda: ["a", "b"], lambda: iter(["a", "b"]), lambda: (text for text in "ab"),
            lambda: {"a": 1, "b": 2}.keys(), lambda: np.array(["a", "b"]),
            lambda: np.array(["a", "b"], dtype=object), lambda: Series(["a", "b"]),
            lambda: (("a", "-"), ("b", "-")), lambda: ({"text": "a", "text_pair": "-"}, ("b", "-")),
        ],
        ids=range(9),
    )  # fmt: skip
    def test_any_iterable_of_texts_is_accepted(
        self, either: EitherClient, echoing: Scripted, given: Any
    ) -> None:
        shown = [label.removesuffix("+-") for label in labels(either.run(echoing.url, given()))]
        assert shown == ["a", "b"]

    @pytest.mark.parametrize("given", [[], (), iter([]), np.array([], dtype=str), Series([])])
    def test_any_empty_iterable_gives_no_results(
        self, either: EitherClient, echoing: Scripted, given: Any
    ) -> None:
        assert either.run(echoing.url, given) == []
        assert either.run(echoing.url, given, method="__call__") == []

    @pytest.mark.parametrize(
        ("bad", "told"),
        [
            (None, r"input\[19\] is None"),
            (float("nan"), r"input\[19\] is nan"),
            (3, r"input\[19\] is of the type int"),
            (True, r"input\[19\] is of the type bool"),
            (b"bytes", r"input\[19\] is of the type bytes"),
            (["a", "b"], r"input\[19\] is of the type list"),
            (np.float64("nan"), r"input\[19\] is .*nan"),
            (("a", None), r"input\[19\]\[1\] is None"),
            ((None, "a"), r"input\[19\]\[0\] is None"),
            (("a", float("nan")), r"input\[19\]\[1\] is nan"),
            (("a",), r"input\[19\] is a tuple of 1"),
            (("a", "b", "c"), r"input\[19\] is a tuple of 3"),
            ({"text": None}, r"input\[19\].text is None"),
            ({}, r"input\[19\].text is None"),
            ({"text": "a", "text_pair": 2}, r"input\[19\].text_pair is of the type int"),
            ({"text": "a", "pair": "b"}, r"input\[19\] has the unknown key 'pair'"),
            ("half \ud800", r"input\[19\]: character 5"),
            (("a", "\udfff"), r"input\[19\]\[1\]: character 0"),
        ],
        ids=range(18),
    )
    def test_values_that_are_no_texts_are_reported_before_sending(
        self, either: EitherClient, echoing: Scripted, bad: Any, told: str
    ) -> None:
        given = [*TEXTS[:19], bad, *TEXTS[:3], None]
        for wrap in (list, iter, Series):
            with pytest.raises(InputError, match=told) as caught:
                either.run(echoing.url, wrap(given), batch_items=2)
            assert "\n" not in str(caught.value)
        assert echoing.bodies == []

    @pytest.mark.parametrize(
        "given",
        [
            None, 3, float("nan"), b"bytes", ("a", None), ("a", "b", "c"), ("a",), (1, 2),
            {"text": 1}, "\udc80", np.array("a"), np.array([["a", "b"]]), np.array([1.5]),
        ],
        ids=range(13),
    )  # fmt: skip
    @pytest.mark.parametrize("method", ["classify", "__call__"])
    def test_single_values_that_are_no_texts_are_reported(
        self, either: EitherClient, echoing: Scripted, given: Any, method: str
    ) -> None:
        with pytest.raises(InputError, match=r"input(\[0\])?"):
            either.run(echoing.url, given, method=method)
        assert echoing.bodies == []

    def test_a_stream_reports_a_value_that_is_no_text_when_it_is_drawn(
        self, echoing: Scripted
    ) -> None:
        with Client(echoing.url, batch_items=1, concurrency=1) as client:
            stream = client.stream(iter([*TEXTS[:5], None]))
            assert next(stream).label == TEXTS[0]
            with pytest.raises(InputError, match=r"input\[5\] is None"):
                list(stream)

    @pytest.mark.parametrize(
        "options", [{"quality": float("nan")}, {"quality": b"best"}, {"top_k": {1}}], ids=str
    )
    def test_options_that_are_not_valid_json_are_reported(
        self, either: EitherClient, echoing: Scripted, options: Any
    ) -> None:
        with pytest.raises(InputError, match=next(iter(options))):
            either.run(echoing.url, "a", fields=options)
        assert echoing.bodies == []


class TestServerLimits:
    @staticmethod
    def at_most(items: int, code: str = "too_many_items") -> Callable[[int, dict[str, Any]], Reply]:
        def reply(number: int, body: dict[str, Any]) -> Reply:
            if len(body["input"]) > items:
                error = {"message": "too many", "type": "x", "param": "input", "code": code}
                return Reply(413, {"error": error})
            return echo(number, body)

        return reply

    @pytest.mark.parametrize("items", [1, 4, 9])
    def test_requests_are_split_at_the_limit_of_the_server(
        self, either: EitherClient, items: int
    ) -> None:
        given = [*TEXTS, "broken", *TEXTS]
        with scripted(self.at_most(items)) as server:
            results = either.run(server.url, given, batch_items=16)
        assert [result.index for result in results] == list(range(len(given)))
        assert results[23] == Failure(23, "input[23]: it failed", "item_failed")
        assert labels([*results[:23], *results[24:]]) == [*TEXTS, *TEXTS]

    def test_the_limit_of_the_server_is_remembered(self) -> None:
        told: list[tuple[int, int | None]] = []
        with scripted(self.at_most(5)) as server, Client(server.url, concurrency=1) as client:
            client.classify(TEXTS, progress=lambda *done: told.append(done))
            refused = [len(body["input"]) for body in server.bodies]
            client.classify(TEXTS)
            again = [len(body["input"]) for body in server.bodies[len(refused) :]]
        assert told == [(23, 23)]
        assert refused == [23, 11, 5, 5, 1, 5, 5, 1, 1]
        assert again == [5, 5, 5, 5, 3]

    def test_too_large_bodies_are_split_without_remembering_a_limit(
        self, either: EitherClient
    ) -> None:
        with scripted(self.at_most(5, "body_too_large")) as server:
            assert labels(either.run(server.url, TEXTS, batch_items=10)) == TEXTS
            assert sorted(len(body["input"]) for body in server.bodies) == [3, 5, 5, 5, 5, 10, 10]

    def test_after_a_split_errors_number_texts_as_in_the_call(self, either: EitherClient) -> None:
        take = self.at_most(4)

        def refuse(number: int, body: dict[str, Any]) -> Reply:
            if len(body["input"]) <= 4 and TEXTS[11] in body["input"]:
                at = body["input"].index(TEXTS[11])
                error = {"message": f"bad input[{at}]", "param": f"input[{at}]", "code": "bad"}
                return Reply(422, {"error": error})
            return take(number, body)

        with scripted(refuse) as server, pytest.raises(ServerError, match=r"bad input\[11\]"):
            either.run(server.url, TEXTS, batch_items=20)


class TestProxies:
    """Environment variables for proxies; nothing listens at the proxies that they name."""

    CLOSED_PROXY = "http://user:hidden@127.0.0.1:9"

    @pytest.fixture(autouse=True)
    def _no_variables(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in [n for n in os.environ if n.lower().endswith("_proxy")]:
            monkeypatch.delenv(name)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("HTTP_PROXY", CLOSED_PROXY), ("http_proxy", CLOSED_PROXY), ("ALL_PROXY", CLOSED_PROXY),
            ("all_proxy", "socks5://127.0.0.1:9"), ("ALL_PROXY", "socks://127.0.0.1:9"),
            ("HTTPS_PROXY", "nonsense"),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
    def test_servers_on_this_host_are_reached_without_the_proxy(
        self,
        either: EitherClient,
        echoing: Scripted,
        monkeypatch: Any,
        name: str,
        value: str,
        host: str,
    ) -> None:
        monkeypatch.setenv(name, value)
        url = echoing.url.replace("127.0.0.1", host)
        assert labels(either.run(url, "a")) == ["a"]

    def test_a_given_http_client_uses_the_proxy_even_on_this_host(
        self, echoing: Scripted, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HTTP_PROXY", self.CLOSED_PROXY)
        with (
            httpx.Client() as http,
            Client(echoing.url, http=http) as client,
            pytest.raises(UnreachableError),
        ):
            client.classify("a", timeout=0.5)
        assert echoing.bodies == []

    @pytest.mark.parametrize("name", ["HTTP_PROXY", "https_proxy", "ALL_PROXY"])
    def test_connection_errors_name_the_proxy_variables_without_passwords(
        self, either: EitherClient, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        monkeypatch.setenv(name, self.CLOSED_PROXY)
        monkeypatch.setenv("NO_PROXY", "example.org")
        with pytest.raises(UnreachableError, match=rf"{name}.*NO_PROXY|NO_PROXY.*{name}") as caught:
            either.run("http://nowhere.invalid", "a", retry=Retry(attempts=1))
        assert "hidden" not in str(caught.value)
        with pytest.raises(UnreachableError, match=name):
            either.run("http://nowhere.invalid", method="models")

    @pytest.mark.parametrize("value", ["socks://user:hidden@127.0.0.1:9", "gopher://127.0.0.1:9"])
    def test_invalid_proxy_variables_are_reported(
        self, either: EitherClient, monkeypatch: pytest.MonkeyPatch, value: str
    ) -> None:
        monkeypatch.setenv("ALL_PROXY", value)
        with pytest.raises(UnreachableError, match="ALL_PROXY") as caught:
            either.run("http://nowhere.invalid", "a")
        assert "hidden" not in str(caught.value)

    def test_errors_of_the_proxy_name_the_proxy_variable(
        self, either: EitherClient, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with scripted(lambda *_: Reply(502, "<html>")) as proxy:
            monkeypatch.setenv("HTTP_PROXY", proxy.url)
            with pytest.raises(ServerError, match=r"502 .*HTTP_PROXY"):
                either.run("http://nowhere.invalid", "a")

    def test_without_proxy_variables_errors_do_not_mention_proxies(
        self, either: EitherClient
    ) -> None:
        with pytest.raises(UnreachableError) as caught:
            either.run("http://127.0.0.1:9", "a", retry=Retry(attempts=1))
        assert "proxy" not in str(caught.value)


class TestRetries:
    @pytest.mark.parametrize(("status", "code"), [(429, "queue_full"), (503, "draining")])
    def test_the_wait_is_retry_after_with_jitter(
        self, either: EitherClient, status: int, code: str
    ) -> None:
        with scripted(
            replies_first(refusal(status, code, "2"), refusal(status, code, "4"))
        ) as server:
            assert labels(either.run(server.url, "a")) == ["a"]
        assert either.clock.waits == [2 * (1 + JITTER / 2), 4 * (1 + JITTER / 2)]

    def test_without_retry_after_the_wait_doubles(self, either: EitherClient) -> None:
        with scripted(replies_first(*[Reply(503)] * 4)) as server:
            assert labels(either.run(server.url, "a")) == ["a"]
        assert either.clock.waits == [0.05, 0.1, 0.2, 0.4]

    def test_the_wait_is_limited(self) -> None:
        assert Retry().wait(50, None, 1.0) == Retry().longest_wait

    def test_jitter_adds_at_most_its_share(self) -> None:
        retry = Retry()
        assert retry.wait(0, 8.0, 0.0) == 8.0
        assert retry.wait(0, 8.0, 1.0) == 8.0 * (1 + JITTER)
        assert retry.wait(0, 0.0, 1.0) == retry.first_wait

    def test_requests_are_repeated_after_broken_connections(self, either: EitherClient) -> None:
        with scripted(replies_first(Reply(0), Reply(0))) as server:
            assert labels(either.run(server.url, "a")) == ["a"]
        assert len(either.clock.waits) == 2

    def test_after_the_last_attempt_the_error_is_raised(self, either: EitherClient) -> None:
        with scripted(lambda *_: refusal(429, "queue_full", "3")) as server:
            with pytest.raises(OverloadedError) as caught:
                either.run(server.url, "a", retry=Retry(attempts=3))
            assert len(server.bodies) == 3
        assert (caught.value.code, caught.value.retry_after) == ("queue_full", 3.0)

    def test_an_unreachable_server_is_retried_and_then_reported(self, either: EitherClient) -> None:
        with scripted(echo) as server:
            pass
        with pytest.raises(UnreachableError):
            either.run(server.url, "a", retry=Retry(attempts=2))
        assert len(either.clock.waits) == 1

    @pytest.mark.parametrize("status", [400, 404, 413, 422, 500])
    def test_permanent_errors_are_not_retried(self, either: EitherClient, status: int) -> None:
        with scripted(lambda *_: refusal(status, "no")) as server:
            with pytest.raises(ServerError, match="no at input") as caught:
                either.run(server.url, "a")
            assert len(server.bodies) == 1
        assert caught.value.status == status

    @pytest.mark.parametrize("body", ["<html>", {"error": "plain"}, [1], None])
    def test_errors_in_other_formats_are_server_errors(
        self, either: EitherClient, body: Any
    ) -> None:
        with scripted(lambda *_: Reply(502, body)) as server, pytest.raises(ServerError):
            either.run(server.url, "a")

    @pytest.mark.parametrize(
        ("value", "seconds"),
        [(None, None), ("7", 7.0), ("0.5", 0.5), ("-3", 0.0), ("soon", None), ("", None)],
    )
    def test_retry_after_can_be_in_seconds(self, value: str | None, seconds: float | None) -> None:
        assert read_retry_after(value) == seconds

    def test_retry_after_can_be_a_date(self) -> None:
        now = datetime(2030, 1, 1, tzinfo=UTC)
        date = format_datetime(now + timedelta(seconds=90), usegmt=True)
        assert read_retry_after(date, now.timestamp) == 90
        assert read_retry_after(date, lambda: now.timestamp() + 1000) == 0


class TestDeadlines:
    def test_the_remaining_time_is_sent_to_the_server(self, either: EitherClient) -> None:
        with scripted(replies_first(refusal(503, "loading", "4"))) as server:
            either.run(server.url, "a", timeout=10)
            told = [body["timeout_ms"] for body in server.bodies]
        assert told == [10_000, int(10_000 - 4000 * (1 + JITTER / 2))]

    def test_no_retry_if_its_wait_would_exceed_the_deadline(self, either: EitherClient) -> None:
        with scripted(lambda *_: refusal(429, "queue_full", "30")) as server:
            with pytest.raises(OverloadedError):
                either.run(server.url, "a", fields={"timeout": 20.0})
            assert len(server.bodies) == 1
        assert either.clock.waits == []

    def test_with_a_timeout_of_0_nothing_is_sent(
        self, either: EitherClient, echoing: Scripted
    ) -> None:
        with pytest.raises(DeadlineExceededError):
            either.run(echoing.url, "a", timeout=0)
        assert echoing.bodies == []

    def test_a_504_raises_deadline_exceeded(self, either: EitherClient) -> None:
        with (
            scripted(lambda *_: refusal(504, "timeout")) as server,
            pytest.raises(DeadlineExceededError),
        ):
            either.run(server.url, "a")

    def test_with_an_infinite_timeout_none_is_sent(
        self, either: EitherClient, echoing: Scripted
    ) -> None:
        either.run(echoing.url, "a", timeout=float("inf"))
        assert "timeout_ms" not in echoing.bodies[0]


class TestProgress:
    def test_progress_calls_a_function(self, either: EitherClient, echoing: Scripted) -> None:
        told: list[tuple[int, int | None]] = []

        def tell(done: int, total: int | None) -> None:
            told.append((done, total))

        either.run(echoing.url, TEXTS, batch_items=10, fields={"progress": tell})
        assert told == [(10, 23), (20, 23), (23, 23)]
        told.clear()
        either.run(echoing.url, iter(TEXTS), batch_items=20, fields={"progress": tell})
        assert told == [(20, 23), (23, 23)]

    def test_progress_can_be_a_bar_on_stderr(
        self, either: EitherClient, echoing: Scripted, capsys: pytest.CaptureFixture[str]
    ) -> None:
        either.run(echoing.url, TEXTS, fields={"progress": True})
        shown = capsys.readouterr()
        assert "23/23" in shown.err
        assert shown.out == ""


class TestPipeline:
    @pytest.mark.parametrize(
        ("inputs", "options", "expected"),
        [
            ("a", {}, [{"label": "a", "score": 1.0}]),
            (["a", "b"], {}, [{"label": "a", "score": 1.0}, {"label": "b", "score": 1.0}]),
            ("a", {"top_k": None}, [{"label": "a", "score": 1.0}]),
            (["a"], {"top_k": 1}, [[{"label": "a", "score": 1.0}]]),
            ({"text": "a", "text_pair": "b"}, {}, {"label": "a+b", "score": 1.0}),
            ({"text": "a", "text_pair": "b"}, {"top_k": 1}, [{"label": "a+b", "score": 1.0}]),
            ("a", {"function_to_apply": "sigmoid"}, [{"label": "a", "score": 0.7310585786300049}]),
        ],
        ids=str,
    )
    def test_calls_answer_in_the_shapes_of_a_transformers_pipeline(
        self, either: EitherClient, echoing: Scripted, inputs: Any, options: Any, expected: Any
    ) -> None:
        assert either.run(echoing.url, inputs, method="__call__", fields=options) == expected

    def test_a_failed_item_raises_an_error(self, either: EitherClient, echoing: Scripted) -> None:
        with pytest.raises(ItemFailedError, match=r"input\[1\]"):
            either.run(echoing.url, ["a", "broken"], method="__call__")


async def test_calls_of_one_asynchronous_client_can_be_concurrent(echoing: Scripted) -> None:
    async with AsyncClient(echoing.url) as client:
        calls: list[Awaitable[Any]] = [client.classify(text) for text in TEXTS]
        assert [result.label for (result,) in await asyncio.gather(*calls)] == TEXTS


def test_importing_budgetformer_needs_no_httpx() -> None:
    program = (
        "import sys; sys.modules['httpx'] = None\n"
        "import budgetformer\n"
        "try:\n    import budgetformer.client\n"
        "except ImportError as error:\n    assert 'budgetformer-serving[client]' in str(error)\n"
        "else:\n    raise SystemExit('it was imported')\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_importing_the_client_imports_no_torch() -> None:
    program = (
        "import sys, budgetformer.client; assert not {'torch', 'transformers'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
