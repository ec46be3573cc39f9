"""The replica of an engine pool without a cluster: loading of models, statistics, health."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from service.cluster.engine import EngineReplica
from service.ipc.engine_messages import (
    TO_FRONTEND,
    Answer,
    Classify,
    Failed,
    Load,
    SentTexts,
)
from service.pipeline.served_models import open_model
from service.settings import Pool, Settings
from tests.support.columns import texts_of

TOPICS, TAGS = ("topics", 2), ("tags", 1)


@pytest.fixture(autouse=True)
def _keep_logging(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevent replicas from configuring the logs of the process of the tests."""
    monkeypatch.setattr("service.cluster.engine.configure_logs", lambda *_: None)


class NoHub:
    """The handle of a hub that cannot be reached."""

    def options(self, **_: Any) -> NoHub:
        raise ConnectionError


@asynccontextmanager
async def replica(store: Path, **pool: Any) -> AsyncIterator[EngineReplica]:
    settings = Settings(model_store=store, dtype="float32").model_dump(mode="json")
    running = EngineReplica(settings, Pool(**pool).model_dump(), "small", NoHub())
    yield running
    await running.stop()


def frame(store: Path, key: tuple[str, int]) -> bytes:
    model = open_model(store / key[0] / str(key[1]))
    (encoding,) = model.encoder.encode(["The otter slept under the hedge."])
    texts = SentTexts.of(texts_of(encoding.ids))
    return msgspec.msgpack.encode(Classify(0, *key, texts, "best", 60.0))


async def ask(running: EngineReplica, store: Path, key: tuple[str, int]) -> Any:
    reply = await running.classify(f"{key[0]}:{key[1]}", 1, frame(store, key))
    return TO_FRONTEND.decode(reply)


async def test_a_replica_with_room_for_one_model_replaces_it(model_store: Path) -> None:
    async with replica(model_store, models=1) as running:
        for key in (TOPICS, TAGS, TOPICS):
            assert isinstance(await ask(running, model_store, key), Answer)
            assert running.record_routing_stats()["models"] == [f"{key[0]}:{key[1]}"]


async def test_models_stay_loaded_if_there_is_room(model_store: Path) -> None:
    async with replica(model_store) as running:
        for key in (TOPICS, TAGS):
            assert isinstance(await ask(running, model_store, key), Answer)
        assert running.record_routing_stats()["models"] == ["topics:2", "tags:1"]


async def test_a_model_missing_from_the_store_fails_the_request(model_store: Path) -> None:
    async with replica(model_store) as running:
        reply = await running.classify("topics:9", 1, _with_version_9(frame(model_store, TOPICS)))
        assert isinstance(TO_FRONTEND.decode(reply), Failed)


async def test_only_classify_messages_are_accepted(model_store: Path) -> None:
    async with replica(model_store) as running:
        with pytest.raises(TypeError, match="only Classify messages"):
            await running.classify("x", 1, msgspec.msgpack.encode(Load(0, "/etc")))


async def test_the_statistics_contain_the_time_per_item(model_store: Path) -> None:
    async with replica(model_store) as running:
        assert running.record_routing_stats()["item_seconds"] == 0
        await ask(running, model_store, TOPICS)
        statistics = running.record_routing_stats()
        assert 0 < statistics["item_seconds"] < 60
        assert statistics["seconds"] == 0
        assert running.record_autoscaling_stats()["queue_seconds"] == 0
        running.check_health()


async def test_a_replica_whose_core_has_ended_is_unhealthy(model_store: Path) -> None:
    async with replica(model_store) as running:
        await running.stop()
        with pytest.raises(RuntimeError, match="has stopped computing"):
            running.check_health()


def _with_version_9(data: bytes) -> bytes:
    return data.replace(b"\xa6topics\x02", b"\xa6topics\x09")
