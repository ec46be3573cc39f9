"""Several frontends: changes reach all of them, and each request is counted once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from budgetformer.tokenization import Text, TextEncoder, Tokens
from service.http import state
from tests.support.serving import ADMIN, Service, error_of, service
from tests.support.stores import TOPICS, sentences
from tests.support.waiting import until

TEXT = sentences("animals")[0]


async def model_of(client: httpx.AsyncClient) -> str:
    response = await client.post("/classify", json={"input": TEXT})
    assert response.status_code == 200, response.text
    return str(response.json()["model"])


async def all_ready(running: Service) -> bool:
    answers = [await client.get("/health/ready") for client in running.other_clients]
    return all(answer.status_code == 200 for answer in answers)


async def test_a_model_loaded_at_one_frontend_is_served_by_all(store: Path) -> None:
    async with service(store, models=["topics:1"], fronts=3) as running:
        await until(lambda: all_ready(running), "every frontend")
        for version in (2, 1, 2):
            changed = await running.client.post(
                f"/models/{TOPICS}/load", json={"version": version}, headers=ADMIN
            )
            assert changed.status_code == 200
            for client in (running.client, *running.other_clients):
                assert await model_of(client) == f"topics:{version}"


async def test_a_running_request_keeps_its_version_when_another_frontend_changes_it(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, gate = threading.Event(), threading.Event()
    steps = TextEncoder.steps

    def slow(encoder: TextEncoder, texts: list[Text]) -> Iterator[list[Tokens]]:
        entered.set()
        gate.wait(60)
        yield from steps(encoder, texts)

    async with service(store, models=["topics:1"], fronts=2) as running:
        await until(lambda: all_ready(running), "every frontend")
        monkeypatch.setattr(state, "SHORT_CHARACTERS", 0)
        monkeypatch.setattr(TextEncoder, "steps", slow)
        running_request = asyncio.create_task(model_of(running.other_clients[0]))
        await until(entered.is_set, "the tokenizer")
        changed = await running.client.post(f"/models/{TOPICS}/load", headers=ADMIN)
        assert changed.json()["model"] == "topics:2"
        assert set(running.core.models) == {("topics", 1), ("topics", 2)}
        gate.set()
        assert await running_request == "topics:1"
        await until(lambda: set(running.core.models) == {("topics", 2)}, "the old one to be freed")


async def test_metrics_count_the_requests_of_all_frontends(model_store: Path) -> None:
    async with service(model_store, models=["topics"], fronts=2) as running:
        await until(lambda: all_ready(running), "every frontend")
        for client in (running.client, *running.other_clients):
            for _ in range(3):
                await model_of(client)

        async def counted() -> bool:
            metrics = await running.scrape()
            return metrics.total("requests_total", route="/classify", outcome="ok") == 6

        await until(counted, "the count of both fronts")
        metrics = await running.scrape()
        assert metrics.total("items_total") == 6


async def test_the_server_is_not_ready_if_all_engines_crash_repeatedly(model_store: Path) -> None:
    async with service(model_store, models=["topics"], engines=2) as running:
        running.hub.report_crash_loop("frontend-1", "frontend-1 does not come up")
        running.hub.report_crash_loop("engine-0", "engine-0 does not come up")

        async def reported() -> bool:
            body = (await running.client.get("/health")).json()
            return bool(
                body["crash_loops"] == ["engine-0 does not come up", "frontend-1 does not come up"]
            )

        await until(reported, "the reason")
        assert await running.ready(), "the other engine serves"
        running.hub.report_crash_loop("engine-1", "engine-1 does not come up")

        async def refused() -> bool:
            return not await running.ready()

        await until(refused, "the loss of readiness")
        error = error_of(await running.client.get("/health/ready"), 503, "not_ready")
        assert "engine-0 does not" in error["message"]
        assert "engine-1 does not" in error["message"]
        running.hub.report_crash_loop("engine-0", None)
        await until(running.ready, "readiness")
