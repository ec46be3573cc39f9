"""Models: listing, cards, tokenizing, loading, unloading, the admin key, polling of the store."""

from __future__ import annotations

import asyncio
import gc
import json
import shutil
import threading
import time
import weakref
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from structlog.testing import capture_logs

from budgetformer.checkpoint.store import read_checkpoint
from budgetformer.tokenization import Text, TextEncoder, Tokens
from service.control.poll import StorePoll
from service.http import state
from tests.support.serving import ADMIN, ADMIN_KEY, Service, error_of, held, service
from tests.support.stores import (
    CHAIN,
    CHAINED,
    EXIT_TOKENS,
    HEADS,
    LABELS,
    LAYERS,
    MAX_TOKENS,
    PAIRS,
    PANICS,
    PICKY,
    TAGS,
    TOPICS,
    sentences,
    sign,  # fmt: skip
)
from tests.support.waiting import until

TEXT = sentences("animals")[0]


class TestList:
    pytestmark = pytest.mark.asyncio(loop_scope="session")

    async def test_the_list_has_the_format_of_openai(self, shared: Service) -> None:
        body = (await shared.client.get("/v1/models")).json()
        assert body["object"] == "list"
        assert [model["id"] for model in body["data"]] == [CHAINED, PAIRS, PICKY, TAGS, TOPICS]
        for model in body["data"]:
            assert model["object"] == "model"
            assert model["owned_by"]
        assert body["data"][-1]["version"] == 2
        assert [model["id"] for model in body["data"] if model["default"]] == [TOPICS]

    async def test_the_card_of_a_model(self, shared: Service) -> None:
        card = (await shared.client.get("/models/topics")).json()
        assert card["name"] == "topics"
        assert card["version"] == 2
        assert card["versions"] == [1, 2]
        assert card["labels"] == list(LABELS)
        assert card["problem_type"] == "single_label_classification"
        assert (card["layers"], card["heads_per_layer"]) == (LAYERS, HEADS)
        assert (card["max_tokens"], card["exit_tokens"]) == (MAX_TOKENS, EXIT_TOKENS)
        assert card["ready"] is True
        assert set(card["quality_levels"]) == {"fast", "balanced", "best"}
        for level in card["quality_levels"].values():
            assert 0 < level["accuracy"] <= 1
            assert level["macs_share"] > 0
            assert "mean_heads" in level

    async def test_the_card_of_a_model_with_a_chain(
        self, shared: Service, model_store: Path
    ) -> None:
        card = (await shared.client.get(f"/models/{CHAINED}")).json()
        policy = read_checkpoint(model_store / CHAINED / "1").manifest.policy
        assert policy is not None
        assert (card["measure"], card["chain"]) == ("agreement", list(CHAIN))
        assert card["exit_margin"] == 0
        assert card["entry"] == [{"upto": band.upto, "step": band.step} for band in policy.entry]
        levels = card["quality_levels"]
        assert list(levels) == ["fast", "balanced", "best"]
        for name, level in levels.items():
            expected = policy.level(name)
            assert level["threshold"] == expected.threshold
            assert level["agreement"] == expected.agreement
            assert level["agreement_interval"] == list(expected.agreement_interval or ())
            assert level["accuracy"] is None
            assert level["macs_interval"] == [0.05, 0.6]
            assert level["budgets"] == {str(k): v for k, v in expected.budgets.items()}
            assert sum(level["budgets"].values()) == pytest.approx(1)

    @pytest.mark.parametrize(
        ("name", "kind", "step_0"),
        [
            (TAGS, "multi_label_classification", True),
            (PAIRS, "single_label_classification", True),
            (PICKY, "single_label_classification", False),
        ],
    )
    async def test_cards_state_problem_type_and_step_0(
        self, shared: Service, name: str, kind: str, step_0: bool
    ) -> None:
        card = (await shared.client.get(f"/models/{name}")).json()
        assert (card["problem_type"], card["step_0"]) == (kind, step_0)

    async def test_unknown_models_have_no_card(self, shared: Service) -> None:
        error_of(await shared.client.get("/models/nothing"), 404, "unknown_model", "model")


class TestTokenize:
    pytestmark = pytest.mark.asyncio(loop_scope="session")

    async def tokens(self, shared: Service, given: Any, **fields: Any) -> list[dict[str, Any]]:
        response = await shared.client.post("/tokenize", json={"input": given, **fields})
        assert response.status_code == 200
        data = response.json()["data"]
        assert isinstance(data, list)
        return data

    async def test_tokens_ids_and_count(self, shared: Service) -> None:
        (item,) = await self.tokens(shared, TEXT)
        assert item["tokens"][0] == "[CLS]"
        assert item["tokens"][-1] == "[SEP]"
        assert item["count"] == len(item["tokens"]) == len(item["ids"])
        assert item["truncated"] is False

    async def test_counts_equal_those_of_classify(self, shared: Service) -> None:
        given = [TEXT, "", "otter " * 100]
        counts = [item["count"] for item in await self.tokens(shared, given)]
        assert counts == [item["tokens"] for item in (await shared.answer(given))["data"]]

    async def test_long_texts_are_truncated(self, shared: Service) -> None:
        (item,) = await self.tokens(shared, "otter " * 100)
        assert (item["truncated"], item["count"]) == (True, MAX_TOKENS)

    async def test_pairs_have_two_separators(self, shared: Service) -> None:
        (item,) = await self.tokens(shared, {"text": TEXT, "text_pair": TEXT}, model=PAIRS)
        assert item["tokens"].count("[SEP]") == 2


class TestChoiceOfModels:
    async def test_only_the_configured_models_are_served(self, model_store: Path) -> None:
        async with service(model_store, models=["tags", "topics"], engines=0) as some:
            listed = (await some.client.get("/v1/models")).json()["data"]
            assert [model["id"] for model in listed] == ["tags", "topics"]
            error_of(await some.ask(TEXT, model="pairs"), 404, "unknown_model")

    async def test_a_version_can_be_pinned(self, model_store: Path) -> None:
        async with service(model_store, models=["topics:1"]) as pinned:
            assert (await pinned.answer(TEXT))["model"] == "topics:1"

    async def test_the_default_is_the_first_by_name(self, model_store: Path) -> None:
        chosen = {"models": ["topics", "tags"], "default_model": None}
        async with service(model_store, **chosen) as some:
            assert (await some.answer(TEXT))["model"] == "tags:1"

    async def test_a_model_that_is_not_in_the_store_is_reported(self, model_store: Path) -> None:
        async with service(model_store, models=["topics", "nothing"]) as some:
            errors = (await some.client.get("/health")).json()["errors"]
            assert any("nothing" in error for error in errors)
            assert (await some.ask(TEXT)).status_code == 200


class TestBrokenCheckpoints:
    @pytest.mark.parametrize(
        ("file", "content"),
        [
            ("manifest.json", b"{"),
            ("config.json", b"{"),
            ("tokenizer.json", b"{}"),
            ("model.safetensors", b"nonsense"),
        ],
    )
    async def test_a_broken_checkpoint_is_reported_and_others_are_served(
        self, store: Path, file: str, content: bytes
    ) -> None:
        broken = store / PAIRS / "1" / file
        broken.write_bytes(content)
        async with service(store, wait=False) as running:
            await until(running.ready, "readiness")
            assert (await running.ask(TEXT)).status_code == 200

            async def reported() -> bool:
                errors = (await running.client.get("/health")).json()["errors"]
                return any(str(broken) in error and "\n" not in error for error in errors)

            await until(reported, "the report")
            response = await running.ask(TEXT, model=PAIRS)
            assert response.status_code in (404, 503)

    async def test_if_the_newest_version_is_broken_the_one_before_is_served(
        self, store: Path
    ) -> None:
        (store / TOPICS / "2" / "manifest.json").write_text("{")
        async with service(store) as running:
            assert (await running.answer(TEXT))["model"] == "topics:1"

    async def test_others_are_served_if_the_default_model_is_broken(self, store: Path) -> None:
        (store / PAIRS / "1" / "model.safetensors").write_bytes(b"nonsense")
        async with service(store, wait=False, default_model=None) as running:

            async def served() -> bool:
                return (await running.ask(TEXT, model=TOPICS)).status_code == 200

            await until(served, "the sound model")


@pytest_asyncio.fixture
async def version_1(store: Path) -> AsyncIterator[Service]:
    """Return a service that started with topics:1, before version 2 was in its store."""
    newer = store / TOPICS / "2"
    newer.rename(store / "away")
    async with service(store, models=[TOPICS]) as running:
        (store / "away").rename(newer)
        yield running


async def health_part(running: Service, part: str) -> Any:
    """Return a part of `/health`, after the frontend has received everything from the hub."""
    await running.client.get("/metrics")
    await asyncio.sleep(0)
    return (await running.client.get("/health")).json()[part]


async def load(running: Service, name: str = TOPICS, **body: Any) -> httpx.Response:
    return await running.client.post(f"/models/{name}/load", json=body or None, headers=ADMIN)


def edit_tokenizer(folder: Path, **parts: Any) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | parts))
    sign(folder)


class TestTokenizerThatPanics:
    async def test_a_panic_while_loading_refuses_the_load(
        self, version_1: Service, store: Path
    ) -> None:
        edit_tokenizer(store / TOPICS / "2", model=PANICS)
        error = error_of(await load(version_1), 422, "broken_checkpoint")
        assert "tokenizer.json" in error["message"]
        assert (await version_1.answer(TEXT))["model"] == "topics:1"

    async def test_a_panic_at_a_text_only_fails_its_request(
        self, version_1: Service, store: Path
    ) -> None:
        edit_tokenizer(store / TOPICS / "2", pre_tokenizer={"type": "FixedLength", "length": 0})
        assert (await load(version_1)).status_code == 200
        for path, texts, param in (
            ("/classify", ["", TEXT], "input[1]"),
            ("/classify", TEXT, "input[0]"),
            ("/tokenize", [TEXT], "input[0]"),
        ):
            response = await version_1.client.post(path, json={"input": texts})
            error = error_of(response, 500, "item_failed", param)
            assert TEXT not in error["message"]
        assert (await version_1.ask("")).status_code == 200

    async def test_the_error_numbers_the_text_although_others_are_cached(self, store: Path) -> None:
        edit_tokenizer(store / TOPICS / "2", pre_tokenizer={"type": "FixedLength", "length": 0})
        async with service(store, models=[TOPICS], answer_cache_mib=1) as running:
            assert (await running.ask("")).headers["x-cache"] == "miss"
            error_of(await running.ask(["", TEXT]), 500, "item_failed", "input[1]")


class TestLoad:
    @pytest.mark.parametrize(
        "where",
        ["service.engine.core.load_model", "service.control.catalog.Catalog.candidate"],
    )
    async def test_any_error_is_answered_and_the_old_version_stays(
        self, version_1: Service, monkeypatch: pytest.MonkeyPatch, where: str
    ) -> None:
        def fail(*_: Any) -> None:
            raise MemoryError

        with monkeypatch.context() as patch:
            patch.setattr(where, fail)
            error = error_of(await load(version_1), 422, "broken_checkpoint")
        assert "MemoryError" in error["message"]
        assert (await version_1.answer(TEXT))["model"] == "topics:1"
        assert (await load(version_1)).status_code == 200

    async def test_a_failing_load_is_only_tried_in_one_engine(
        self, store: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tried = []

        def fail(path: Path, *_: Any) -> None:
            tried.append(path)
            raise MemoryError

        async with service(store, engines=2, models=[TOPICS]) as running:
            with monkeypatch.context() as patch:
                patch.setattr("service.engine.core.load_model", fail)
                error_of(await load(running, PAIRS), 422, "broken_checkpoint")
            assert tried == [store / PAIRS / "1"]
            assert (await load(running, PAIRS)).status_code == 200
            assert all((PAIRS, 1) in core.models for core in running.cores)

    async def test_load_serves_the_highest_version(self, version_1: Service) -> None:
        assert (await version_1.answer(TEXT))["model"] == "topics:1"
        response = await load(version_1)
        assert response.status_code == 200
        assert response.json()["model"] == "topics:2"
        assert (await version_1.answer(TEXT))["model"] == "topics:2"
        error_of(await version_1.ask(TEXT, model="topics:1"), 404)
        assert set(version_1.core.models) == {("topics", 2)}

    async def test_an_older_version_can_be_loaded_again(self, version_1: Service) -> None:
        before = await version_1.item(TEXT)
        await load(version_1, version=2)
        assert (await load(version_1, version=1)).status_code == 200
        assert (await version_1.item(TEXT))["probs"] == before["probs"]

    async def test_the_served_version_can_be_loaded_again(self, version_1: Service) -> None:
        assert (await load(version_1, version=1)).status_code == 200
        assert (await version_1.answer(TEXT))["model"] == "topics:1"

    async def test_another_model_can_be_loaded(self, version_1: Service) -> None:
        error_of(await version_1.ask(TEXT, model=PAIRS), 404)
        assert (await load(version_1, PAIRS)).status_code == 200
        assert (await version_1.answer(TEXT, model=PAIRS))["model"] == "pairs:1"
        assert (await version_1.answer(TEXT))["model"] == "topics:1"

    async def test_a_running_request_is_finished_by_its_version(self, version_1: Service) -> None:
        with held(version_1.core):
            running_request = asyncio.create_task(version_1.ask(TEXT, heads=1))
            await until(lambda: version_1.in_flight() == 1, "arrival at the engine")
            assert (await load(version_1)).status_code == 200
        assert (await running_request).json()["model"] == "topics:1"
        assert (await version_1.answer(TEXT))["model"] == "topics:2"

    async def test_a_request_in_tokenization_survives_a_change_of_version(
        self, version_1: Service, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        entered, gate = threading.Event(), threading.Event()
        steps = TextEncoder.steps

        def slow(encoder: TextEncoder, texts: list[Text]) -> Iterator[list[Tokens]]:
            entered.set()
            gate.wait(60)
            yield from steps(encoder, texts)

        monkeypatch.setattr(state, "SHORT_CHARACTERS", 0)
        monkeypatch.setattr(TextEncoder, "steps", slow)
        running_request = asyncio.create_task(version_1.ask(TEXT))
        await until(entered.is_set, "the tokenizer")
        changing = asyncio.create_task(load(version_1))
        await until(
            lambda: changing.done() or ("topics", 2) in version_1.core.models,
            "the new version",
        )
        gate.set()
        assert (await running_request).status_code == 200
        assert (await changing).status_code == 200

    async def test_requests_succeed_while_versions_change(self, version_1: Service) -> None:
        async def ask_on() -> list[int]:
            statuses = []
            while not changed.done():
                statuses.append((await version_1.ask(TEXT)).status_code)
            return statuses

        async def change() -> None:
            for version in (2, 1, 2):
                assert (await load(version_1, version=version)).status_code == 200

        changed = asyncio.create_task(change())
        statuses = await asyncio.gather(ask_on(), ask_on())
        await changed
        assert set(sum(statuses, [])) == {200}

    @pytest.mark.parametrize(
        ("file", "content"),
        [
            ("manifest.json", b"{"),
            ("config.json", b"{}"),
            ("tokenizer.json", b"{}"),
            ("model.safetensors", b"nonsense"),
        ],
    )
    async def test_a_broken_version_leaves_the_old_one_serving(
        self, version_1: Service, store: Path, file: str, content: bytes
    ) -> None:
        before = await version_1.item(TEXT)
        broken = store / TOPICS / "2" / file
        broken.write_bytes(content)
        error = error_of(await load(version_1), 422, "broken_checkpoint")
        assert str(broken) in error["message"]
        assert "\n" not in error["message"]
        assert (await version_1.item(TEXT))["probs"] == before["probs"]
        assert await version_1.ready()
        assert set(version_1.core.models) == {("topics", 1)}

    @pytest.mark.parametrize("name", ["nothing", "..", "%2e%2e", "..%2f..", ".3.work"])
    async def test_unknown_models_cannot_be_loaded(self, version_1: Service, name: str) -> None:
        assert (await load(version_1, name)).status_code == 404

    async def test_unknown_versions_cannot_be_loaded(self, version_1: Service) -> None:
        error_of(await load(version_1, version=9), 404, "unknown_model", "model")

    @pytest.mark.parametrize("body", [{"version": "1"}, {"version": 1.5}, {"vresion": 1}])
    async def test_invalid_fields_are_refused(
        self, version_1: Service, body: dict[str, Any]
    ) -> None:
        error_of(await load(version_1, TOPICS, **body), 422, param=next(iter(body)))

    async def test_a_body_without_content_length_is_accepted(self, version_1: Service) -> None:
        async def body() -> AsyncIterator[bytes]:
            yield b'{"version": 1}'

        response = await version_1.client.post("/models/topics/load", content=body(), headers=ADMIN)
        assert response.json()["model"] == "topics:1"

    async def test_concurrent_loads_succeed_or_conflict(self, version_1: Service) -> None:
        responses = await asyncio.gather(load(version_1), load(version_1))
        for response in responses:
            assert response.status_code in (200, 409), response.text
        assert (await version_1.answer(TEXT))["model"] == "topics:2"

    async def test_metrics_describe_the_new_version(self, version_1: Service) -> None:
        await version_1.item(TEXT)
        await load(version_1)
        scraped = await version_1.scrape()
        (info,) = scraped.select("model_info", model=TOPICS)
        assert info.labels["version"] == "2"
        assert scraped.total("items_total", version=1) == 1
        assert scraped.total("items_total", version=2) == 0
        (loaded,) = scraped.select("model_load_seconds", model=TOPICS)
        assert loaded.labels["version"] == "2"


class TestUnload:
    async def unload(self, running: Service, name: str = TOPICS) -> httpx.Response:
        return await running.client.post(f"/models/{name}/unload", headers=ADMIN)

    async def test_an_unloaded_model_is_no_longer_served(self, version_1: Service) -> None:
        await load(version_1, PAIRS)
        assert (await self.unload(version_1, PAIRS)).status_code == 200
        error_of(await version_1.ask(TEXT, model=PAIRS), 404)
        error_of(await version_1.client.get("/models/pairs"), 404)
        assert (await version_1.ask(TEXT)).status_code == 200
        assert set(version_1.core.models) == {("topics", 1)}
        assert not (await version_1.scrape()).select("model_info", model=PAIRS)

    async def test_an_unloaded_model_can_be_loaded_again(self, version_1: Service) -> None:
        await self.unload(version_1)
        assert (await load(version_1)).status_code == 200
        assert (await version_1.answer(TEXT))["model"] == "topics:2"

    async def test_without_its_default_model_the_service_is_not_ready(
        self, version_1: Service
    ) -> None:
        assert (await self.unload(version_1)).status_code == 200
        error_of(await version_1.client.get("/health/ready"), 503)
        assert (await version_1.client.get("/health")).status_code == 503
        assert (await version_1.ask(TEXT)).status_code in (404, 503)

    async def test_the_memory_of_an_unloaded_model_is_freed(self, version_1: Service) -> None:
        await version_1.item(TEXT, heads=2)
        (loaded,) = (weakref.ref(model) for model in version_1.core.models.values())
        assert (await self.unload(version_1)).status_code == 200
        await until(lambda: not version_1.core.models, "the engine to let go")

        def freed() -> bool:
            gc.collect()  # does nothing while another thread collects
            return loaded() is None

        await until(freed, "its memory")

    async def test_running_requests_are_finished(self, version_1: Service) -> None:
        with held(version_1.core):
            running_request = asyncio.create_task(version_1.ask(TEXT, heads=1))
            await until(lambda: version_1.in_flight() == 1, "arrival at the engine")
            assert (await self.unload(version_1)).status_code == 200
        assert (await running_request).status_code == 200

    async def test_unknown_models_cannot_be_unloaded(self, version_1: Service) -> None:
        error_of(await self.unload(version_1, "nothing"), 404)


class TestLoadThatHangs:
    """A load that never ends fails after its time limit, and other changes are made."""

    @pytest.mark.parametrize(
        "where",
        ["service.engine.core.load_model", "service.control.catalog.Catalog.candidate"],
    )
    async def test_a_hanging_load_times_out_and_later_ones_succeed(
        self, store: Path, monkeypatch: pytest.MonkeyPatch, where: str
    ) -> None:
        gate = threading.Event()

        def hang(*_: Any) -> None:
            gate.wait(60)
            raise OSError

        async with service(store, models=["topics:1"], load_timeout_seconds=2.0) as running:
            with monkeypatch.context() as patch:
                patch.setattr(where, hang)
                for _ in range(2):
                    response = await load(running, version=2)
                    status = response.status_code
                    assert status == 504 or (status, where) == (
                        422,
                        "service.engine.core.load_model",
                    )
                    error_of(response, status)
            assert (await load(running, PAIRS)).status_code == 200
            assert (await running.answer(TEXT))["model"] == "topics:1"
            assert (await running.client.get("/health")).json()["errors"] == []
            gate.set()

            async def loaded() -> bool:
                return (await load(running, version=2)).status_code == 200

            await until(loaded, "the same version, once the hung load has ended")
            assert (await running.answer(TEXT))["model"] == "topics:2"

    async def test_the_number_of_waiting_changes_is_limited(
        self, version_1: Service, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("service.control.hub.MAX_CHANGES", 3)
        async with version_1.hub.deployment.changing:
            waiting = [asyncio.create_task(load(version_1)) for _ in range(4)]
            await until(lambda: version_1.hub._changes == 4, "the changes")
            error_of(await load(version_1), 503, "busy")
        assert {(await task).status_code for task in waiting} == {200}


class TestRetiredVersions:
    async def test_series_of_retired_versions_are_removed_later(self, store: Path) -> None:
        async def versions() -> set[str]:
            scraped = await version_1.scrape()
            names = ("items_total", "model_requests_total", "model_request_duration_seconds_count")
            found = [{sample.labels["version"] for sample in scraped.select(n)} for n in names]
            assert found[0] == found[1] == found[2]
            return found[0]

        async with service(store, models=["topics:1"], retired_series_seconds=60) as version_1:
            await version_1.ask(TEXT)
            for version in (2, 1, 2):
                assert (await load(version_1, version=version)).status_code == 200
            await version_1.ask(TEXT)
            assert await versions() == {"1", "2"}
            now = time.monotonic()
            version_1.hub.deployment.forget_retired(now + 30)
            assert await versions() == {"1", "2"}
            version_1.hub.deployment.forget_retired(now + 90)
            assert await versions() == {"2"}
            scraped = await version_1.scrape()
            assert scraped.total("items_total", version="2") == 1
            assert scraped.total("model_requests_total", version="2") == 1
            await version_1.client.post(f"/models/{TOPICS}/unload", headers=ADMIN)
            version_1.hub.deployment.forget_retired(now + 90)
            assert 'model="' not in (await version_1.client.get("/metrics")).text

    async def test_the_number_of_retired_versions_is_limited(
        self, version_1: Service, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("service.control.deployment.MAX_RETIRED", 0)
        for version in (2, 1, 2):
            assert (await load(version_1, version=version)).status_code == 200
            version_1.hub.deployment.forget_retired(time.monotonic())
            scraped = await version_1.scrape()
            versions = {sample.labels["version"] for sample in scraped.select("items_total")}
            assert versions == {str(version)}


class TestAdminKey:
    pytestmark = pytest.mark.asyncio(loop_scope="session")

    @pytest.mark.parametrize("path", ["/models/topics/load", "/models/topics/unload"])
    @pytest.mark.parametrize(
        "headers",
        [
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": f"Basic {ADMIN_KEY}"},
            {"Authorization": ADMIN_KEY},
            {"Authorization": "Bearer"},
            {"Authorization": f"Bearer {ADMIN_KEY} "},
            {"Authorization": f"Bearer {ADMIN_KEY[:-1]}"},
            {"X-API-Key": "wrong"},
            {"X-API-Key": ""},
        ],
        ids=json.dumps,
    )
    async def test_missing_and_wrong_keys_are_refused(
        self, shared: Service, path: str, headers: dict[str, str]
    ) -> None:
        if headers.get("Authorization", "").endswith(" "):
            pytest.skip("white space around a header's value means nothing")
        response = await shared.client.post(path, headers=headers)
        error_of(response, 401)
        assert response.headers["www-authenticate"] == "Bearer"
        assert ADMIN_KEY not in response.text
        assert (await shared.ask(TEXT)).status_code == 200

    @pytest.mark.parametrize(
        "headers", [ADMIN, {"X-API-Key": ADMIN_KEY}, {"authorization": f"bearer {ADMIN_KEY}"}]
    )
    async def test_the_admin_key_is_accepted(
        self, shared: Service, headers: dict[str, str]
    ) -> None:
        response = await shared.client.post("/models/nothing/load", headers=headers)
        error_of(response, 404)

    async def test_without_the_key_unknown_models_are_not_revealed(self, shared: Service) -> None:
        error_of(await shared.client.post("/models/nothing/load"), 401)

    async def test_invalid_bytes_are_a_wrong_key(self, shared: Service) -> None:
        headers = [(b"x-api-key", b"\xff\xfe")]
        error_of(await shared.client.post("/models/topics/load", headers=headers), 401)

    async def test_without_an_admin_key_models_cannot_be_changed(self, model_store: Path) -> None:
        async with service(model_store, engines=0, admin_key=None) as closed:
            for headers in ({}, {"Authorization": "Bearer "}, ADMIN):
                response = await closed.client.post("/models/topics/load", headers=headers)
                error_of(response, 401)


async def test_checkpoints_added_later_can_be_loaded(store: Path) -> None:
    async with service(store, models=[TOPICS]) as running:
        third = store / TOPICS / "3"
        shutil.copytree(store / TOPICS / "1", third)
        manifest = json.loads((third / "manifest.json").read_text())
        (third / "manifest.json").write_text(json.dumps(manifest | {"version": 3}))
        card = (await running.client.get("/models/topics")).json()
        assert (card["version"], card["versions"]) == (2, [1, 2, 3])
        assert (await load(running)).json()["model"] == "topics:3"


class TestPolling:
    """Polling of the store by a server that started with topics:1."""

    def add_version(self, store: Path, version: int) -> Path:
        folder = store / TOPICS / str(version)
        shutil.copytree(store / TOPICS / "1", store / "away")
        manifest = json.loads((store / "away" / "manifest.json").read_text())
        (store / "away" / "manifest.json").write_text(json.dumps(manifest | {"version": version}))
        (store / "away").rename(folder)
        return folder

    async def test_a_new_higher_version_is_served(self, version_1: Service, store: Path) -> None:
        poll = StorePoll(version_1.hub, [TOPICS])
        await poll.look()
        assert (await version_1.answer(TEXT))["model"] == "topics:2"
        self.add_version(store, 3)
        await poll.look()
        assert (await version_1.answer(TEXT))["model"] == "topics:3"

    async def test_a_version_loaded_by_hand_stays_until_a_new_one_is_added(
        self, version_1: Service, store: Path
    ) -> None:
        poll = StorePoll(version_1.hub, [TOPICS])
        await poll.look()
        await load(version_1, version=1)
        await poll.look()
        assert (await version_1.answer(TEXT))["model"] == "topics:1"
        self.add_version(store, 3)
        await poll.look()
        assert (await version_1.answer(TEXT))["model"] == "topics:3"

    async def test_a_broken_version_is_tried_again_after_a_change(
        self, version_1: Service, store: Path
    ) -> None:
        poll = StorePoll(version_1.hub, [TOPICS])
        weights = store / TOPICS / "2" / "model.safetensors"
        sound = weights.read_bytes()
        weights.write_bytes(sound[: len(sound) // 2])
        with capture_logs() as lines:
            await poll.look()
            await poll.look()
        refusals = [line for line in lines if line["event"] == "new version rejected"]
        assert len(refusals) == 1
        assert (await version_1.answer(TEXT))["model"] == "topics:1"
        weights.write_bytes(sound)
        await poll.look()
        assert (await version_1.answer(TEXT))["model"] == "topics:2"

    @pytest.mark.parametrize(
        ("names", "served"),
        [([TOPICS], {TOPICS}), ([], {TOPICS, PAIRS}), (["topics:1"], {TOPICS})],
        ids=["one", "all", "pinned"],
    )
    async def test_only_configured_models_are_updated(
        self, version_1: Service, names: list[str], served: set[str]
    ) -> None:
        await StorePoll(version_1.hub, names).look()
        assert set(version_1.hub.catalog.served) == served
        pinned = names == ["topics:1"]
        assert version_1.hub.catalog.served[TOPICS].version == (1 if pinned else 2)

    async def test_a_missing_store_is_reported_and_serving_continues(
        self, version_1: Service, store: Path
    ) -> None:
        poll = StorePoll(version_1.hub, ["topics:1"])
        store.rename(store.with_name("gone"))
        with capture_logs() as lines:
            for _ in range(3):
                await poll.look()
        (line,) = lines
        assert (line["event"], line["source"]) == ("problem reported", "store")
        assert line["reason"].startswith(str(store))
        assert await health_part(version_1, "errors") == [line["reason"]]
        store.with_name("gone").rename(store)
        await poll.look()
        assert await health_part(version_1, "errors") == []
        assert (await version_1.ask(TEXT)).status_code == 200
