"""The engines, and the models that each must load."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from pathlib import Path

import structlog

from service.ipc.connection import DisconnectedError, Streams, unreachable
from service.ipc.engine_client import EngineClient, Engines, Event, ModelKey
from service.ipc.engine_messages import (
    Configure,
    Done,
    Failed,
    Hello,
    Load,
    SubscribeBatches,
    Unload,
)

log = structlog.get_logger()


class LoadFailedError(Exception):
    """An engine cannot load the checkpoint."""


class LoadTimeoutError(LoadFailedError):
    """The store or an engine did not answer in time; a later attempt may succeed."""


class NoEngineError(Exception):
    """No engine is running, or an engine died during the change."""


class Fleet(Engines):
    """All engines; each is told which models to load, again after each restart.

    Args:
        sockets: socket of each engine.
        observe: see `Engines`.
        errors_changed: called when `errors` may have changed.
        load_seconds: longest time that an engine may take to load a model. After that, the load
            fails, and the engine serves the models that it has.

    Attributes:
        wanted: folders of the versions that every engine must load.
    """

    def __init__(
        self,
        sockets: list[Path],
        observe: Callable[[int, Event], None],
        errors_changed: Callable[[], None] = lambda: None,
        load_seconds: float | None = None,
    ) -> None:
        super().__init__(sockets, self._event)
        self.wanted: dict[ModelKey, Path] = {}
        self._configuration: Configure | None = None
        self._observe = observe
        self._errors_changed = errors_changed
        self._load_seconds = load_seconds
        self._failed: dict[tuple[int, ModelKey], str] = {}

    @property
    def errors(self) -> list[str]:
        """Reasons why engines could not load checkpoints."""
        return sorted(set(self._failed.values()))

    def equipped(self, client: EngineClient) -> bool:
        """Return whether an engine has loaded, or failed to load, each wanted version."""
        return client.hello is not None and all(
            key in client.models or (client.index, key) in self._failed for key in self.wanted
        )

    async def add(self, streams: Streams) -> None:
        """Add an engine that connected to the hub by itself, until its connection ends.

        The engine gets the lowest free index, so the number of metrics labelled by index is bounded
        by the number of engines that run at the same time.
        """
        taken = {client.index for client in self.clients}
        index = next(i for i in itertools.count() if i not in taken)
        client = EngineClient(index, unreachable, self._event)
        self.clients.append(client)
        try:
            await client.hold(streams)
        finally:
            self.clients.remove(client)
            self._forget_failures(index)

    async def configure(self, wanted: Configure, seconds: float) -> list[int]:
        """Have every engine apply settings, including engines that start later.

        Returns:
            The indexes of engines that have not applied them after `seconds`.
        """
        self._configuration = wanted
        clients = list(self.clients)
        done = await asyncio.gather(*(self._configure(client, seconds) for client in clients))
        return [client.index for client, applied in zip(clients, done, strict=True) if not applied]

    async def _configure(self, client: EngineClient, seconds: float | None = None) -> bool:
        if self._configuration is None:
            return True
        try:
            return isinstance(await client.request(self._configuration, seconds), Done)
        except (DisconnectedError, TimeoutError):
            return False

    async def load(self, key: ModelKey, path: Path, *, reload: bool = True) -> None:
        """Have every engine load a checkpoint folder, beside the models that it has.

        One engine loads it before all others: if that kills the engine, for example because memory
        runs out, the others continue to serve.

        Args:
            key: model version.
            path: checkpoint folder.
            reload: whether engines that have the version load it again.

        Raises:
            LoadFailedError: an engine could not load it; a version that was not loaded before is
                freed again in all engines.
            LoadTimeoutError: as above, since an engine took too long.
            NoEngineError: no engine is running, or one died.
        """
        clients = self.alive
        if not clients:
            raise NoEngineError
        if not reload:
            clients = [client for client in clients if key not in client.models]
        for group in (clients[:1], clients[1:]):
            results = await asyncio.gather(
                *(self._load(client, key, path) for client in group), return_exceptions=True
            )
            failures = [result for result in results if isinstance(result, BaseException)]
            if failures:
                if key not in self.wanted:
                    await self.unload(key)
                raise failures[0]
        self.wanted[key] = path

    async def unload(self, key: ModelKey) -> None:
        """Have every engine free a model version."""
        self.wanted.pop(key, None)
        await asyncio.gather(*(self._unload(client, key) for client in self.alive))

    def _event(self, index: int, event: Event) -> None:
        if isinstance(event, Hello):
            client = next(client for client in self.clients if client.index == index)
            client.send(SubscribeBatches())
            self._forget_failures(index)
            self._background.start(self._equip(client))
        self._observe(index, event)

    def _forget_failures(self, index: int) -> None:
        for failed in [key for key in self._failed if key[0] == index]:
            del self._failed[failed]

    async def _equip(self, client: EngineClient) -> None:
        await self._configure(client)
        for key, path in list(self.wanted.items()):
            if key in client.models:  # only the connection was lost, not the engine
                continue
            try:
                await self._load(client, key, path)
            except LoadFailedError as error:
                log.error("model not loaded", model=key[0], engine=client.index, reason=str(error))
            except NoEngineError:
                return
        self._errors_changed()

    async def _load(self, client: EngineClient, key: ModelKey, path: Path) -> None:
        try:
            reply = await client.request(Load(0, str(path)), self._load_seconds)
        except DisconnectedError as error:
            raise NoEngineError from error
        except TimeoutError:
            reason = f"{path}: engine-{client.index} did not load it in {self._load_seconds:g} s"
            self._failed[client.index, key] = reason
            raise LoadTimeoutError(reason) from None
        if isinstance(reply, Failed):
            self._failed[client.index, key] = reply.message
            raise LoadFailedError(reply.message)
        self._failed.pop((client.index, key), None)

    async def _unload(self, client: EngineClient, key: ModelKey) -> None:
        self._failed.pop((client.index, key), None)
        if key in client.models:
            try:
                await client.request(Unload(0, *key), self._load_seconds)
            except DisconnectedError:
                return  # an engine that ended has freed its models
            except TimeoutError:
                log.error("model unload timed out", model=key[0], engine=client.index)
