"""What one request can cost: memory, time past its deadline, and what it changes for others."""

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


class Steps:
    """The steps of every text's tokenization, each held until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun = 0
        self.gate = threading.Semaphore(0)
        whole = TextEncoder.steps

        def held(encoder: TextEncoder, texts: list[Text]) -> Iterator[list[Tokens]]:
            for finished in whole(encoder, texts):
                self.begun += 1
                self.gate.acquire(timeout=60)
                yield finished

        monkeypatch.setattr(TextEncoder, "steps", held)


@pytest.mark.parametrize("path", ["/classify", "/tokenize"])
async def test_no_step_begins_after_the_deadline(
    model_store: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    async with service(model_store, models=[TOPICS], timeout_ms=200) as running:
        steps = Steps(monkeypatch)
        response = await running.client.post(path, json={"input": [LONG] * 50})
        error_of(response, 504, param="timeout_ms")
        assert steps.begun == 1
        steps.gate.release()
        monkeypatch.undo()
        assert await running.answer("a")
        assert steps.begun == 1


@pytest.mark.parametrize("path", ["/classify", "/tokenize"])
async def test_no_step_begins_after_the_client_went(
    model_store: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    async with service(model_store, models=[TOPICS]) as running:
        steps = Steps(monkeypatch)
        gone = asyncio.Event()
        sent = [{"type": "http.request", "body": json.dumps({"input": [LONG] * 50}).encode()}]

        async def receive() -> dict[str, Any]:
            if sent:
                return sent.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(_: Any) -> None:
            pytest.fail("nobody is there")

        scope = {
            "type": "http", "method": "POST", "path": path, "raw_path": path.encode(),
            "query_string": b"", "headers": [], "http_version": "1.1", "scheme": "http",
        }  # fmt: skip
        asking = asyncio.create_task(running.app(scope, receive, send))  # type: ignore[arg-type]
        await until(lambda: steps.begun == 1, "the first step")
        gone.set()
        await asking
        steps.gate.release()
        monkeypatch.undo()
        assert await running.answer("a")
        assert steps.begun == 1


class TestDeadlines:
    @pytest.mark.parametrize("field", ["timeout_ms", "target_ms"])
    @pytest.mark.parametrize(
        "huge", [3_600_001, *HUGE], ids=lambda huge: f"{len(str(huge))} digits"
    )
    async def test_a_later_deadline_than_the_server_accepts(
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
    async def test_in_every_dialect(self, shared: Service, path: str, body: Any) -> None:
        response = await shared.client.post(path, json=body)
        assert response.status_code == 422
        assert "3600000" in response.text

    async def test_the_setting_says_which_is_the_latest(self, model_store: Path) -> None:
        limits = {"timeout_ms": 1000, "max_timeout_ms": 20_000}
        async with service(model_store, models=[TOPICS], **limits) as running:
            assert await running.answer("a", timeout_ms=20_000)
            error_of(await running.ask("a", timeout_ms=20_001), 422, param="timeout_ms")

    async def test_the_latest_one_changes_nothing_for_others(self, model_store: Path) -> None:
        async with service(model_store, models=[TOPICS], timeout_ms=1000) as running:
            assert await running.answer("a", timeout_ms=3_600_000)
            shedding = running.app.state.shared.admission.shedding
            now = time.monotonic()
            shedding.note_delay(0.5, now)
            assert shedding.sheds(1, now)

    @pytest.mark.parametrize("field", ["top_k", "heads", "max_heads", "priority"])
    @pytest.mark.parametrize("huge", HUGE, ids=lambda huge: f"{len(str(huge))} digits")
    async def test_other_numbers_without_reason(
        self, shared: Service, field: str, huge: int
    ) -> None:
        assert (await shared.ask("a", **{field: huge})).status_code in (200, 400, 422)


class TestValues:
    """The service takes 64 items of 10,000 characters; no body is larger than 500,000 bytes."""

    @pytest.mark.parametrize("unit", ["[]", "{}", '""', "1", '{"text":""}', '"a":1', "[[]]"])
    @pytest.mark.parametrize("path", ["/classify", "/predict", "/tokenize", "/invocations"])
    async def test_more_values_than_any_request_needs(
        self, shared: Service, path: str, unit: str
    ) -> None:
        many = ",".join([unit] * (400_000 // (len(unit) + 1)))
        body = f"{{{many}}}" if unit.startswith('"a"') else f'{{"input":[{many}]}}'
        response = await shared.client.post(path, content=body.encode())
        assert response.status_code == 413
        assert len(response.content) < 300

    async def test_what_stands_in_texts_is_not_counted(self, shared: Service) -> None:
        text = '[{"a", \\ "b"}],' * 600
        assert len((await shared.answer([text] * 30))["data"]) == 30

    @pytest.mark.parametrize("rest", ["", "x", '"', '"\\"\\"\\"', '"' + "\\\\" * 9])
    async def test_what_is_not_json_is_said_to_be_so(self, shared: Service, rest: str) -> None:
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
async def test_an_error_about_a_long_name_is_short(shared: Service, path: str, body: Any) -> None:
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
    kept = Key(sha256=digest(b"secret"), texts_per_second=0.001, burst=5)
    async with service(model_store, models=[TOPICS], keys={"web": kept}) as running:
        running.client.headers["X-API-Key"] = "secret"
        yield running


class TestRates:
    async def test_a_refused_request_costs_nothing_and_an_answered_one_what_it_holds(
        self, metered: Service
    ) -> None:
        for body, status in REFUSED * 2:
            response = await metered.client.post("/classify", json=body)
            assert response.status_code == status
        assert len((await metered.answer(["a"] * 4))["data"]) == 4
        error_of(await metered.ask(["a"] * 2), 429, "rate")
        assert await metered.answer("a")
        error_of(await metered.ask("a"), 429, "rate")
