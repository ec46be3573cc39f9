"""The application on a real Ray cluster, used over HTTP.

The order of the tests matters: the last one removes a host.
"""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest

from loadtests.chaos.load import Load, Seen
from service.engine.core import EngineOptions
from tests.cluster.conftest import ADMIN_KEY, HOSTS, PATIENCE, Running
from tests.support.exposition import Exposition
from tests.support.serving import service
from tests.support.stores import labelled_sentences
from tests.support.waiting import until, wait_until

pytestmark = [
    pytest.mark.timeout(900),
    # Warnings of Ray and its libraries are not errors.
    pytest.mark.filterwarnings("default"),
]

TEXTS = [text for text, _ in labelled_sentences()][:60]


def load_on(running: Running, rate: float = 10.0, size: int = 1, timeout_ms: int = 60_000) -> Load:
    return Load(running.url, rate, TEXTS, size, model="topics", timeout_ms=timeout_ms)


def statuses(seen: Seen) -> set[str]:
    return {outcome.split()[0] for outcome in seen.outcomes}


def comparable(item: dict[str, Any]) -> dict[str, Any]:
    exact = ("index", "label", "tokens", "dense_macs", "quality", "truncated")
    return {name: item[name] for name in exact} | {"heads": item["heads"]}


async def test_pools_give_the_answers_of_one_engine(running: Running, model_store: Path) -> None:
    for quality in ("fast", "best"):
        actual = running.answer(TEXTS, quality=quality, return_heads=True)
        async with service(
            model_store, models=["topics:1"], options=EngineOptions(), quality=quality
        ) as plain:
            expected = await plain.answer(TEXTS, quality=quality, return_heads=True)
        assert actual["model"] == expected["model"]
        for a, b in zip(actual["data"], expected["data"], strict=True):
            assert comparable(a) == comparable(b)
            assert a["probs"] == pytest.approx(b["probs"], rel=1e-3, abs=1e-5)
            assert a["macs"] >= b["macs"]  # f_o runs again if an item goes to another pool


def test_metrics_include_all_frontends_and_engines(running: Running) -> None:
    def counted() -> float:
        page = Exposition(running.client.get("/metrics").text)
        return sum(s.value for s in page.select("requests_total", route="/classify", outcome="ok"))

    before = counted()
    for _ in range(10):
        running.answer(TEXTS[:1])
    # There may be more, if frontends had not yet reported earlier requests.
    wait_until(lambda: counted() >= before + 10, "ten more requests")
    page = Exposition(running.client.get("/metrics").text)
    assert len(page.select("engine_heartbeat_age_seconds")) == 2 * HOSTS


def test_engines_of_both_pools_report_their_batches(running: Running) -> None:
    items = running.answer(TEXTS, quality="best")["data"]
    # Only the other pool can have computed steps above 0.
    wanted = {str(item["heads"]["budget"]) for item in items}
    assert wanted - {"0"}

    def ran() -> bool:
        page = Exposition(running.client.get("/metrics").text)
        return wanted - {"0"} <= page.by("budget", "batches_total", model="topics").keys()

    wait_until(ran, "batches of every step")


async def test_a_new_version_is_loaded_without_a_failed_request(
    running: Running, model_store: Path
) -> None:
    shutil.copytree(model_store / "topics" / "2", running.store / "topics" / "2")
    load, seen = load_on(running), Seen()
    await load.learn()

    async def renew() -> None:
        async with httpx.AsyncClient(base_url=running.url, timeout=120) as client:
            answer = await client.post(
                "/models/topics/load", headers={"Authorization": f"Bearer {ADMIN_KEY}"}
            )
        assert answer.status_code == 200, answer.text
        await until(lambda: seen.models["topics:2"] >= 10, "answers of the new version")

    await load.during(seen, renew)
    assert set(seen.models) == {"topics:1", "topics:2"}
    assert seen.outcomes == {"200": seen.sent}
    engines = running.health()["engines"]
    assert all("topics:2" in engine["models"] for engine in engines)


async def test_the_number_of_engines_follows_the_load(running: Running) -> None:
    load, seen = load_on(running, rate=5, size=1000, timeout_ms=10_000), Seen()
    await load.learn()

    async def grow() -> None:
        def grown() -> bool:
            return running.has_engines(2 * HOSTS + 1)

        await until(lambda: asyncio.to_thread(grown), "one more engine", PATIENCE)

    await load.during(seen, grow)
    assert statuses(seen) <= {"200", "429", "504"}
    assert (seen.hung, seen.wrong) == (0, 0)
    assert seen.outcomes["200"]
    seen = Seen()
    load = load_on(running)
    await load.learn()

    async def shrink() -> None:
        def shrunk() -> bool:
            return running.has_engines(2 * HOSTS)

        await until(lambda: asyncio.to_thread(shrunk), "one engine less", PATIENCE)

    await load.during(seen, shrink)
    assert seen.outcomes == {"200": seen.sent}
    assert seen.wrong == 0


async def test_after_a_host_died_every_request_has_an_answer_or_error(running: Running) -> None:
    wait_until(lambda: running.has_engines(2 * HOSTS), "all engines", PATIENCE)
    load, seen = load_on(running), Seen()
    await load.learn()

    async def kill() -> None:
        await until(lambda: seen.outcomes["200"] >= 10, "answers")
        victim = next(iter(running.cluster.worker_nodes))
        await asyncio.to_thread(running.cluster.remove_node, victim, allow_graceful=False)
        answered = seen.outcomes["200"]
        await until(lambda: seen.outcomes["200"] >= answered + 30, "more answers", PATIENCE)

    await load.during(seen, kill)
    assert (seen.hung, seen.wrong) == (0, 0)
    # The requests of a frontend on the dead host end with a visible error.
    assert statuses(seen) <= {"200", "500", "503", "broke"}
    assert seen.outcomes["200"] >= 0.8 * seen.sent
    # The other host has room for one more engine.
    wait_until(lambda: running.has_engines(HOSTS + 1), "one more engine", PATIENCE)
