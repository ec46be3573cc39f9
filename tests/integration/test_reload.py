"""Reloading settings while a service runs: they change in all frontends and engines."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from structlog.testing import capture_logs

from service.control import hub as hub_module
from service.control.frontends import FrontendPeer
from service.control.reload import Reload
from service.keys import Key, digest
from service.settings import ModelSettings, Settings, SettingsError
from tests.support.serving import ADMIN, Service, error_of, held, service
from tests.support.stores import TOPICS, sentences
from tests.support.waiting import until

TEXT = sentences("animals")[0]
FRONTENDS = 2


@dataclass
class Changeable:
    """A service, and the settings that its next reload reads."""

    service: Service
    read: Callable[[], Settings]

    def set_next(self, **changes: Any) -> None:
        """Set what the next reload reads."""
        settings = self.service.hub.settings.model_copy(update=changes)
        self.read = lambda: settings

    async def reload(self) -> dict[str, list[str]]:
        response = await self.service.client.post("/settings/reload", headers=ADMIN)
        assert response.status_code == 200, response.text
        body = response.json()
        assert isinstance(body, dict)
        return body

    @property
    def clients(self) -> list[httpx.AsyncClient]:
        return [self.service.client, *self.service.other_clients]

    async def qualities(self) -> list[str]:
        """Return the quality of a request without one, at each frontend."""
        answers = [await one.post("/classify", json={"input": TEXT}) for one in self.clients]
        return [answer.headers["x-quality"] for answer in answers]


@pytest_asyncio.fixture
async def running(model_store: Path) -> AsyncIterator[Changeable]:
    async with service(model_store, models=[TOPICS], fronts=FRONTENDS, engines=2) as it:
        changeable = Changeable(it, lambda: it.hub.settings)
        it.hub.reload = Reload(it.hub, it.hub.settings, lambda: changeable.read())
        yield changeable


async def test_changes_are_in_force_everywhere_when_reload_returns(
    running: Changeable,
) -> None:
    running.set_next(quality="best", quality_floor="balanced")
    assert await running.reload() == {
        "changed": ["quality", "quality_floor"], "needs_restart": [], "waiting_for": [],
    }  # fmt: skip
    assert await running.qualities() == ["best"] * FRONTENDS
    assert [core.brownout.levels for core in running.service.cores] == [["balanced"]] * 2
    shown = await running.service.scrape()
    assert shown.total("quality_level_configured", model=TOPICS) == 3
    assert (await running.reload())["changed"] == []


async def test_models_can_have_their_own_settings(running: Changeable) -> None:
    own = {
        TOPICS: ModelSettings(
            quality="fast", quality_floor="balanced", queue_items=3, timeout_ms=200
        ),
        "absent": ModelSettings(quality="best"),
    }
    running.set_next(model_settings=own)
    with capture_logs() as lines:
        assert (await running.reload())["changed"] == ["model_settings"]
    (line,) = [one for one in lines if one["event"] == "settings for models that are not served"]
    assert line["models"] == ["absent"]
    shown = await running.service.scrape()
    assert shown.total("quality_level_configured", model=TOPICS) == 1
    for client in running.clients:
        with ExitStack() as stack:
            for core in running.service.cores:
                stack.enter_context(held(core))
            late = await client.post("/classify", json={"input": TEXT, "heads": 4})
            error_of(late, 504, param="timeout_ms")
        answer = await client.post("/classify", json={"input": TEXT, "timeout_ms": 30_000})
        assert answer.headers["x-quality"] == "fast"
    for core in running.service.cores:
        assert core.options.level_of(TOPICS, "fast") == "balanced"
        assert core.options.level_of("other", "fast") == "fast"
        assert core.options.model_queue_items == {TOPICS: 3}
    refused = await running.service.ask([TEXT] * 4, heads=4, timeout_ms=30_000)
    assert refused.status_code == 200, "an idle engine takes a request that is larger"


async def test_settings_that_need_a_restart_are_reported_and_unchanged(running: Changeable) -> None:
    running.set_next(quality="fast", max_batch_items=1)
    for changed in (["quality"], []):
        reply = await running.reload()
        assert reply == {
            "changed": changed,
            "needs_restart": ["max_batch_items"],
            "waiting_for": [],
        }
    assert await running.qualities() == ["fast"] * FRONTENDS
    assert (await running.service.ask([TEXT] * 2)).status_code == 200


async def test_invalid_keys_change_nothing(running: Changeable) -> None:
    same = Key(sha256=digest(b"x"))
    running.set_next(keys={"a": same, "b": same}, quality="fast")
    response = await running.service.client.post("/settings/reload", headers=ADMIN)
    error_of(response, 422, "invalid_settings")
    assert await running.qualities() == ["balanced"] * FRONTENDS


async def test_an_invalid_file_is_reported_in_one_line(running: Changeable) -> None:
    def read() -> Settings:
        raise SettingsError("config.toml: quallity is unknown")

    running.read = read
    response = await running.service.client.post("/settings/reload", headers=ADMIN)
    error = error_of(response, 422, "invalid_settings")
    assert error["message"] == "config.toml: quallity is unknown"


async def test_new_keys_apply_to_every_frontend(running: Changeable) -> None:
    new = {"web": Key(sha256=digest(b"new"))}
    running.set_next(keys=new)
    assert (await running.reload())["changed"] == ["keys"]
    for client in running.clients:
        refused = await client.post("/classify", json={"input": TEXT})
        error_of(refused, 401, "no_key")
        answer = await client.post("/classify", json={"input": TEXT}, headers={"X-API-Key": "new"})
        assert answer.status_code == 200


async def test_unreachable_processes_are_reported_and_change_later(
    running: Changeable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "SETTINGS_PATIENCE", 3.0)
    stalled = FrontendPeer(lambda _: True)
    stalled.pid = 12345
    running.service.hub.frontends.add(stalled)
    running.service.hub.fleet.clients[1].close()
    running.set_next(quality="fast", quality_floor="balanced")
    reply = await running.reload()
    assert reply["changed"] == ["quality", "quality_floor"]
    assert reply["waiting_for"] == ["engine-1", "process 12345"]
    assert await running.qualities() == ["fast"] * FRONTENDS
    late = running.service.cores[1].brownout
    await until(lambda: late.levels == ["balanced"], "the engine that was away")


async def test_reload_may_be_unsupported(model_store: Path) -> None:
    async with service(model_store, models=[TOPICS]) as it:
        response = await it.client.post("/settings/reload", headers=ADMIN)
        error_of(response, 501, "not_supported")
