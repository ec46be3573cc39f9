from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
import structlog

from tests.support.serving import Service, service
from tests.support.stores import model_store
from tests.support.waiting import until

__all__ = ["model_store"]


@pytest.fixture(scope="session", autouse=True)
def _plain_logs() -> Iterator[None]:
    """Log as the server does without a terminal: JSON, without variables in tracebacks."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ]
    )
    yield
    structlog.reset_defaults()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def _shared(model_store: Path) -> AsyncIterator[Service]:
    limits = {"max_batch_items": 64, "max_text_characters": 10_000, "max_body_bytes": 500_000}
    # The floor keeps the level, and so the answers, the same on a busy machine.
    async with service(model_store, quality_floor="balanced", **limits) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="session")
async def shared(_shared: Service) -> Service:
    """Return a service with every model, for tests that do not change it.

    Its event loop does not run during tests with other loops, so heartbeats may be outstanding.
    """
    await until(_shared.ready, "readiness")
    return _shared


@pytest_asyncio.fixture
async def fresh(model_store: Path) -> AsyncIterator[Service]:
    """Return a service with one model for a single test."""
    async with service(model_store, models=["topics"]) as running:
        yield running


@pytest.fixture
def store(model_store: Path, tmp_path: Path) -> Path:
    """Return a store that a test may change: topics 1 and 2, and pairs."""
    copy = tmp_path / "store"
    for name in ("topics/1", "topics/2", "pairs/1"):
        shutil.copytree(model_store / name, copy / name)
    return copy
