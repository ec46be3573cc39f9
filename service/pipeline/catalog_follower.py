"""A frontend follows the hub: it serves what is to be served, and says when it does."""

from __future__ import annotations

import asyncio
import time

from service.background import Background
from service.ipc.control_messages import Drained, ServedVersion, Serving, Swapped
from service.ipc.engine_client import Engines
from service.ipc.hub_client import NOTHING, HubLink
from service.pipeline.answer_cache import AnswerCache
from service.pipeline.served_models import Models, ServedModel

ENGINE_PATIENCE = 5.0
"""Seconds for the engines' own word of a model that the hub says they have."""
POLL_SECONDS = 0.005


class Follow:
    """Take what the hub says of what is served.

    Args:
        models: of this frontend.
        engines: that compute them.
        hub: is told how far this frontend is.
        cache: holds answers of models, until they are retired; None: there is none.
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

    async def __call__(self, serving: Serving) -> None:
        """Serve it from now on."""
        before = self._hub.serving
        if not self._begun:
            self._begun = True
            self._background.start(self._drain())
        if before is not NOTHING and serving.generation != before.generation:
            await self._until_loaded(serving.models)
        retired = await self._models.serve(serving.models)
        self._hub.say(Swapped(serving.generation))
        self._draining.put_nowait((serving.generation, retired))

    async def stop(self) -> None:
        """Follow no longer."""
        await self._background.stop()

    async def _until_loaded(self, models: list[ServedVersion]) -> None:
        """Wait for the engines' word: it may come later than the hub's."""
        patience = time.monotonic() + ENGINE_PATIENCE
        served = self._models.all()
        known = {(model.checkpoint.name, model.checkpoint.version) for model in served}
        wanted = {(model.name, model.version) for model in models} - known
        while self._engines.alive and time.monotonic() < patience:
            if wanted <= self._engines.models:
                return
            await asyncio.sleep(POLL_SECONDS)

    async def _drain(self) -> None:
        while True:
            generation, retired = await self._draining.get()
            for model in retired:
                await model.until_idle()
                if self._cache is not None:
                    self._cache.forget(model)
            self._hub.say(Drained(generation))
