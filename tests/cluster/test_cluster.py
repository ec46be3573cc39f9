"""The application on a real Ray cluster, asked from outside; in this order: a host dies last."""

from __future__ import annotations

import asyncio
import itertools
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.engine.core import EngineOptions
from tests.cluster.conftest import ADMIN_KEY, HOSTS, PATIENCE, Running
from tests.support.exposition import Exposition
from tests.support.serving import service
from tests.support.stores import labelled_sentences
from tests.support.waiting import wait_until

pytestmark = [
    pytest.mark.timeout(900),
    # What Ray and its libraries warn of is not ours to settle.
    pytest.mark.filterwarnings("default"),
]

TEXTS = [text for text, _ in labelled_sentences()][:60]


class Callers(threading.Thread):
    """Callers on a schedule that does not wait for answers."""

    def __init__(self, running: Running, rate: float = 10.0) -> None:
        super().__init__()
        self._url, self._rate = running.url, rate
        self._enough = threading.Event()
        items = running.answer(TEXTS, quality="best")["data"]
        self._right = {text: item["label"] for text, item in zip(TEXTS, items, strict=True)}
        self.sent = 0
        self.seen: Counter[str] = Counter()
        self.models: Counter[str] = Counter()

    def run(self) -> None:
        asyncio.run(self._send())

    def stop(self) -> None:
        self._enough.set()
        self.join()

    async def _send(self) -> None:
        asked = []
        async with httpx.AsyncClient(base_url=self._url, timeout=100) as client:
            for text in itertools.cycle(TEXTS):
                if self._enough.is_set():
                    break
                self.sent += 1
                asked.append(asyncio.create_task(self._ask(client, text)))
                await asyncio.sleep(1 / self._rate)
            await asyncio.gather(*asked)

    async def _ask(self, client: httpx.AsyncClient, text: str) -> None:
        body = {"input": text, "quality": "best", "timeout_ms": 60_000}
        try:
            answer = await client.post("/classify", json=body)
        except httpx.TransportError as error:
            self.seen[type(error).__name__] += 1
            return
        if answer.status_code != 200:
            self.seen[f"{answer.status_code} {answer.text}"] += 1
            return
        told = answer.json()
        self.models[told["model"]] += 1
        right = told["data"][0]["label"] == self._right[text]
        self.seen["right" if right else "wrong"] += 1


@contextmanager
def called(running: Running) -> Iterator[Callers]:
    callers = Callers(running)
    callers.start()
    try:
        yield callers
    finally:
        callers.stop()


def comparable(item: dict[str, Any]) -> dict[str, Any]:
    exact = ("index", "label", "tokens", "dense_macs", "quality", "truncated")
    return {name: item[name] for name in exact} | {"heads": item["heads"]}


async def test_pools_answer_what_one_engine_answers(running: Running, model_store: Path) -> None:
    for quality in ("fast", "best"):
        told = running.answer(TEXTS, quality=quality, return_heads=True)
        async with service(
            model_store, models=["topics:1"], options=EngineOptions(), quality=quality
        ) as plain:
            right = await plain.answer(TEXTS, quality=quality, return_heads=True)
        assert told["model"] == right["model"]
        for a, b in zip(told["data"], right["data"], strict=True):
            assert comparable(a) == comparable(b)
            assert a["probs"] == pytest.approx(b["probs"], rel=1e-3, abs=1e-5)
            assert a["macs"] >= b["macs"]  # f_o runs once more where an item is handed on


def test_one_page_of_metrics_counts_what_all_did(running: Running) -> None:
    def counted() -> float:
        page = Exposition(running.client.get("/metrics").text)
        return sum(s.value for s in page.select("requests_total", route="/classify", outcome="ok"))

    before = counted()
    for _ in range(10):
        running.answer(TEXTS[:1])
    wait_until(lambda: counted() == before + 10, "ten more requests")
    page = Exposition(running.client.get("/metrics").text)
    assert len(page.select("engine_heartbeat_age_seconds")) == 2 * HOSTS


def test_engines_of_both_pools_say_what_they_ran(running: Running) -> None:
    items = running.answer(TEXTS, quality="best")["data"]
    # What the pool of step 0 cannot have computed, the other has.
    wanted = {str(item["heads"]["budget"]) for item in items}
    assert wanted - {"0"}

    def ran() -> bool:
        page = Exposition(running.client.get("/metrics").text)
        return wanted - {"0"} <= page.by("budget", "batches_total", model="topics").keys()

    wait_until(ran, "batches of every step")


def test_a_new_version_comes_without_a_failed_request(running: Running, model_store: Path) -> None:
    shutil.copytree(model_store / "topics" / "2", running.store / "topics" / "2")
    with called(running) as callers:
        answer = running.client.post(
            "/models/topics/load", headers={"Authorization": f"Bearer {ADMIN_KEY}"}, timeout=120
        )
        assert answer.status_code == 200, answer.text
        wait_until(lambda: callers.models["topics:2"] >= 10, "answers of the new version")
    assert set(callers.models) == {"topics:1", "topics:2"}
    assert callers.seen["right"] + callers.seen["wrong"] == callers.sent, dict(callers.seen)
    engines = running.health()["engines"]
    assert all("topics:2" in engine["models"] for engine in engines)


def test_a_host_that_dies_loses_no_request_without_an_answer(running: Running) -> None:
    wait_until(lambda: running.whole(2 * HOSTS), "all engines", PATIENCE)
    with called(running) as callers:
        wait_until(lambda: callers.seen["right"] >= 10, "answers")
        victim = next(iter(running.cluster.worker_nodes))
        running.cluster.remove_node(victim, allow_graceful=False)
        answered = callers.seen["right"]
        wait_until(lambda: callers.seen["right"] >= answered + 30, "more answers", PATIENCE)
    assert callers.seen.total() == callers.sent, callers.seen
    # A front on the dead host takes what it held along: Ray answers 500 for it.
    assert set(callers.seen) <= {"right", "500", "503"}
    assert callers.seen["right"] >= 0.8 * callers.sent
    wait_until(lambda: running.whole(HOSTS), "the hub to miss the dead engines", PATIENCE)
