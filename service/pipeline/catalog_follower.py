"""The model catalog in a frontend: apply each version that the hub sends, and confirm it."""

from __future__ import annotations

import asyncio
import time

from service.background import Background
from service.ipc.control_messages import CatalogApplied, CatalogUpdate, Drained, ServedVersion
from service.ipc.engine_client import Engines
from service.ipc.hub_client import EMPTY_CATALOG, HubLink
from service.pipeline.answer_cache import AnswerCache
from service.pipeline.served_models import Models, ServedModel

ENGINE_PATIENCE = 5.0
"""Seconds to wait until engines report a model that the hub says they have loaded."""
POLL_SECONDS = 0.005


class CatalogFollower:
    """Apply the model catalog of the hub in this frontend.

    Args:
        models: models of this frontend, which are changed.
        engines: engines of the server.
        hub: connection over which `CatalogApplied` and `Drained` are sent.
        cache: answer cache, from which answers of retired models are dropped; None: no cache.
    """

    def __init__(
        self, models: Models, engines: Engines, hub: HubLink, cache: AnswerCache | None = None
    ) -> None:
        self._models = models
        self._engines = engines
        self._hub = hub
        self._cache = cache
        self._draining: asyncio.Queue[tuple[int, list[ServedModel]]] = asyncio.Queue()
        self._begun = False
        self._background = Background()

    async def __call__(self, serving: CatalogUpdate) -> None:
        """Serve the models of this catalog from now on."""
        before = self._hub.catalog
        if not self._begun:
            self._begun = True
            self._background.start(self._drain())
        if before is not EMPTY_CATALOG and serving.generation != before.generation:
            await self._until_loaded(serving.models)
        retired = await self._models.serve(serving.models)
        self._hub.send(CatalogApplied(serving.generation))
        self._draining.put_nowait((serving.generation, retired))

    async def stop(self) -> None:
        """Stop waiting for requests of retired models."""
        await self._background.stop()

    async def _until_loaded(self, models: list[ServedVersion]) -> None:
        """Wait until engines report the new models: the hub's message may be received first."""
        give_up = time.monotonic() + ENGINE_PATIENCE
        served = {(one.checkpoint.name, one.checkpoint.version) for one in self._models.all()}
        new = {(model.name, model.version) for model in models} - served
        while self._engines.alive and time.monotonic() < give_up:
            if new <= self._engines.models:
                return
            await asyncio.sleep(POLL_SECONDS)

    async def _drain(self) -> None:
        while True:
            generation, retired = await self._draining.get()
            for model in retired:
                await model.until_idle()
                if self._cache is not None:
                    self._cache.forget(model)
            self._hub.send(Drained(generation))
