"""Answers to clients when engines are full, slow, failing, draining or missing."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from budgetformer.cost.table import StepCost
from budgetformer.tokenization import TextEncoder
from service.engine.core import EngineOptions
from service.keys import Caller
from tests.support.serving import Service, error_of, held, poison, service
from tests.support.stores import HEADS, LABELS, sentences
from tests.support.waiting import until

TEXT = sentences("music")[0]
OTHERS = sentences("weather")[:3]
COMPUTED = {"heads": 1}
"""The options of a request that only an engine can answer."""


async def begin(fresh: Service, given: Any, **fields: Any) -> asyncio.Task[Any]:
    """Send a request, and return as soon as an engine has it."""
    before = fresh.in_flight()
    count = len(given) if isinstance(given, list) else 1
    task = asyncio.create_task(fresh.ask(given, **fields))
    await until(lambda: fresh.in_flight() >= before + count or task.done(), "arrival at the engine")
    return task


def multiply_expected_costs(fresh: Service, factor: float) -> None:
    """Multiply the expected costs of the engine by a factor."""
    for model in fresh.core.models.values():
        steps = tuple(StepCost(*(factor * x for x in astuple(step))) for step in model.costs.steps)
        fresh.core.prices.set_table(model.key, replace(model.costs, steps=steps))


class TestFullQueue:
    @pytest.fixture
    def small(self) -> EngineOptions:
        return EngineOptions(max_queue_items=3)

    async def test_requests_that_do_not_fit_are_refused_with_retry_after(
        self, model_store: Path, small: EngineOptions
    ) -> None:
        async with service(model_store, options=small, models=["topics"]) as fresh:
            with held(fresh.core):
                first = await begin(fresh, [TEXT] * 2, **COMPUTED)
                refused = await fresh.ask([TEXT] * 2, **COMPUTED)
                error_of(refused, 429, "queue_full")
                fitting = await begin(fresh, TEXT, **COMPUTED)
            assert (await first).status_code == 200
            assert (await fitting).status_code == 200
            metrics = await fresh.scrape()
            assert metrics.total("rejected_total", reason="queue_full") == 1
            assert metrics.by("outcome", "requests_total", route="/classify") == {
                "ok": 2,
                "rejected": 1,
            }

    async def test_an_idle_engine_accepts_a_request_larger_than_the_queue(
        self, model_store: Path, small: EngineOptions
    ) -> None:
        async with service(model_store, options=small, models=["topics"]) as fresh:
            assert len((await fresh.answer([TEXT] * 10))["data"]) == 10

    async def test_frontends_refuse_requests_that_no_engine_has_room_for(
        self, model_store: Path, small: EngineOptions
    ) -> None:
        async with service(
            model_store, options=small, models=["topics"], max_queue_items=3
        ) as fresh:
            admission, caller = fresh.app.state.shared.admission, Caller("test", {"classify"})
            with admission.texts(caller, "topics", 2, None, 10.0):
                error_of(await fresh.ask([TEXT] * 2, **COMPUTED), 429, "queue_full")
                assert (await fresh.ask(TEXT, **COMPUTED)).status_code == 200
            assert (await fresh.ask([TEXT] * 10)).status_code == 200

    async def test_the_queue_of_one_model_leaves_room_for_others(self, model_store: Path) -> None:
        options = EngineOptions(model_queue_items={"topics": 2})
        async with service(model_store, options=options, models=["topics", "tags"]) as fresh:
            with held(fresh.core):
                first = await begin(fresh, [TEXT] * 2, **COMPUTED)
                error_of(await fresh.ask(TEXT, **COMPUTED), 429, "queue_full")
                other = await begin(fresh, [TEXT] * 3, model="tags", **COMPUTED)
            assert (await first).status_code == (await other).status_code == 200
            assert (await fresh.ask(TEXT, **COMPUTED)).status_code == 200

    async def test_requests_are_accepted_again_after_the_queue_was_full(
        self, model_store: Path, small: EngineOptions
    ) -> None:
        async with service(model_store, options=small, models=["topics"]) as fresh:
            with held(fresh.core):
                first = await begin(fresh, [TEXT] * 3, **COMPUTED)
                error_of(await fresh.ask(TEXT, **COMPUTED), 429, "queue_full")
            await first
            assert (await fresh.ask(TEXT, **COMPUTED)).status_code == 200


class TestDeadlines:
    async def test_a_passed_deadline_is_a_504(self, fresh: Service) -> None:
        multiply_expected_costs(fresh, 1e-9)  # otherwise 1 ms can be refused on arrival
        with held(fresh.core):
            error = error_of(await fresh.ask(TEXT, timeout_ms=1, **COMPUTED), 504)
        assert error["param"] == "timeout_ms"
        metrics = await fresh.scrape()
        assert metrics.total("deadline_exceeded_total") == 1
        assert metrics.by("outcome", "requests_total", route="/classify") == {"timeout": 1}

    async def test_waiting_items_are_dropped_at_their_deadline(self, fresh: Service) -> None:
        multiply_expected_costs(fresh, 1e-9)
        with held(fresh.core):
            running = await begin(fresh, TEXT, **COMPUTED)
            late = await begin(fresh, OTHERS, timeout_ms=1, **COMPUTED)
            error_of(await late, 504)
            await until(lambda: fresh.in_flight() == 1, "the drop")
        assert (await running).status_code == 200
        metrics = await fresh.scrape()
        assert metrics.total("items_total") == metrics.total("batch_items_sum") == 1

    async def test_a_deadline_that_cannot_be_met_is_refused_immediately(
        self, fresh: Service
    ) -> None:
        multiply_expected_costs(fresh, 1e9)
        error_of(await fresh.ask(TEXT, **COMPUTED), 429, "deadline")
        metrics = await fresh.scrape()
        assert metrics.total("rejected_total", reason="deadline") == 1
        assert metrics.by("outcome", "requests_total", route="/classify") == {"rejected": 1}

    async def test_timeout_ms_is_the_default_deadline(self, model_store: Path) -> None:
        async with service(model_store, models=["topics"], timeout_ms=1) as fresh:
            multiply_expected_costs(fresh, 1e-9)
            with held(fresh.core):
                error_of(await fresh.ask(TEXT, **COMPUTED), 504)


class TestBrownOut:
    @pytest.fixture
    def low_threshold(self) -> EngineOptions:
        return EngineOptions(brownout_seconds=1e-9)

    async def test_overload_lowers_the_default_quality_and_answers_state_it(
        self, model_store: Path, low_threshold: EngineOptions
    ) -> None:
        async with service(model_store, options=low_threshold, models=["topics"]) as fresh:
            with held(fresh.core):
                first = await begin(fresh, TEXT, **COMPUTED)
                second = await begin(fresh, TEXT, **COMPUTED)
                engines = fresh.app.state.shared.engines
                await until(lambda: engines.level == "fast", "word of the lower level")
                lowered = await fresh.ask(TEXT)
            usual, _ = await first, await second
            assert usual.headers["x-quality"] == "balanced"
            assert usual.json()["data"][0]["quality"] == "auto"
            assert lowered.headers["x-quality"] == "fast"
            assert lowered.json()["data"][0]["quality"] == "fast"

    async def test_the_metric_shows_the_lower_level(
        self, model_store: Path, low_threshold: EngineOptions
    ) -> None:
        async with service(model_store, options=low_threshold, models=["topics"]) as fresh:
            with held(fresh.core):
                tasks = [await begin(fresh, TEXT, **COMPUTED) for _ in range(2)]
                fresh.hub.watch(0, fresh.core.heartbeat(0))
                assert (await fresh.scrape()).total("quality_level", model="topics") == 1
            await asyncio.gather(*tasks)

    async def test_a_requested_quality_is_kept(
        self, model_store: Path, low_threshold: EngineOptions
    ) -> None:
        async with service(model_store, options=low_threshold, models=["topics"]) as fresh:
            with held(fresh.core):
                tasks = [await begin(fresh, TEXT, quality="best") for _ in range(3)]
            for task in tasks:
                assert (await task).json()["data"][0]["quality"] == "best"

    async def test_the_quality_is_not_lowered_below_the_floor(self, model_store: Path) -> None:
        with_floor = EngineOptions(brownout_seconds=1e-9, quality_floor="balanced")
        async with service(model_store, options=with_floor, models=["topics"]) as fresh:
            with held(fresh.core):
                tasks = [await begin(fresh, TEXT, **COMPUTED) for _ in range(3)]
            for task in tasks:
                assert (await task).headers["x-quality"] == "balanced"


class TestLatencyTarget:
    async def test_with_enough_time_the_quality_is_best(self, fresh: Service) -> None:
        response = await fresh.ask(TEXT, target_ms=60_000)
        assert response.json()["data"][0]["quality"] == "best"

    async def test_with_too_little_time_the_quality_is_fast(self, fresh: Service) -> None:
        multiply_expected_costs(fresh, 1000.0)
        response = await fresh.ask(TEXT, target_ms=1, timeout_ms=3_600_000)
        assert response.headers["x-quality"] == "fast"

    async def test_target_ms_cannot_be_combined_with_a_quality(self, fresh: Service) -> None:
        response = await fresh.ask(TEXT, target_ms=10, quality="best")
        error_of(response, 422, "invalid_field", "target_ms")


async def test_a_single_text_is_answered_beside_a_large_request(fresh: Service) -> None:
    with held(fresh.core):
        large = await begin(fresh, [TEXT] * 600)
        single = await begin(fresh, TEXT)
    assert (await single).status_code == 200
    assert (await large).status_code == 200


class TestWithoutAnEngine:
    async def test_without_engines_only_step_0_and_metadata_are_available(
        self, model_store: Path
    ) -> None:
        async with service(model_store, engines=0, models=["topics"]) as alone:
            error_of(await alone.ask(TEXT, **COMPUTED), 503, "engine_down")
            assert (await alone.item(TEXT, heads=0))["heads"]["budget"] == 0
            error_of(await alone.client.get("/health/ready"), 503, "not_ready")
            assert (await alone.client.get("/health/live")).status_code == 200
            assert (await alone.client.get("/health")).status_code == 503
            assert (await alone.client.get("/metrics")).status_code == 200
            assert (await alone.client.get("/v1/models")).status_code == 200
            metrics = await alone.scrape()
            assert metrics.total("requests_total", route="/classify", outcome="error") == 1

    async def test_invalid_requests_are_reported_as_invalid(self, model_store: Path) -> None:
        async with service(model_store, engines=0, models=["topics"]) as alone:
            error_of(await alone.ask([]), 422)
            error_of(await alone.ask(TEXT, model="nothing"), 404)

    async def test_a_model_that_no_engine_has_is_loading(self, model_store: Path) -> None:
        async with service(model_store, models=["topics"]) as fresh:
            await fresh.hub.fleet.unload(("topics", 2))
            await until(lambda: not fresh.app.state.shared.engines.models, "the engine's word")
            error_of(await fresh.ask(TEXT, **COMPUTED), 503, "loading", "model")
            error_of(await fresh.client.get("/health/ready"), 503, "not_ready")

    async def test_an_empty_store_has_no_model(self, tmp_path: Path) -> None:
        async with service(tmp_path, wait=False, default_model=None) as empty:
            error_of(await empty.ask(TEXT), 503, "no_model")
            error_of(await empty.client.get("/health/ready"), 503, "not_ready")


async def test_draining_refuses_new_requests_and_finishes_running_ones(fresh: Service) -> None:
    with held(fresh.core):
        begun = await begin(fresh, TEXT, **COMPUTED)
        fresh.app.state.shared.admission.draining = True
        error_of(await fresh.ask(TEXT), 503, "draining")
        error_of(await fresh.client.get("/health/ready"), 503, "not_ready")
        assert (await fresh.client.get("/health/live")).status_code == 200
    assert (await begun).status_code == 200
    assert (await fresh.scrape()).total("rejected_total", reason="draining") == 1


class TestFailingItems:
    """Items whose computation fails, selected by their number of tokens."""

    @pytest.fixture
    def others(self) -> list[str]:
        return OTHERS

    @pytest.mark.parametrize("how", ["raise", "nan"])
    async def test_only_the_failing_item_has_an_error(
        self, fresh: Service, others: list[str], how: str
    ) -> None:
        bad = "cellist " * 20
        network = fresh.core.models["topics", 2].network
        tokens = (await fresh.item(bad))["tokens"]
        expected = [(await fresh.item(text, heads=HEADS))["probs"] for text in others]
        with poison(network, tokens, how):
            answer = await fresh.answer([others[0], bad, *others[1:]], heads=HEADS)
        failed = answer["data"].pop(1)
        assert set(failed) == {"index", "error"}
        assert failed["index"] == 1
        assert set(failed["error"]) == {"message", "type", "param", "code"}
        assert failed["error"]["param"] == "input[1]"
        assert "text of the item" not in failed["error"]["message"]
        assert [item["index"] for item in answer["data"]] == [0, 2, 3]
        for item, probs in zip(answer["data"], expected, strict=True):
            assert item["probs"] == pytest.approx(probs, rel=1e-4)
        assert answer["usage"]["heads_used"] == 3 * HEADS * 2
        assert answer["usage"]["heads_total"] == 3 * HEADS * 2
        metrics = await fresh.scrape()
        assert metrics.total("requests_total", route="/classify", outcome="partial") == 1
        assert metrics.total("items_total", budget=HEADS) == len(expected) + len(others)

    @pytest.mark.parametrize("how", ["raise", "nan"])
    async def test_other_requests_of_the_batch_are_answered(
        self, fresh: Service, others: list[str], how: str
    ) -> None:
        bad = "cellist " * 20
        tokens = (await fresh.item(bad))["tokens"]
        with poison(fresh.core.models["topics", 2].network, tokens, how):
            with held(fresh.core):
                tasks = [await begin(fresh, text, heads=HEADS) for text in [others[0], bad]]
            good, failed = [await task for task in tasks]
        assert good.status_code == 200
        error_of(failed, 500, "item_failed")

    async def test_a_single_failing_text_is_a_500_without_details(self, fresh: Service) -> None:
        tokens = (await fresh.item(TEXT))["tokens"]
        with poison(fresh.core.models["topics", 2].network, tokens, "raise"):
            error = error_of(await fresh.ask(TEXT, heads=1), 500, "item_failed")
        assert "text of the item" not in error["message"]
        assert (await fresh.ask(TEXT, heads=1)).status_code == 200


class Browser:
    """A client at the level of ASGI that can disconnect."""

    def __init__(self, fresh: Service, body: bytes, whole: bool = True) -> None:
        self.sent: list[dict[str, Any]] = []
        self._fresh = fresh
        self._disconnected = asyncio.Event()
        self._parts = [{"type": "http.request", "body": body, "more_body": not whole}]

    def disconnect(self) -> None:
        self._disconnected.set()

    async def run(self) -> None:
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": "/classify",
            "raw_path": b"/classify",
            "root_path": "",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
            "client": ("127.0.0.1", 1),
            "server": ("service", 80),
        }
        await self._fresh.app(scope, self._receive, self._send)

    async def _receive(self) -> dict[str, Any]:
        if self._parts:
            return self._parts.pop()
        await self._disconnected.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        self.sent.append(dict(message))


class TestDisconnect:
    async def test_waiting_items_of_a_disconnected_client_are_dropped(self, fresh: Service) -> None:
        with held(fresh.core):
            running = await begin(fresh, TEXT, **COMPUTED)
            browser = Browser(fresh, json.dumps({"input": OTHERS, **COMPUTED}).encode())
            visit = asyncio.create_task(browser.run())
            await until(lambda: fresh.in_flight() == 1 + len(OTHERS), "arrival at the engine")
            browser.disconnect()
            await visit
            await until(lambda: fresh.in_flight() == 1, "the drop")
        assert (await running).status_code == 200
        assert browser.sent == []
        metrics = await fresh.scrape()
        assert metrics.total("cancelled_total") == 1
        assert metrics.by("outcome", "requests_total", route="/classify") == {
            "ok": 1,
            "cancelled": 1,
        }
        assert metrics.total("items_total") == 1

    async def test_a_client_may_disconnect_during_the_computation(self, fresh: Service) -> None:
        browser = Browser(fresh, json.dumps({"input": OTHERS, **COMPUTED}).encode())
        with held(fresh.core):
            visit = asyncio.create_task(browser.run())
            await until(lambda: fresh.in_flight() == len(OTHERS), "arrival at the engine")
            browser.disconnect()
            await visit
        assert (await fresh.item(TEXT))["label"] in LABELS
        assert (await fresh.scrape()).total("cancelled_total") == 1

    async def test_a_client_may_disconnect_while_sending(self, fresh: Service) -> None:
        browser = Browser(fresh, b'{"input": ', whole=False)
        browser.disconnect()
        await browser.run()
        metrics = await fresh.scrape()
        assert metrics.by("outcome", "requests_total", route="/classify") == {"cancelled": 1}


async def test_an_unexpected_error_is_a_500_without_details(
    fresh: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("the inside of the server")

    monkeypatch.setattr(TextEncoder, "encode", broken)
    error = error_of(await fresh.ask(TEXT), 500, "internal_error")
    assert "inside" not in error["message"]
    monkeypatch.undo()
    metrics = await fresh.scrape()
    assert metrics.by("outcome", "requests_total", route="/classify") == {"error": 1}


async def test_the_total_size_of_arriving_bodies_is_limited(model_store: Path) -> None:
    go_on = asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield b" " * 900
        await go_on.wait()
        yield b'{"input": "a"}'

    async with service(model_store, models=["topics"], max_body_bytes=1000) as running:
        admission = running.app.state.shared.admission

        async def ask() -> httpx.Response:
            return await running.client.post("/classify", content=body())

        begun = [asyncio.create_task(ask()) for _ in range(17)]
        await until(lambda: admission.body_bytes == 17 * 900, "bodies under way")
        error_of(await ask(), 429, "queue_full")
        go_on.set()
        assert {(await task).status_code for task in begun} == {200}
        assert admission.body_bytes == 0
        assert (await ask()).status_code == 200
