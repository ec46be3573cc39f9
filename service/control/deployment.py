"""Bring engines and frontends in line with the model catalog."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial

import structlog

from budgetformer.checkpoint.store import Checkpoint
from service.background import Background, DetachedThreads, StillRunningError
from service.control.catalog import Catalog
from service.control.engine_watch import EngineWatch
from service.control.fleet import Fleet, LoadTimeoutError
from service.control.frontends import Frontends
from service.ipc.control_messages import ServedVersion
from service.settings import DEFAULT_QUALITY, Settings
from service.telemetry.metrics import QUALITY_RANK, Metrics

log = structlog.get_logger()

SWAP_PATIENCE = 30.0
"""Longest time that a change waits for all frontends, in seconds."""
MAX_RETIRED = 50
"""Most retired versions whose metrics are kept; the metrics retired first are removed first."""


class Deployment:
    """Load versions, have frontends serve them, and free versions that are no longer served.

    Args:
        settings: settings of the whole server.
        catalog: versions to serve.
        fleet: the engines.
        watch: collector of the engines' metrics.
        metrics: metrics of the server.
        frontends: connected frontends.
        tell: sends the catalog to all frontends.

    Attributes:
        changing: lock to hold while changing the catalog.
        generation: number of changes so far.
        loading: versions that are being loaded, as `name:version`.
    """

    def __init__(
        self,
        settings: Settings,
        catalog: Catalog,
        fleet: Fleet,
        watch: EngineWatch,
        metrics: Metrics,
        frontends: Frontends,
        broadcast_catalog: Callable[[], None],
    ) -> None:
        self.changing = asyncio.Lock()
        self.generation = 0
        self.loading: list[str] = []
        self._settings = settings
        self._catalog = catalog
        self._fleet = fleet
        self._watch = watch
        self._metrics = metrics
        self._frontends = frontends
        self._broadcast_catalog = broadcast_catalog
        self._retired: dict[tuple[str, int], float] = {}
        self._threads = DetachedThreads()
        self._background = Background()
        for checkpoint in catalog:
            self.announce(checkpoint)
            fleet.wanted[checkpoint.name, checkpoint.version] = checkpoint.path

    async def stop(self) -> None:
        """Stop waiting for versions to be freed."""
        await self._background.stop()

    def configure(self, settings: Settings) -> None:
        """Apply new settings."""
        self._settings = settings
        for name in self._catalog.served:
            self._show_quality(name)

    def served(self) -> list[ServedVersion]:
        """Return the versions that frontends should serve, candidates last."""
        versions = [
            ServedVersion(c.name, c.version, str(c.path)) for c in self._catalog.served.values()
        ]
        for name, candidate in self._catalog.candidates.items():
            rollout = self._catalog.state.running(name)
            weight, shadow = (rollout.weight, rollout.shadow) if rollout else (0.0, 0.0)
            path = str(candidate.path)
            versions.append(ServedVersion(name, candidate.version, path, True, weight, shadow))
        return versions

    async def read(self, name: str, version: int | None) -> Checkpoint:
        """Read a version (None: the highest) from the store.

        Raises:
            UnknownModelError: the version is not in the store.
            CheckpointError: the checkpoint is damaged.
            LoadTimeoutError: the store does not answer in time.
        """
        read = partial(self._catalog.candidate, name, version)
        seconds = self._settings.load_timeout_seconds
        try:
            return await self._threads.run((name, version), read, seconds)
        except TimeoutError:
            message = f"{name}: the store does not answer within {seconds:g} s"
            raise LoadTimeoutError(message) from None
        except StillRunningError:
            message = f"{name}: the store has not answered an earlier attempt yet"
            raise LoadTimeoutError(message) from None

    async def load(self, checkpoint: Checkpoint, *, reload: bool = True) -> None:
        """Have every engine load a version beside those that it has.

        Args:
            checkpoint: checkpoint of the version.
            reload: whether engines that have the version load it again.

        Raises:
            LoadFailedError, NoEngineError: see `Fleet.load`.
        """
        self.loading = [checkpoint.label]
        self._broadcast_catalog()
        try:
            key = checkpoint.name, checkpoint.version
            await self._fleet.load(key, checkpoint.path, reload=reload)
        finally:
            self.loading = []
            self._broadcast_catalog()

    async def unload(self, checkpoint: Checkpoint) -> None:
        """Have every engine free a version that no frontend has served."""
        await self._fleet.unload((checkpoint.name, checkpoint.version))

    async def publish(self) -> None:
        """Send the catalog to all frontends, and wait until all of them serve it."""
        self.generation += 1
        generation = self.generation
        self._broadcast_catalog()
        try:
            async with asyncio.timeout(SWAP_PATIENCE):
                await self._frontends.until(lambda frontend: frontend.applied >= generation)
        except TimeoutError:
            behind = [frontend.pid for frontend in self._frontends if frontend.applied < generation]
            log.error("frontends did not apply the model catalog in time", pids=behind)

    def announce(self, checkpoint: Checkpoint) -> None:
        """Create the metrics of a version that is now served, so that they begin at 0."""
        self._retired.pop((checkpoint.name, checkpoint.version), None)
        self._metrics.register_model(checkpoint.name, str(checkpoint.version), checkpoint.budgets)
        self._show_quality(checkpoint.name)
        self._watch.show_models()

    def _show_quality(self, model: str) -> None:
        quality = self._settings.quality_of(model)
        level = DEFAULT_QUALITY if quality == "auto" else quality
        rank = QUALITY_RANK.get(level, 0) if isinstance(level, str) else 0
        for gauge in (self._metrics.quality_level, self._metrics.quality_configured):
            gauge.labels(model).set(rank)

    def retire(self, checkpoint: Checkpoint) -> None:
        """Free a version that left the catalog, once its last request is answered."""
        self._watch.show_models()
        if checkpoint.name not in self._catalog.served:
            for gauge in (self._metrics.quality_level, self._metrics.quality_configured):
                gauge.remove_by_labels({"model": checkpoint.name})
        self._retired[checkpoint.name, checkpoint.version] = time.monotonic()
        self._background.start(self._free(checkpoint, self.generation))

    def forget_retired(self, now: float) -> None:
        """Remove the metrics of versions that were retired some time before `now`."""
        limit = self._settings.retired_series_seconds
        while self._retired:
            key, since = next(iter(self._retired.items()))
            if now - since < limit and len(self._retired) <= MAX_RETIRED:
                return
            del self._retired[key]
            name, version = key
            self._metrics.forget_model(name, str(version))
            if name not in self._catalog.served and name not in {n for n, _ in self._retired}:
                self._watch.forget_model(name)
                self._metrics.forget_model_name(name)

    async def _free(self, checkpoint: Checkpoint, generation: int) -> None:
        """Have the engines free a version once no frontend has a request for it."""
        await self._frontends.until(lambda frontend: frontend.drained >= generation)
        async with self.changing:
            key = checkpoint.name, checkpoint.version
            if self._catalog.get(*key) is None:
                await self._fleet.unload(key)
