"""The answer cache of the frontends, through HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pytest
import pytest_asyncio
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from service.engine.core import EngineOptions
from service.http.accept import ARROW
from service.telemetry.otel import Tracing
from tests.support.serving import ADMIN, Service, error_of, held, poison, service
from tests.support.stores import CHAINED, HEADS, PAIRS, PICKY, TAGS, TOPICS, labelled_sentences
from tests.support.waiting import until
from tests.unit.service.test_keys import key

TEXTS = [text for text, _ in labelled_sentences()][:12]
TEXT, OTHER = TEXTS[:2]
LONG = "the otter slept " * 30
PAIR = {"text": TEXT, "text_pair": OTHER}
TENSOR = {"name": "text", "shape": [2], "datatype": "BYTES", "data": [TEXT, LONG]}
IDS = {"name": "input_ids", "shape": [1, 2], "datatype": "INT64", "data": [2, 3]}
JSON = {"Accept": "application/json"}
DIALECTS: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "classify": ("/classify", {"input": [TEXT, LONG, PAIR]}, JSON),
    "several labels": ("/classify", {"input": TEXTS, "model": TAGS}, JSON),
    "pairs": ("/classify", {"input": [PAIR], "model": PAIRS, "quality": "best"}, JSON),
    "heads by input": ("/classify", {"input": TEXTS, "model": PICKY}, JSON),
    "a chain": ("/classify", {"input": TEXTS, "model": CHAINED, "quality": 1.5}, JSON),
    "fixed heads": ("/classify", {"input": TEXTS, "heads": HEADS, "top_k": 1}, JSON),
    "arrow": ("/classify", {"input": TEXTS}, {"Accept": ARROW}),
    "infinity": ("/classify", {"input": TEXTS, "raw_scores": False}, JSON),
    "text embeddings inference": ("/predict", {"inputs": [[TEXT], [LONG]]}, JSON),
    "hugging face": ("/", {"inputs": [TEXT], "parameters": {"top_k": 2}}, JSON),
    "sagemaker": ("/invocations", {"input": TEXTS, "max_heads": 1}, JSON),
    "kserve": (f"/v2/models/{TOPICS}/infer", {"inputs": [TENSOR]}, JSON),
}


def caching(store: Path, **settings: Any) -> AbstractAsyncContextManager[Service]:
    # On a busy machine the level could fall otherwise.
    chosen: dict[str, Any] = {"answer_cache_mib": 1, "quality_floor": "balanced", **settings}
    return service(store, **chosen)


@pytest_asyncio.fixture
async def cached(model_store: Path) -> AsyncIterator[Service]:
    async with caching(model_store, models=[TOPICS]) as running:
        yield running


def outcome(response: httpx.Response) -> str | None:
    assert response.status_code == 200, response.text
    found: str | None = response.headers.get("x-cache")
    return found


def content(response: httpx.Response) -> Any:
    """Return the content of an answer without the fields that differ between requests."""
    if response.headers["content-type"] == ARROW:
        return pa.ipc.open_stream(response.content).read_all().to_pylist()
    body = response.json()
    if isinstance(body, dict):
        body = {name: value for name, value in body.items() if name not in ("id", "created")}
    return body


async def test_cached_answers_equal_computed_ones_in_every_dialect(model_store: Path) -> None:
    async with caching(model_store) as running:
        shared = running.app.state.shared
        for name, (path, body, headers) in DIALECTS.items():
            for model in shared.models.served.values():
                shared.cache.forget(model)
            before, again = [
                await running.client.post(path, json=body, headers=headers) for _ in range(2)
            ]
            assert (outcome(before), outcome(again)) == ("miss", "hit"), name
            assert content(again) == content(before), name
            assert again.headers["x-quality"] == before.headers["x-quality"], name


async def test_nothing_is_cached_by_default(fresh: Service) -> None:
    for _ in range(2):
        assert outcome(await fresh.ask(TEXT)) is None
    shown = await fresh.scrape()
    assert shown.total("cache_hits_total") == shown.total("cache_misses_total") == 0
    assert shown.total("cache_bytes") == 0


async def test_only_new_texts_are_computed(cached: Service) -> None:
    fields: dict[str, Any] = {"heads": HEADS}
    (old,) = (await cached.answer(TEXT, **fields))["data"]
    response = await cached.ask([OTHER, TEXT, TEXTS[2]], **fields)
    assert outcome(response) == "partial"
    items = response.json()["data"]
    assert [item["index"] for item in items] == [0, 1, 2]
    assert items[1] == old | {"index": 1}
    fresh = [await cached.item(text, max_heads=HEADS, **fields) for text in (OTHER, TEXTS[2])]
    for item, alone in zip((items[0], items[2]), fresh, strict=True):
        assert item["probs"] == pytest.approx(alone["probs"], rel=1e-4)
    shown = await cached.scrape()
    assert shown.total("cache_hits_total", model=TOPICS, version=2) == 1
    assert shown.total("cache_misses_total", model=TOPICS, version=2) == 5
    assert shown.total("items_total") == shown.total("item_tokens_count") == 6
    assert shown.total("items_expected_total") == 6
    assert shown.total("request_heads_count") == 5
    assert shown.total("heads_used_total") == 5 * old["heads"]["used"]
    computed = [old, items[0], items[2], *fresh]
    assert shown.total("macs_total") == sum(item["macs"] for item in computed)
    assert shown.total("dense_macs_total") == sum(item["dense_macs"] for item in computed)
    assert shown.total("cache_bytes") > 0


async def test_cached_answers_need_no_engine(cached: Service) -> None:
    await cached.ask(TEXTS, heads=HEADS)
    with held(cached.core):
        assert outcome(await cached.ask(TEXTS[::-1], heads=HEADS)) == "hit"


@pytest.mark.parametrize("fields", [{"return_heads": True}, {"target_ms": 5000}], ids=str)
async def test_requests_with_some_fields_bypass_the_cache(
    cached: Service, fields: dict[str, Any]
) -> None:
    assert outcome(await cached.ask(TEXT)) == "miss"
    assert outcome(await cached.ask(TEXT, **fields)) is None


async def test_token_inputs_bypass_the_cache(cached: Service) -> None:
    for _ in range(2):
        response = await cached.client.post(f"/v2/models/{TOPICS}/infer", json={"inputs": [IDS]})
        assert outcome(response) is None


async def test_auto_shares_the_cached_answers_of_the_level_in_force(model_store: Path) -> None:
    """A cached answer of a lower level is not used while a higher level is in force."""
    options = EngineOptions(brownout_seconds=1e-9)
    async with caching(model_store, models=[TOPICS], options=options) as running:
        assert outcome(await running.ask(TEXT, quality="fast")) == "miss"
        assert outcome(await running.ask(TEXT, quality="auto")) == "miss"
        assert outcome(await running.ask(TEXT, quality="balanced")) == "hit"
        assert outcome(await running.ask(TEXT)) == "hit"
        engines = running.app.state.shared.engines
        with held(running.core):
            waiting = []
            for text in TEXTS[2:4]:
                waiting.append(asyncio.create_task(running.ask(text, heads=HEADS)))
                await until(lambda: running.in_flight() == len(waiting), "arrival at the engine")
            await until(lambda: engines.level == "fast", "the lower level")
            lowered = await running.ask(TEXT)
            assert (outcome(lowered), lowered.headers["x-quality"]) == ("hit", "fast")
            named = await running.ask(TEXT, quality="balanced")
            assert (outcome(named), named.headers["x-quality"]) == ("hit", "balanced")
        assert {(await task).status_code for task in waiting} == {200}


async def test_errors_number_texts_as_in_the_request_although_some_are_cached(
    cached: Service,
) -> None:
    await cached.ask([TEXT, OTHER])
    refused = {"truncate": False}
    error_of(await cached.ask([TEXT, OTHER, LONG], **refused), 422, "text_too_long", "input[2]")
    await cached.ask(LONG)
    error_of(await cached.ask([TEXT, LONG], **refused), 422, "text_too_long", "input[1]")


async def test_failed_items_are_not_cached(cached: Service) -> None:
    bad = "cellist " * 20
    tokens = (await cached.item(bad, heads=1))["tokens"]
    await cached.ask(TEXT, heads=HEADS)
    with poison(cached.core.models[TOPICS, 2].network, tokens, "raise"):
        answer = await cached.answer([TEXT, OTHER, bad], heads=HEADS)
    assert answer["data"][2]["error"]["param"] == "input[2]"
    response = await cached.ask([TEXT, OTHER, bad], heads=HEADS)
    assert outcome(response) == "partial"
    assert all("error" not in item for item in response.json()["data"])
    assert (await cached.scrape()).total("model_items_failed_total") == 1


async def test_the_answers_of_a_version_are_dropped_with_it(store: Path) -> None:
    async with caching(store, models=["topics:1"]) as running:
        cache = running.app.state.shared.cache
        first = await running.answer(TEXT)
        for version in (2, 1):
            path = f"/models/{TOPICS}/load"
            await running.client.post(path, json={"version": version}, headers=ADMIN)
            await until(lambda: not len(cache), "the end of the old version's requests")
            assert outcome(await running.ask(TEXT)) == "miss"
        assert (await running.answer(TEXT))["data"] == first["data"]
        assert len(cache) == 1
        await running.client.post(f"/models/{TOPICS}/unload", headers=ADMIN)
        await until(lambda: not len(cache), "the end of the model's requests")
        assert (await running.scrape()).total("cache_bytes") == 0


@pytest.mark.parametrize(("apart", "second"), [(False, "hit"), (True, "miss")])
async def test_the_cache_can_be_separate_for_each_key(
    model_store: Path, apart: bool, second: str
) -> None:
    keys = {name: key(f"{name}-secret") for name in ("one", "two")}
    chosen: dict[str, Any] = {"keys": keys, "admin_key": None, "answer_cache_per_key": apart}
    async with caching(model_store, models=[TOPICS], **chosen) as running:

        async def ask(caller: str) -> str | None:
            headers = {"X-API-Key": f"{caller}-secret"}
            body = {"input": TEXT}
            return outcome(await running.client.post("/classify", json=body, headers=headers))

        assert [await ask(caller) for caller in ("one", "one", "two", "two")] == [
            "miss", "hit", second, "hit",
        ]  # fmt: skip


async def test_each_frontend_has_its_own_cache(model_store: Path) -> None:
    async with caching(model_store, models=[TOPICS], fronts=2) as running:
        (other,) = running.other_clients
        assert outcome(await running.ask(TEXT)) == "miss"
        one = (await running.scrape()).total("cache_bytes")
        assert outcome(await other.post("/classify", json={"input": TEXT})) == "miss"
        await other.get("/metrics")
        assert (await running.scrape()).total("cache_bytes") == 2 * one


async def test_traces_contain_cache_hits_and_misses(model_store: Path) -> None:
    exporter = InMemorySpanExporter()
    frontend = Tracing(exporter, "frontend", at_once=True)
    async with caching(model_store, models=[TOPICS], tracer_provider=frontend.provider) as running:
        await running.ask(TEXT)
        await running.ask([TEXT, OTHER])
        await running.ask([TEXT, OTHER])
    frontend.close()
    spans = exporter.get_finished_spans()
    requests = [dict(span.attributes or {}) for span in spans if span.name == "POST /classify"]
    counts = [(r["budgetformer.cache_hits"], r["budgetformer.cache_misses"]) for r in requests]
    assert counts == [(0, 1), (1, 1), (2, 0)]
    assert len([span for span in spans if span.name == "tokenize"]) == 2
