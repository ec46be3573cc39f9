"""Limits on what one request can cost: tokenization, deadlines, number of values, rate limits."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from budgetformer.tokenization import Text, TextEncoder, Tokens
from service.keys import Key, digest
from tests.support.serving import Service, error_of, service
from tests.support.stores import TOPICS
from tests.support.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="session")

LONG = "the otter slept " * 500
HUGE = [2**31, 2**53, 2**63, 10**30, 10**400]


class PausedTokenization:
    """Tokenization in which every step waits for the gate."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.started = 0
        self.gate = threading.Semaphore(0)
        unpaused = TextEncoder.steps

        def paused(encoder: TextEncoder, texts: list[Text]) -> Iterator[list[Tokens]]:
            for finished in unpaused(encoder, texts):
                self.started += 1
                self.gate.acquire(timeout=60)
                yield finished

        monkeypatch.setattr(TextEncoder, "steps", paused)


@pytest.mark.parametrize("path", ["/classify", "/tokenize"])
async def test_tokenization_stops_at_the_deadline(
    model_store: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    async with service(model_store, models=[TOPICS], timeout_ms=200) as running:
        tokenization = PausedTokenization(monkeypatch)
        response = await running.client.post(path, json={"input": [LONG] * 50})
        error_of(response, 504, param="timeout_ms")
        assert tokenization.started == 1
        tokenization.gate.release()
        monkeypatch.undo()
        assert await running.answer("a")
        assert tokenization.started == 1


@pytest.mark.parametrize("path", ["/classify", "/tokenize"])
async def test_tokenization_stops_when_the_client_disconnects(
    model_store: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    async with service(model_store, models=[TOPICS]) as running:
        tokenization = PausedTokenization(monkeypatch)
        gone = asyncio.Event()
        sent = [{"type": "http.request", "body": json.dumps({"input": [LONG] * 50}).encode()}]

        async def receive() -> dict[str, Any]:
            if sent:
                return sent.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(_: Any) -> None:
            pytest.fail("an answer was sent to a closed connection")

        scope = {
            "type": "http", "method": "POST", "path": path, "raw_path": path.encode(),
            "query_string": b"", "headers": [], "http_version": "1.1", "scheme": "http",
        }  # fmt: skip
        asking = asyncio.create_task(running.app(scope, receive, send))  # type: ignore[arg-type]
        await until(lambda: tokenization.started == 1, "the first step")
        gone.set()
        await asking
        tokenization.gate.release()
        monkeypatch.undo()
        assert await running.answer("a")
        assert tokenization.started == 1


class TestDeadlines:
    @pytest.mark.parametrize("field", ["timeout_ms", "target_ms"])
    @pytest.mark.parametrize(
        "huge", [3_600_001, *HUGE], ids=lambda huge: f"{len(str(huge))} digits"
    )
    async def test_deadlines_beyond_the_maximum_are_refused(
        self, shared: Service, field: str, huge: int
    ) -> None:
        error_of(await shared.ask("a", **{field: huge}), 422, param=field)

    @pytest.mark.parametrize(
        ("path", "body"),
        [
            ("/predict", {"inputs": "a", "timeout_ms": 3_600_001}),
            ("/invocations", {"inputs": "a", "timeout_ms": 3_600_001}),
            (
                f"/v2/models/{TOPICS}/infer",
                {
                    "inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["a"]}],
                    "parameters": {"timeout": 3_600_001_000},
                },
            ),
        ],
    )
    async def test_deadlines_beyond_the_maximum_are_refused_in_every_dialect(
        self, shared: Service, path: str, body: Any
    ) -> None:
        response = await shared.client.post(path, json=body)
        assert response.status_code == 422
        assert "3600000" in response.text

    async def test_max_timeout_ms_sets_the_maximum(self, model_store: Path) -> None:
        limits = {"timeout_ms": 1000, "max_timeout_ms": 20_000}
        async with service(model_store, models=[TOPICS], **limits) as running:
            assert await running.answer("a", timeout_ms=20_000)
            error_of(await running.ask("a", timeout_ms=20_001), 422, param="timeout_ms")

    async def test_a_long_deadline_does_not_prevent_load_shedding(self, model_store: Path) -> None:
        async with service(model_store, models=[TOPICS], timeout_ms=1000) as running:
            assert await running.answer("a", timeout_ms=3_600_000)
            shedding = running.app.state.shared.admission.shedding
            now = time.monotonic()
            shedding.note_delay(0.5, now)
            assert shedding.sheds(1, now)

    @pytest.mark.parametrize("field", ["top_k", "heads", "max_heads", "priority"])
    @pytest.mark.parametrize("huge", HUGE, ids=lambda huge: f"{len(str(huge))} digits")
    async def test_other_huge_numbers_cause_no_server_error(
        self, shared: Service, field: str, huge: int
    ) -> None:
        assert (await shared.ask("a", **{field: huge})).status_code in (200, 400, 422)


class TestNumberOfValues:
    """The service takes 64 items of 10,000 characters; no body is larger than 500,000 bytes."""

    @pytest.mark.parametrize("unit", ["[]", "{}", '""', "1", '{"text":""}', '"a":1', "[[]]"])
    @pytest.mark.parametrize("path", ["/classify", "/predict", "/tokenize", "/invocations"])
    async def test_bodies_with_too_many_json_values_are_refused(
        self, shared: Service, path: str, unit: str
    ) -> None:
        many = ",".join([unit] * (400_000 // (len(unit) + 1)))
        body = f"{{{many}}}" if unit.startswith('"a"') else f'{{"input":[{many}]}}'
        response = await shared.client.post(path, content=body.encode())
        assert response.status_code == 413
        assert len(response.content) < 300

    async def test_brackets_and_commas_in_texts_are_not_counted(self, shared: Service) -> None:
        text = '[{"a", \\ "b"}],' * 600
        assert len((await shared.answer([text] * 30))["data"]) == 30

    @pytest.mark.parametrize("rest", ["", "x", '"', '"\\"\\"\\"', '"' + "\\\\" * 9])
    async def test_invalid_json_with_many_commas_is_reported_as_invalid(
        self, shared: Service, rest: str
    ) -> None:
        body = '{"input": ["a" ' + "," * 5000 + rest
        error_of(await shared.client.post("/classify", content=body.encode()), 400, "invalid_json")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/classify", {"input": "a", "n" * 400_000: 1}),
        ("/classify", {"input": "a", "model": "n" * 400_000}),
        ("/classify", {"input": "a", "model": "topics:" + "9" * 400_000}),
        ("/classify", {"input": "a", "quality": "n" * 400_000}),
        ("/classify", {"input": {"text": "a", "n" * 400_000: 1}}),
        ("/classify", {"input": "a", "request_id": "n" * 400_000}),
        ("/predict", {"inputs": "a", "n" * 400_000: 1}),
        (f"/v2/models/{TOPICS}/infer", {"inputs": [], "n" * 400_000: 1}),
        (
            f"/v2/models/{TOPICS}/infer",
            {"inputs": [{"name": "n" * 400_000, "shape": [1], "datatype": "BYTES", "data": [""]}]},
        ),
    ],
    ids=range(9),
)
async def test_errors_about_long_names_are_short(shared: Service, path: str, body: Any) -> None:
    response = await shared.client.post(path, json=body)
    assert response.status_code in (404, 422)
    assert len(response.content) < 1000


REFUSED = [
    ({"input": ["a"] * 4, "quality": 50.5, "heads": 99}, 422),
    ({"input": ["b " * 100] * 4, "truncate": False}, 422),
    ({"input": ["a"] * 4, "timeout_ms": 10**7}, 422),
    ({"input": ["a"] * 4, "model": "nothing"}, 404),
]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def metered(model_store: Path) -> AsyncIterator[Service]:
    rate_limited = Key(sha256=digest(b"secret"), texts_per_second=0.001, burst=5)
    async with service(model_store, models=[TOPICS], keys={"web": rate_limited}) as running:
        running.client.headers["X-API-Key"] = "secret"
        yield running


class TestRates:
    async def test_only_answered_texts_count_against_the_rate_limit(self, metered: Service) -> None:
        for body, status in REFUSED * 2:
            response = await metered.client.post("/classify", json=body)
            assert response.status_code == status
        assert len((await metered.answer(["a"] * 4))["data"]) == 4
        error_of(await metered.ask(["a"] * 2), 429, "rate")
        assert await metered.answer("a")
        error_of(await metered.ask("a"), 429, "rate")
