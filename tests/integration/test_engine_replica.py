"""An engine of a pool, without the cluster around it: models in turns, what it says of itself."""

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
def _logs_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica sets up the logs of its process, which here is that of all tests."""
    monkeypatch.setattr("service.cluster.engine.configure_logs", lambda *_: None)


class NoHub:
    """A handle behind which nobody is."""

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
    told = await running.classify(f"{key[0]}:{key[1]}", 1, frame(store, key))
    return TO_FRONTEND.decode(told)


async def test_models_take_turns_where_not_all_have_room(model_store: Path) -> None:
    async with replica(model_store, models=1) as running:
        for key in (TOPICS, TAGS, TOPICS):
            assert isinstance(await ask(running, model_store, key), Answer)
            assert running.record_routing_stats()["models"] == [f"{key[0]}:{key[1]}"]


async def test_where_there_is_room_every_model_stays(model_store: Path) -> None:
    async with replica(model_store) as running:
        for key in (TOPICS, TAGS):
            assert isinstance(await ask(running, model_store, key), Answer)
        assert running.record_routing_stats()["models"] == ["topics:2", "tags:1"]


async def test_what_is_not_in_the_store_is_said_to_be_missing(model_store: Path) -> None:
    async with replica(model_store) as running:
        told = await running.classify("topics:9", 1, _renamed(frame(model_store, TOPICS)))
        assert isinstance(TO_FRONTEND.decode(told), Failed)


async def test_only_requests_to_classify_come_through_ray(model_store: Path) -> None:
    async with replica(model_store) as running:
        with pytest.raises(TypeError, match="only Classify messages"):
            await running.classify("x", 1, msgspec.msgpack.encode(Load(0, "/etc")))


async def test_it_says_what_an_item_took(model_store: Path) -> None:
    async with replica(model_store) as running:
        assert running.record_routing_stats()["item_seconds"] == 0
        await ask(running, model_store, TOPICS)
        said = running.record_routing_stats()
        assert 0 < said["item_seconds"] < 60
        assert said["seconds"] == 0
        assert running.record_autoscaling_stats()["queue_seconds"] == 0
        running.check_health()


async def test_an_engine_whose_core_has_ended_is_to_be_replaced(model_store: Path) -> None:
    async with replica(model_store) as running:
        await running.stop()
        with pytest.raises(RuntimeError, match="has stopped computing"):
            running.check_health()


def _renamed(data: bytes) -> bytes:
    return data.replace(b"\xa6topics\x02", b"\xa6topics\x09")
