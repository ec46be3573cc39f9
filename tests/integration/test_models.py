"""The models that are served, loading and unloading them, and their tokens."""

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

    async def test_as_openais(self, shared: Service) -> None:
        body = (await shared.client.get("/v1/models")).json()
        assert body["object"] == "list"
        assert [model["id"] for model in body["data"]] == [CHAINED, PAIRS, PICKY, TAGS, TOPICS]
        for model in body["data"]:
            assert model["object"] == "model"
            assert model["owned_by"]
        assert body["data"][-1]["version"] == 2
        assert [model["id"] for model in body["data"] if model["default"]] == [TOPICS]

    async def test_a_card(self, shared: Service) -> None:
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

    async def test_a_card_of_a_chain(self, shared: Service, model_store: Path) -> None:
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
    async def test_cards_of_other_kinds(
        self, shared: Service, name: str, kind: str, step_0: bool
    ) -> None:
        card = (await shared.client.get(f"/models/{name}")).json()
        assert (card["problem_type"], card["step_0"]) == (kind, step_0)

    async def test_a_card_of_nothing(self, shared: Service) -> None:
        error_of(await shared.client.get("/models/nothing"), 404, "unknown_model", "model")


class TestTokenize:
    pytestmark = pytest.mark.asyncio(loop_scope="session")

    async def tokens(self, shared: Service, given: Any, **fields: Any) -> list[dict[str, Any]]:
        response = await shared.client.post("/tokenize", json={"input": given, **fields})
        assert response.status_code == 200
        data = response.json()["data"]
        assert isinstance(data, list)
        return data

    async def test_tokens_and_count(self, shared: Service) -> None:
        (item,) = await self.tokens(shared, TEXT)
        assert item["tokens"][0] == "[CLS]"
        assert item["tokens"][-1] == "[SEP]"
        assert item["count"] == len(item["tokens"]) == len(item["ids"])
        assert item["truncated"] is False

    async def test_counts_are_those_of_classify(self, shared: Service) -> None:
        given = [TEXT, "", "otter " * 100]
        counts = [item["count"] for item in await self.tokens(shared, given)]
        assert counts == [item["tokens"] for item in (await shared.answer(given))["data"]]

    async def test_a_long_text_is_cut(self, shared: Service) -> None:
        (item,) = await self.tokens(shared, "otter " * 100)
        assert (item["truncated"], item["count"]) == (True, MAX_TOKENS)

    async def test_pairs(self, shared: Service) -> None:
        (item,) = await self.tokens(shared, {"text": TEXT, "text_pair": TEXT}, model=PAIRS)
        assert item["tokens"].count("[SEP]") == 2


class TestPinning:
    async def test_some_models_only(self, model_store: Path) -> None:
        async with service(model_store, models=["tags", "topics"], engines=0) as some:
            listed = (await some.client.get("/v1/models")).json()["data"]
            assert [model["id"] for model in listed] == ["tags", "topics"]
            error_of(await some.ask(TEXT, model="pairs"), 404, "unknown_model")

    async def test_a_version_can_be_pinned(self, model_store: Path) -> None:
        async with service(model_store, models=["topics:1"]) as pinned:
            assert (await pinned.answer(TEXT))["model"] == "topics:1"

    async def test_the_first_by_name_is_the_default(self, model_store: Path) -> None:
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
    async def test_the_others_go_on_serving(self, store: Path, file: str, content: bytes) -> None:
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

    async def test_a_broken_newest_version_leaves_the_one_before(self, store: Path) -> None:
        (store / TOPICS / "2" / "manifest.json").write_text("{")
        async with service(store) as running:
            assert (await running.answer(TEXT))["model"] == "topics:1"

    async def test_a_broken_default_model_does_not_take_the_others_down(self, store: Path) -> None:
        (store / PAIRS / "1" / "model.safetensors").write_bytes(b"nonsense")
        async with service(store, wait=False, default_model=None) as running:

            async def served() -> bool:
                return (await running.ask(TEXT, model=TOPICS)).status_code == 200

            await until(served, "the sound model")


@pytest_asyncio.fixture
async def one(store: Path) -> AsyncIterator[Service]:
    """Return a service that started with topics:1, before version 2 came into its store."""
    newer = store / TOPICS / "2"
    newer.rename(store / "away")
    async with service(store, models=[TOPICS]) as running:
        (store / "away").rename(newer)
        yield running


async def shown(running: Service, part: str) -> Any:
    """Return a part of `/health`, once the frontend has heard all that the hub has said by now."""
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
    async def test_as_it_is_read_the_load_is_refused(self, one: Service, store: Path) -> None:
        edit_tokenizer(store / TOPICS / "2", model=PANICS)
        error = error_of(await load(one), 422, "broken_checkpoint")
        assert "tokenizer.json" in error["message"]
        assert (await one.answer(TEXT))["model"] == "topics:1"

    async def test_at_a_text_that_request_alone_fails(self, one: Service, store: Path) -> None:
        edit_tokenizer(store / TOPICS / "2", pre_tokenizer={"type": "FixedLength", "length": 0})
        assert (await load(one)).status_code == 200
        for path, texts, param in (
            ("/classify", ["", TEXT], "input[1]"),
            ("/classify", TEXT, "input[0]"),
            ("/tokenize", [TEXT], "input[0]"),
        ):
            response = await one.client.post(path, json={"input": texts})
            error = error_of(response, 500, "item_failed", param)
            assert TEXT not in error["message"]
        assert (await one.ask("")).status_code == 200

    async def test_it_is_named_by_its_place_beside_answers_that_were_kept(
        self, store: Path
    ) -> None:
        edit_tokenizer(store / TOPICS / "2", pre_tokenizer={"type": "FixedLength", "length": 0})
        async with service(store, models=[TOPICS], answer_cache_mib=1) as running:
            assert (await running.ask("")).headers["x-cache"] == "miss"
            error_of(await running.ask(["", TEXT]), 500, "item_failed", "input[1]")


class TestLoad:
    @pytest.mark.parametrize(
        "where",
        ["service.engine.core.load_model", "service.control.catalog.Catalog.candidate"],
    )
    async def test_whatever_goes_wrong_is_answered(
        self, one: Service, monkeypatch: pytest.MonkeyPatch, where: str
    ) -> None:
        def fail(*_: Any) -> None:
            raise MemoryError

        with monkeypatch.context() as patch:
            patch.setattr(where, fail)
            error = error_of(await load(one), 422, "broken_checkpoint")
        assert "MemoryError" in error["message"]
        assert (await one.answer(TEXT))["model"] == "topics:1"
        assert (await load(one)).status_code == 200

    async def test_what_cannot_be_loaded_is_tried_in_one_engine_alone(
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

    async def test_the_highest_version_takes_over(self, one: Service) -> None:
        assert (await one.answer(TEXT))["model"] == "topics:1"
        response = await load(one)
        assert response.status_code == 200
        assert response.json()["model"] == "topics:2"
        assert (await one.answer(TEXT))["model"] == "topics:2"
        error_of(await one.ask(TEXT, model="topics:1"), 404)
        assert set(one.core.models) == {("topics", 2)}

    async def test_and_back_again(self, one: Service) -> None:
        before = await one.item(TEXT)
        await load(one, version=2)
        assert (await load(one, version=1)).status_code == 200
        assert (await one.item(TEXT))["probs"] == before["probs"]

    async def test_the_same_version_again(self, one: Service) -> None:
        assert (await load(one, version=1)).status_code == 200
        assert (await one.answer(TEXT))["model"] == "topics:1"

    async def test_a_model_that_was_not_served(self, one: Service) -> None:
        error_of(await one.ask(TEXT, model=PAIRS), 404)
        assert (await load(one, PAIRS)).status_code == 200
        assert (await one.answer(TEXT, model=PAIRS))["model"] == "pairs:1"
        assert (await one.answer(TEXT))["model"] == "topics:1"

    async def test_what_was_begun_is_finished_by_the_version_it_came_for(
        self, one: Service
    ) -> None:
        with held(one.core):
            begun = asyncio.create_task(one.ask(TEXT, heads=1))
            await until(lambda: one.in_flight() == 1, "arrival at the engine")
            assert (await load(one)).status_code == 200
        assert (await begun).json()["model"] == "topics:1"
        assert (await one.answer(TEXT))["model"] == "topics:2"

    async def test_what_is_being_tokenized_while_versions_change_is_answered(
        self, one: Service, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        entered, gate = threading.Event(), threading.Event()
        steps = TextEncoder.steps

        def slow(encoder: TextEncoder, texts: list[Text]) -> Iterator[list[Tokens]]:
            entered.set()
            gate.wait(60)
            yield from steps(encoder, texts)

        monkeypatch.setattr(state, "SHORT_CHARACTERS", 0)
        monkeypatch.setattr(TextEncoder, "steps", slow)
        begun = asyncio.create_task(one.ask(TEXT))
        await until(entered.is_set, "the tokenizer")
        changing = asyncio.create_task(load(one))
        await until(lambda: changing.done() or ("topics", 2) in one.core.models, "the new version")
        gate.set()
        assert (await begun).status_code == 200
        assert (await changing).status_code == 200

    async def test_no_request_is_lost_while_versions_change(self, one: Service) -> None:
        async def ask_on() -> list[int]:
            statuses = []
            while not changed.done():
                statuses.append((await one.ask(TEXT)).status_code)
            return statuses

        async def change() -> None:
            for version in (2, 1, 2):
                assert (await load(one, version=version)).status_code == 200

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
    async def test_a_failure_leaves_the_old_one_serving(
        self, one: Service, store: Path, file: str, content: bytes
    ) -> None:
        before = await one.item(TEXT)
        broken = store / TOPICS / "2" / file
        broken.write_bytes(content)
        error = error_of(await load(one), 422, "broken_checkpoint")
        assert str(broken) in error["message"]
        assert "\n" not in error["message"]
        assert (await one.item(TEXT))["probs"] == before["probs"]
        assert await one.ready()
        assert set(one.core.models) == {("topics", 1)}

    @pytest.mark.parametrize("name", ["nothing", "..", "%2e%2e", "..%2f..", ".3.work"])
    async def test_what_the_store_does_not_have(self, one: Service, name: str) -> None:
        assert (await load(one, name)).status_code == 404

    async def test_a_version_that_the_store_does_not_have(self, one: Service) -> None:
        error_of(await load(one, version=9), 404, "unknown_model", "model")

    @pytest.mark.parametrize("body", [{"version": "1"}, {"version": 1.5}, {"vresion": 1}])
    async def test_a_wrong_field(self, one: Service, body: dict[str, Any]) -> None:
        error_of(await load(one, TOPICS, **body), 422, param=next(iter(body)))

    async def test_a_body_without_its_length_is_read(self, one: Service) -> None:
        async def body() -> AsyncIterator[bytes]:
            yield b'{"version": 1}'

        response = await one.client.post("/models/topics/load", content=body(), headers=ADMIN)
        assert response.json()["model"] == "topics:1"

    async def test_twice_at_once(self, one: Service) -> None:
        responses = await asyncio.gather(load(one), load(one))
        for response in responses:
            assert response.status_code in (200, 409), response.text
        assert (await one.answer(TEXT))["model"] == "topics:2"

    async def test_the_metrics_follow(self, one: Service) -> None:
        await one.item(TEXT)
        await load(one)
        shown = await one.scrape()
        (info,) = shown.select("model_info", model=TOPICS)
        assert info.labels["version"] == "2"
        assert shown.total("items_total", version=1) == 1
        assert shown.total("items_total", version=2) == 0
        (loaded,) = shown.select("model_load_seconds", model=TOPICS)
        assert loaded.labels["version"] == "2"


class TestUnload:
    async def unload(self, running: Service, name: str = TOPICS) -> httpx.Response:
        return await running.client.post(f"/models/{name}/unload", headers=ADMIN)

    async def test_it_is_gone(self, one: Service) -> None:
        await load(one, PAIRS)
        assert (await self.unload(one, PAIRS)).status_code == 200
        error_of(await one.ask(TEXT, model=PAIRS), 404)
        error_of(await one.client.get("/models/pairs"), 404)
        assert (await one.ask(TEXT)).status_code == 200
        assert set(one.core.models) == {("topics", 1)}
        assert not (await one.scrape()).select("model_info", model=PAIRS)

    async def test_and_can_be_loaded_again(self, one: Service) -> None:
        await self.unload(one)
        assert (await load(one)).status_code == 200
        assert (await one.answer(TEXT))["model"] == "topics:2"

    async def test_without_its_default_model_the_service_is_not_ready(self, one: Service) -> None:
        assert (await self.unload(one)).status_code == 200
        error_of(await one.client.get("/health/ready"), 503)
        assert (await one.client.get("/health")).status_code == 503
        assert (await one.ask(TEXT)).status_code in (404, 503)

    async def test_its_memory_is_freed(self, one: Service) -> None:
        await one.item(TEXT, heads=2)
        (loaded,) = (weakref.ref(model) for model in one.core.models.values())
        assert (await self.unload(one)).status_code == 200
        await until(lambda: not one.core.models, "the engine to let go")

        def freed() -> bool:
            gc.collect()  # does nothing while another thread collects
            return loaded() is None

        await until(freed, "its memory")

    async def test_what_was_begun_is_finished(self, one: Service) -> None:
        with held(one.core):
            begun = asyncio.create_task(one.ask(TEXT, heads=1))
            await until(lambda: one.in_flight() == 1, "arrival at the engine")
            assert (await self.unload(one)).status_code == 200
        assert (await begun).status_code == 200

    async def test_what_is_not_served(self, one: Service) -> None:
        error_of(await self.unload(one, "nothing"), 404)


class TestLoadThatHangs:
    """The store or a device may take for ever: the change fails, and others are made."""

    @pytest.mark.parametrize(
        "where",
        ["service.engine.core.load_model", "service.control.catalog.Catalog.candidate"],
    )
    async def test_the_change_fails_in_time_and_later_ones_are_made(
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

    async def test_no_more_changes_wait_than_a_bound(
        self, one: Service, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("service.control.hub.MAX_CHANGES", 3)
        async with one.hub.deployment.changing:
            waiting = [asyncio.create_task(load(one)) for _ in range(4)]
            await until(lambda: one.hub._changes == 4, "the changes")
            error_of(await load(one), 503, "busy")
        assert {(await task).status_code for task in waiting} == {200}


class TestRetiredVersions:
    async def test_their_series_are_removed_some_time_later(self, store: Path) -> None:
        async def versions() -> set[str]:
            shown = await one.scrape()
            names = ("items_total", "model_requests_total", "model_request_duration_seconds_count")
            found = [{sample.labels["version"] for sample in shown.select(n)} for n in names]
            assert found[0] == found[1] == found[2]
            return found[0]

        async with service(store, models=["topics:1"], retired_series_seconds=60) as one:
            await one.ask(TEXT)
            for version in (2, 1, 2):
                assert (await load(one, version=version)).status_code == 200
            await one.ask(TEXT)
            assert await versions() == {"1", "2"}
            now = time.monotonic()
            one.hub.deployment.forget_retired(now + 30)
            assert await versions() == {"1", "2"}
            one.hub.deployment.forget_retired(now + 90)
            assert await versions() == {"2"}
            shown = await one.scrape()
            assert shown.total("items_total", version="2") == 1
            assert shown.total("model_requests_total", version="2") == 1
            await one.client.post(f"/models/{TOPICS}/unload", headers=ADMIN)
            one.hub.deployment.forget_retired(now + 90)
            assert 'model="' not in (await one.client.get("/metrics")).text

    async def test_there_is_a_bound_on_how_many_are_kept(
        self, one: Service, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("service.control.deployment.MAX_RETIRED", 0)
        for version in (2, 1, 2):
            assert (await load(one, version=version)).status_code == 200
            one.hub.deployment.forget_retired(time.monotonic())
            shown = await one.scrape()
            versions = {sample.labels["version"] for sample in shown.select("items_total")}
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
    async def test_without_it(self, shared: Service, path: str, headers: dict[str, str]) -> None:
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
    async def test_with_it(self, shared: Service, headers: dict[str, str]) -> None:
        response = await shared.client.post("/models/nothing/load", headers=headers)
        error_of(response, 404)

    async def test_the_key_is_asked_for_before_anything_is_said(self, shared: Service) -> None:
        error_of(await shared.client.post("/models/nothing/load"), 401)

    async def test_odd_bytes_are_a_wrong_key(self, shared: Service) -> None:
        headers = [(b"x-api-key", b"\xff\xfe")]
        error_of(await shared.client.post("/models/topics/load", headers=headers), 401)

    async def test_a_server_without_a_key_is_closed(self, model_store: Path) -> None:
        async with service(model_store, engines=0, admin_key=None) as closed:
            for headers in ({}, {"Authorization": "Bearer "}, ADMIN):
                response = await closed.client.post("/models/topics/load", headers=headers)
                error_of(response, 401)


async def test_a_checkpoint_that_comes_later_is_found(store: Path) -> None:
    async with service(store, models=[TOPICS]) as running:
        third = store / TOPICS / "3"
        shutil.copytree(store / TOPICS / "1", third)
        manifest = json.loads((third / "manifest.json").read_text())
        (third / "manifest.json").write_text(json.dumps(manifest | {"version": 3}))
        card = (await running.client.get("/models/topics")).json()
        assert (card["version"], card["versions"]) == (2, [1, 2, 3])
        assert (await load(running)).json()["model"] == "topics:3"


class TestPolling:
    """A server that began with topics:1."""

    def bring(self, store: Path, version: int) -> Path:
        folder = store / TOPICS / str(version)
        shutil.copytree(store / TOPICS / "1", store / "away")
        manifest = json.loads((store / "away" / "manifest.json").read_text())
        (store / "away" / "manifest.json").write_text(json.dumps(manifest | {"version": version}))
        (store / "away").rename(folder)
        return folder

    async def test_a_higher_version_is_served(self, one: Service, store: Path) -> None:
        poll = StorePoll(one.hub, [TOPICS])
        await poll.look()
        assert (await one.answer(TEXT))["model"] == "topics:2"
        self.bring(store, 3)
        await poll.look()
        assert (await one.answer(TEXT))["model"] == "topics:3"

    async def test_what_was_put_back_by_hand_stays(self, one: Service, store: Path) -> None:
        poll = StorePoll(one.hub, [TOPICS])
        await poll.look()
        await load(one, version=1)
        await poll.look()
        assert (await one.answer(TEXT))["model"] == "topics:1"
        self.bring(store, 3)
        await poll.look()
        assert (await one.answer(TEXT))["model"] == "topics:3"

    async def test_a_broken_version_is_tried_again_when_it_has_changed(
        self, one: Service, store: Path
    ) -> None:
        poll = StorePoll(one.hub, [TOPICS])
        weights = store / TOPICS / "2" / "model.safetensors"
        sound = weights.read_bytes()
        weights.write_bytes(sound[: len(sound) // 2])
        with capture_logs() as lines:
            await poll.look()
            await poll.look()
        refusals = [line for line in lines if line["event"] == "new version rejected"]
        assert len(refusals) == 1
        assert (await one.answer(TEXT))["model"] == "topics:1"
        weights.write_bytes(sound)
        await poll.look()
        assert (await one.answer(TEXT))["model"] == "topics:2"

    @pytest.mark.parametrize(
        ("names", "served"),
        [([TOPICS], {TOPICS}), ([], {TOPICS, PAIRS}), (["topics:1"], {TOPICS})],
        ids=["one", "all", "pinned"],
    )
    async def test_models_that_were_not_asked_for_are_left_alone(
        self, one: Service, names: list[str], served: set[str]
    ) -> None:
        await StorePoll(one.hub, names).look()
        assert set(one.hub.catalog.served) == served
        pinned = names == ["topics:1"]
        assert one.hub.catalog.served[TOPICS].version == (1 if pinned else 2)

    async def test_a_store_that_went_away_is_reported_and_nothing_else(
        self, one: Service, store: Path
    ) -> None:
        poll = StorePoll(one.hub, ["topics:1"])
        store.rename(store.with_name("gone"))
        with capture_logs() as lines:
            for _ in range(3):
                await poll.look()
        (line,) = lines
        assert (line["event"], line["source"]) == ("problem reported", "store")
        assert line["reason"].startswith(str(store))
        assert await shown(one, "errors") == [line["reason"]]
        store.with_name("gone").rename(store)
        await poll.look()
        assert await shown(one, "errors") == []
        assert (await one.ask(TEXT)).status_code == 200
