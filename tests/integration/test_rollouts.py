"""Roll-outs of a new version: canary, shadow, promotion, rollback, automatic stop."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from service.control.poll import StorePoll
from service.settings import ModelSettings, RollOutSettings, Settings
from tests.support.serving import ADMIN, Service, _replaced, error_of, service
from tests.support.stores import TOPICS, labelled_sentences, sign
from tests.support.waiting import until

TEXTS = [text for text, _ in labelled_sentences()]
TEXT = TEXTS[0]


def copy_version(store: Path, version: int, like: int = 1) -> Path:
    """Copy a version in the store under another number."""
    away = store / "away"
    shutil.copytree(store / TOPICS / str(like), away)
    manifest = json.loads((away / "manifest.json").read_text())
    (away / "manifest.json").write_text(json.dumps(manifest | {"version": version}))
    return away.rename(store / TOPICS / str(version))


def swap_labels(folder: Path) -> None:
    """Rotate the outputs of a version, so that it answers with other labels."""
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    labels = len(json.loads((folder / "manifest.json").read_text())["labels"])
    turned = dict(tensors)
    for name, value in tensors.items():
        axis = next((at for at, size in enumerate(value.shape) if size == labels), None)
        if axis is not None:
            turned[name] = torch.roll(value, 1, axis).contiguous()
    assert any(not torch.equal(turned[name], tensors[name]) for name in tensors)
    save_file(turned, weights, {"format": "pt"})
    sign(folder)


@asynccontextmanager
async def serving(store: Path, tmp_path: Path, **settings: Any) -> AsyncIterator[Service]:
    """Run a service that serves topics:1, with a persistent state folder."""
    own: dict[str, Any] = {"models": [f"{TOPICS}:1"], "state_dir": tmp_path / "state"}
    async with service(store, **own | settings) as running:
        yield running


async def change(running: Service, action: str, **body: Any) -> httpx.Response:
    path = f"/models/{TOPICS}/{action}"
    return await running.client.post(path, json=body or None, headers=ADMIN)


async def roll_out(running: Service, **body: Any) -> dict[str, Any]:
    response = await change(running, "rollout", **body)
    assert response.status_code == 200, response.text
    return dict(response.json())


async def report(running: Service) -> dict[str, Any]:
    await running.client.get("/metrics")  # so that the hub has every count
    response = await running.client.get(f"/models/{TOPICS}/rollout", headers=ADMIN)
    assert response.status_code == 200, response.text
    return dict(response.json())


async def version_for(client: httpx.AsyncClient, name: str, **fields: Any) -> str:
    """Send a request with this id, and return the version that answered it."""
    headers = {"X-Request-Id": name}
    body = {"input": fields.pop("input", TEXT)} | fields
    response = await client.post("/classify", json=body, headers=headers)
    assert response.status_code == 200, response.text
    return str(response.json()["model"])


async def versions(running: Service, count: int = 200, **fields: Any) -> Counter[str]:
    """Count which versions answer requests without a version."""
    names = [f"request-{at}" for at in range(count)]
    return Counter([await version_for(running.client, name, **fields) for name in names])


class TestCanary:
    async def test_the_weight_is_the_share_of_requests(self, store: Path, tmp_path: Path) -> None:
        async with serving(store, tmp_path, fronts=2) as running:
            begun = await roll_out(running, version=2, weight=0.25)
            assert (begun["state"], begun["weight"]) == ("running", 0.25)
            names = [f"request-{at}" for at in range(400)]
            first = [await version_for(running.client, name) for name in names]
            assert 60 <= first.count("topics:2") <= 140
            again = [await version_for(running.other_clients[0], name) for name in names]
            assert again == first

            async def counted() -> bool:
                sides = [(await report(running))[side] for side in ("served", "candidate")]
                wanted = [2 * first.count(f"topics:{version}") for version in (1, 2)]
                return [side["requests"] for side in sides] == wanted

            await until(counted, "the requests of both frontends")

    @pytest.mark.parametrize(("weight", "version"), [(0.0, "topics:1"), (1.0, "topics:2")])
    async def test_a_request_can_name_its_version(
        self, store: Path, tmp_path: Path, weight: float, version: str
    ) -> None:
        async with serving(store, tmp_path) as running:
            await roll_out(running, weight=weight)
            assert await versions(running, 20) == {version: 20}
            for pinned in ("topics:1", "topics:2"):
                assert await version_for(running.client, "one", model=pinned) == pinned
            error_of(await running.ask(TEXT, model="topics:3"), 404, "unknown_model", "model")
            path = f"/v2/models/{TOPICS}/versions/2/ready"
            assert (await running.client.get(path)).status_code == 200

    async def test_the_candidate_is_listed_and_in_the_metrics(
        self, store: Path, tmp_path: Path
    ) -> None:
        async with serving(store, tmp_path) as running:
            await roll_out(running, weight=0.1, shadow=0.5)
            listed = (await running.client.get("/v1/models")).json()["data"]
            (model,) = [model for model in listed if model["id"] == TOPICS]
            assert model["version"] == 1
            assert model["candidate"] == {"version": 2, "weight": 0.1, "shadow": 0.5}
            metrics = await running.scrape()
            both = {"model": TOPICS, "version": "2"}
            assert metrics.total("rollout_weight", **both) == 0.1
            assert metrics.total("rollout_shadow", **both) == 0.5
            await change(running, "rollback")
            assert "budgetformer_rollout_weight{" not in (await running.client.get("/metrics")).text

    async def test_a_running_roll_out_can_be_changed(self, store: Path, tmp_path: Path) -> None:
        async with serving(store, tmp_path) as running:
            await roll_out(running, version=2, weight=0.0, min_agreement=0.7)
            found = await roll_out(running, weight=1.0)
            assert (found["weight"], found["min_agreement"]) == (1.0, 0.7)
            assert await versions(running, 20) == {"topics:2": 20}
            found = await roll_out(running, min_agreement=0.0)
            assert (found["weight"], found["min_agreement"]) == (1.0, 0.0)


class TestShadow:
    async def test_shadow_answers_are_compared_but_not_returned(
        self, store: Path, tmp_path: Path
    ) -> None:
        async with serving(store, tmp_path) as running:
            await roll_out(running, shadow=1.0)
            for at, text in enumerate(TEXTS):
                assert (
                    await version_for(running.client, f"r{at}", input=text, heads=1) == "topics:1"
                )

            async def compared() -> bool:
                texts: dict[str, int] = (await report(running))["shadow_texts"]
                return sum(texts.values()) == len(TEXTS)

            await until(compared, "every text in the figures")
            found, metrics = await report(running), await running.scrape()
            labels = [
                [(await running.item(text, model=f"topics:{v}", heads=1))["label"] for v in (1, 2)]
                for text in TEXTS
            ]
            same = sum(one == other for one, other in labels)
            assert found["shadow_texts"] == {
                name: count
                for name, count in (("agreed", same), ("differed", len(TEXTS) - same))
                if count
            }
            key = {"model": TOPICS, "version": "2"}
            assert metrics.total("shadow_items_total", **key, outcome="agreed") == same
            assert metrics.by("version", "items_total", model=TOPICS) == {"1": len(TEXTS)}
            assert found["agreement"] == pytest.approx(same / len(TEXTS), abs=1e-4)
            for side in ("served", "candidate"):
                assert found[side]["shadow_heads_per_text"] == 2.0
                assert found[side]["shadow_macs_per_text"] > 0
                assert found[side]["shadow_ms_per_text"] > 0

    async def test_requests_of_the_candidate_are_not_computed_twice(
        self, store: Path, tmp_path: Path
    ) -> None:
        async with serving(store, tmp_path) as running:
            await roll_out(running, weight=1.0, shadow=1.0)
            await versions(running, 30)
            assert (await report(running))["shadow_texts"] == {}

    async def test_shadow_is_a_share_of_the_other_requests(
        self, store: Path, tmp_path: Path
    ) -> None:
        async with serving(store, tmp_path) as running:
            await roll_out(running, weight=0.5, shadow=0.5)
            answered = await versions(running, 200)

            async def compared() -> bool:
                texts: dict[str, int] = (await report(running))["shadow_texts"]
                return 30 <= sum(texts.values()) <= answered["topics:1"] - 20

            await until(compared, "half of the others")

    async def test_texts_beyond_the_limit_are_skipped(
        self, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("service.pipeline.shadow.MAX_TEXTS", 3)
        async with serving(store, tmp_path) as running:
            await roll_out(running, shadow=1.0)
            assert (await running.ask([TEXT] * 4)).status_code == 200
            assert (await report(running))["shadow_texts"] == {"skipped": 4}


class TestEnd:
    async def test_promotion_can_be_rolled_back(self, store: Path, tmp_path: Path) -> None:
        async with serving(store, tmp_path) as running:
            await roll_out(running, weight=0.5)
            ended = (await change(running, "promote")).json()
            assert (ended["state"], ended["reason"]) == ("promoted", None)
            assert await versions(running, 20) == {"topics:2": 20}
            await until(lambda: set(running.core.models) == {(TOPICS, 2)}, "the first to be freed")
            back = (await change(running, "rollback")).json()
            assert back["state"] == "rolled_back"
            assert await versions(running, 20) == {"topics:1": 20}
            metrics = await running.scrape()
            for outcome in ("promoted", "rolled_back"):
                labels = {"model": TOPICS, "outcome": outcome}
                assert metrics.total("rollouts_ended_total", **labels) == 1
            error_of(await change(running, "rollback"), 409, "conflict")

    async def test_rollback_ends_the_roll_out(self, store: Path, tmp_path: Path) -> None:
        async with serving(store, tmp_path) as running:
            await roll_out(running, weight=1.0)
            assert (await change(running, "rollback")).json()["state"] == "rolled_back"
            assert await versions(running, 20) == {"topics:1": 20}
            await until(lambda: set(running.core.models) == {(TOPICS, 1)}, "the second to be freed")

    async def test_unloading_the_model_ends_the_roll_out(self, store: Path, tmp_path: Path) -> None:
        async with serving(store, tmp_path) as running:
            await roll_out(running, weight=0.5)
            assert (await change(running, "unload")).status_code == 200
            error_of(await running.ask(TEXT, model=TOPICS), 404)
            await until(lambda: not running.core.models, "both to be freed")
            assert (await change(running, "load", version=2)).status_code == 200
            found = await report(running)
            assert (found["state"], found["reason"]) == ("rolled_back", "the model was unloaded")

    async def test_requests_succeed_through_every_change(self, store: Path, tmp_path: Path) -> None:
        async with serving(store, tmp_path, fronts=2) as running:
            done, seen = asyncio.Event(), Counter[str]()

            async def ask(client: httpx.AsyncClient, caller: int) -> None:
                at = 0
                while not done.is_set():
                    at += 1
                    seen[
                        await version_for(client, f"{caller}-{at}", input=TEXTS[at % 9], heads=1)
                    ] += 1

            clients = [running.client, *running.other_clients]
            callers = [asyncio.create_task(ask(clients[at % 2], at)) for at in range(8)]
            for _ in range(3):
                await roll_out(running, version=2, weight=0.3, shadow=0.5)
                await roll_out(running, weight=0.8)
                assert (await change(running, "promote")).status_code == 200
                assert (await change(running, "rollback")).status_code == 200
                await roll_out(running, version=2, weight=0.5)
                assert (await change(running, "rollback")).status_code == 200
            done.set()
            await asyncio.gather(*callers)
            assert set(seen) == {"topics:1", "topics:2"}


class TestStop:
    """A roll-out stops automatically if the candidate exceeds its limits."""

    async def test_too_many_different_answers_stop_it(self, store: Path, tmp_path: Path) -> None:
        swap_labels(copy_version(store, 3))
        async with serving(store, tmp_path) as running:
            await roll_out(running, version=3, shadow=1.0, weight=0.2, min_agreement=0.9)

            async def stopped() -> bool:
                await versions(running, 10)
                return bool((await report(running))["state"] == "stopped")

            await until(stopped, "the stop")
            found = await report(running)
            assert "min_agreement 0.9" in found["reason"]
            assert found["agreement"] < 0.5
            assert await versions(running, 20) == {"topics:1": 20}
            await until(lambda: set(running.core.models) == {(TOPICS, 1)}, "it to be freed")
            labels = {"model": TOPICS, "outcome": "stopped"}
            metrics = await running.scrape()
            assert metrics.total("rollouts_ended_total", **labels) == 1

    async def test_failing_requests_stop_it(self, store: Path, tmp_path: Path) -> None:
        async with serving(store, tmp_path) as running:
            await roll_out(running, weight=0.5)

            def fail(*_: Any) -> None:
                raise RuntimeError("of this version")

            with _replaced(running.core.models[TOPICS, 2].network, run=fail, decide=fail):

                async def stopped() -> bool:
                    for at in range(5):
                        headers = {"X-Request-Id": f"{at}"}
                        body = {"input": TEXTS[at], "heads": 1}
                        await running.client.post("/classify", json=body, headers=headers)
                    return bool((await report(running))["state"] == "stopped")

                await until(stopped, "the stop")
            assert "requests failed" in (await report(running))["reason"]
            assert await versions(running, 20) == {"topics:1": 20}

    async def test_it_stops_even_if_the_state_cannot_be_written(
        self, store: Path, tmp_path: Path
    ) -> None:
        swap_labels(copy_version(store, 3))
        async with serving(store, tmp_path) as running:
            await roll_out(running, version=3, shadow=1.0, min_agreement=0.9)
            shutil.rmtree(tmp_path / "state")
            (tmp_path / "state").write_text("in the way")

            async def stopped() -> bool:
                await versions(running, 10)
                return bool((await report(running))["state"] == "stopped")

            await until(stopped, "the stop")
            errors = (await running.client.get("/health")).json()["errors"]
            assert any("rollouts.json" in line for line in errors)


class TestRestart:
    async def test_a_roll_out_continues_after_a_restart(self, store: Path, tmp_path: Path) -> None:
        async with serving(store, tmp_path, models=[TOPICS]) as running:
            assert (await change(running, "load", version=1)).status_code == 200
            await roll_out(running, version=2, weight=0.5, min_agreement=0.5)
            before = await versions(running, 50)
        async with serving(store, tmp_path, models=[TOPICS]) as running:
            found = await report(running)
            assert (found["state"], found["weight"]) == ("running", 0.5)
            assert found["candidate"]["requests"] == before["topics:2"]
            assert await versions(running, 50) == before

    @pytest.mark.parametrize(("end", "version"), [("promote", 2), ("rollback", 1)])
    async def test_the_outcome_holds_until_a_higher_version_is_added(
        self, store: Path, tmp_path: Path, end: str, version: int
    ) -> None:
        async with serving(store, tmp_path, models=[TOPICS]) as running:
            assert (await change(running, "load", version=1)).status_code == 200
            await roll_out(running, version=2)
            assert (await change(running, end)).status_code == 200
        async with serving(store, tmp_path, models=[TOPICS]) as running:
            assert await versions(running, 5) == {f"topics:{version}": 5}
            await StorePoll(running.hub, [TOPICS]).look()
            assert await versions(running, 5) == {f"topics:{version}": 5}
        copy_version(store, 3)
        async with serving(store, tmp_path, models=[TOPICS]) as running:
            assert await versions(running, 5) == {"topics:3": 5}

    async def test_a_missing_candidate_stops_the_roll_out(
        self, store: Path, tmp_path: Path
    ) -> None:
        async with serving(store, tmp_path) as running:
            await roll_out(running, weight=0.5)
        (store / TOPICS / "2").rename(tmp_path / "gone")
        async with serving(store, tmp_path) as running:
            assert (await report(running))["state"] == "stopped"
            assert await versions(running, 10) == {"topics:1": 10}

    async def test_a_damaged_state_file_is_reported(self, store: Path, tmp_path: Path) -> None:
        (tmp_path / "state").mkdir()
        (tmp_path / "state" / "rollouts.json").write_text('{"topics": 3}')
        async with serving(store, tmp_path) as running:
            (error,) = (await running.client.get("/health")).json()["errors"]
            assert "rollouts.json" in error
            await roll_out(running, weight=1.0)
            assert await versions(running, 5) == {"topics:2": 5}


class TestRefusals:
    async def test_changes_in_the_wrong_state_are_refused(
        self, store: Path, tmp_path: Path
    ) -> None:
        copy_version(store, 3)
        async with serving(store, tmp_path) as running:
            for action in ("promote", "rollback"):
                error_of(await change(running, action), 409, "conflict", "model")
            path = f"/models/{TOPICS}/rollout"
            error_of(await running.client.get(path, headers=ADMIN), 409, "conflict", "model")
            error_of(await change(running, "rollout", version=1), 422, "already_served", "model")
            error_of(await change(running, "rollout", version=9), 404, "unknown_model", "model")
            await roll_out(running, version=2)
            error_of(await change(running, "rollout", version=3), 409, "conflict", "model")
            error_of(await change(running, "load", version=3), 409, "conflict", "model")
            missing = await running.client.post("/models/none/rollout", headers=ADMIN)
            error_of(missing, 404, "unknown_model", "model")

    @pytest.mark.parametrize(
        "body",
        [
            {"weight": 1.1}, {"shadow": -0.1}, {"weight": "much"}, {"version": 0},
            {"max_latency_ratio": 0}, {"min_agreement": 2}, {"share": 0.5},
        ],
        ids=json.dumps,
    )  # fmt: skip
    async def test_invalid_fields_are_refused(
        self, store: Path, tmp_path: Path, body: dict[str, Any]
    ) -> None:
        async with serving(store, tmp_path) as running:
            error_of(await change(running, "rollout", **body), 422)
            assert set(running.core.models) == {(TOPICS, 1)}

    @pytest.mark.parametrize("action", ["rollout", "promote", "rollback"])
    async def test_the_admin_key_is_required(
        self, store: Path, tmp_path: Path, action: str
    ) -> None:
        async with serving(store, tmp_path) as running:
            error_of(await running.client.post(f"/models/{TOPICS}/{action}"), 401)
            error_of(await running.client.get(f"/models/{TOPICS}/rollout"), 401)

    async def test_an_unwritable_state_folder_refuses_roll_outs(
        self, store: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "state").write_text("in the way")
        async with serving(store, tmp_path) as running:
            error = error_of(await change(running, "rollout"), 503, "state_not_kept")
            assert "state_dir" in error["message"]
            await until(lambda: set(running.core.models) == {(TOPICS, 1)}, "it to be freed")
            assert await versions(running, 10) == {"topics:1": 10}


class TestSettings:
    def with_model_settings(self, running: Service, **own: Any) -> Settings:
        settings = running.hub.settings
        return settings.model_copy(update={"model_settings": {TOPICS: ModelSettings(**own)}})

    async def test_the_version_in_the_settings_promotes_and_rolls_back(
        self, store: Path, tmp_path: Path
    ) -> None:
        async with serving(store, tmp_path) as running:
            for version, state in ((2, "promoted"), (1, "promoted"), (1, "promoted")):
                await running.hub.configure(self.with_model_settings(running, version=version))
                name = f"topics:{version}"
                await until(lambda: _serves(running, name), f"{name} to be served")  # noqa: B023
                if version == 1:
                    await roll_out(running, version=2, weight=0.5)
                    await running.hub.configure(self.with_model_settings(running, version=2))
                    await until(lambda: _serves(running, "topics:2"), "the promotion")
                    assert (await report(running))["state"] == state
                    await running.hub.configure(self.with_model_settings(running))

    async def test_settings_are_the_defaults_of_a_roll_out(
        self, store: Path, tmp_path: Path
    ) -> None:
        own = RollOutSettings(weight=0.5, shadow=0.1, max_latency_ratio=3.0)
        settings = {"model_settings": {TOPICS: ModelSettings(rollout=own)}}
        async with serving(store, tmp_path, **settings) as running:
            found = await roll_out(running, weight=0.25)
            assert (found["weight"], found["shadow"]) == (0.25, 0.1)
            assert (found["max_error_rate"], found["max_latency_ratio"]) == (0.01, 3.0)
            own = RollOutSettings(weight=1.0)
            await running.hub.configure(self.with_model_settings(running, rollout=own))

            async def adjusted() -> bool:
                return bool((await report(running))["weight"] == 1.0)

            await until(adjusted, "the weight")

    async def test_a_new_version_in_the_store_is_rolled_out(
        self, store: Path, tmp_path: Path
    ) -> None:
        settings = {"model_settings": {TOPICS: ModelSettings(rollout=RollOutSettings(weight=0.5))}}
        (store / TOPICS / "2").rename(tmp_path / "second")
        async with serving(store, tmp_path, models=[TOPICS], **settings) as running:
            poll = StorePoll(running.hub, [TOPICS])
            (tmp_path / "second").rename(store / TOPICS / "2")
            await poll.look()
            assert set(await versions(running, 50)) == {"topics:1", "topics:2"}
            copy_version(store, 3)
            await poll.look()  # it waits for the roll-out to end
            assert (await report(running))["candidate"]["version"] == 2
            await change(running, "promote")
            await poll.look()
            assert (await report(running))["candidate"]["version"] == 3

    async def test_a_configured_version_missing_from_the_store_is_reported(
        self, store: Path, tmp_path: Path
    ) -> None:
        async with serving(store, tmp_path) as running:
            await running.hub.configure(self.with_model_settings(running, version=9))

            async def reported() -> bool:
                errors = (await running.client.get("/health")).json()["errors"]
                return any("version 9" in line for line in errors)

            await until(reported, "the problem")
            assert await versions(running, 10) == {"topics:1": 10}


async def _serves(running: Service, name: str) -> bool:
    return await version_for(running.client, "one") == name


async def test_a_candidate_that_no_engine_has_gets_no_requests(store: Path, tmp_path: Path) -> None:
    async with serving(store, tmp_path) as running:
        await roll_out(running, weight=1.0)
        await running.hub.fleet.unload((TOPICS, 2))
        await until(lambda: set(running.core.models) == {(TOPICS, 1)}, "it to be gone")
        assert await versions(running, 20) == {"topics:1": 20}
        error_of(await running.ask(TEXT, model="topics:2", heads=1), 503, "loading")


async def test_promotion_waits_until_every_engine_has_the_candidate(
    store: Path, tmp_path: Path
) -> None:
    async with serving(store, tmp_path) as running:
        await roll_out(running, version=2, weight=0.0)
        await running.hub.fleet.unload((TOPICS, 2))
        assert (await change(running, "promote")).status_code == 200
        assert await versions(running, 20, heads=1) == {"topics:2": 20}


async def test_a_candidate_that_engines_cannot_load_is_not_promoted(
    store: Path, tmp_path: Path
) -> None:
    async with serving(store, tmp_path) as running:
        await roll_out(running, version=2, weight=0.0)
        await running.hub.fleet.unload((TOPICS, 2))
        (store / TOPICS / "2" / "model.safetensors").write_bytes(b"broken")
        error_of(await change(running, "promote"), 422, "broken_checkpoint")
        assert await versions(running, 20, heads=1) == {"topics:1": 20}
        assert (await report(running))["state"] == "running"


async def test_a_roll_out_ends_if_its_model_is_not_served_after_a_restart(
    store: Path, tmp_path: Path
) -> None:
    async with serving(store, tmp_path) as running:
        await roll_out(running, version=2, weight=0.5)
    async with serving(store, tmp_path, models=["pairs"], default_model="pairs") as running:
        assert (await change(running, "load", version=1)).status_code == 200
        assert await versions(running, 20, model=TOPICS) == {"topics:1": 20}
        error_of(await change(running, "promote"), 409, "conflict")
        assert (await roll_out(running, version=2, weight=1.0))["state"] == "running"
        assert await versions(running, 20, model=TOPICS) == {"topics:2": 20}
