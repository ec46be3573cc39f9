"""The engines, and the models that each is to have."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from pathlib import Path

import structlog

from service.ipc.connection import DisconnectedError, Streams, unreachable
from service.ipc.engine_client import EngineClient, Engines, Event, ModelKey
from service.ipc.engine_messages import Configure, Done, Failed, Hello, Load, Unload, Watch

log = structlog.get_logger()


class LoadFailedError(Exception):
    """An engine cannot load the checkpoint."""


class LoadTimeoutError(LoadFailedError):
    """The store or an engine did not answer in time; a later attempt may succeed."""


class NoEngineError(Exception):
    """No engine is there, or one died meanwhile."""


class Fleet(Engines):
    """All engines, told what to load: whenever one begins, it is told again.

    Args:
        sockets: where each one listens.
        observe: see `Engines`.
        failed: is called when `errors` may have changed.
        load_seconds: after which an engine's load is given up, and it serves on with what it has.
    """

    def __init__(
        self,
        sockets: list[Path],
        observe: Callable[[int, Event], None],
        failed: Callable[[], None] = lambda: None,
        load_seconds: float | None = None,
    ) -> None:
        super().__init__(sockets, self._event)
        self.wanted: dict[ModelKey, Path] = {}
        self._configuration: Configure | None = None
        self._observe = observe
        self._tell = failed
        self._load_seconds = load_seconds
        self._failed: dict[tuple[int, ModelKey], str] = {}

    @property
    def errors(self) -> list[str]:
        """Checkpoints that engines could not load, and why."""
        return sorted(set(self._failed.values()))

    def equipped(self, client: EngineClient) -> bool:
        """Whether an engine has tried to load all that is wanted."""
        return client.hello is not None and all(
            key in client.models or (client.index, key) in self._failed for key in self.wanted
        )

    async def meet(self, streams: Streams) -> None:
        """Count an engine that came by itself among these, until its connection ends.

        It has the lowest index that is free: who counts engines by it counts places.
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
        """Have every engine go by these settings, also each that begins later.

        Returns:
            The indexes of engines that do not go by them after so many seconds.
        """
        self._configuration = wanted
        clients = list(self.clients)
        done = await asyncio.gather(*(self._configure(one, seconds) for one in clients))
        return [client.index for client, did in zip(clients, done, strict=True) if not did]

    async def _configure(self, client: EngineClient, seconds: float | None = None) -> bool:
        if self._configuration is None:
            return True
        try:
            return isinstance(await client.ask(self._configuration, seconds), Done)
        except (DisconnectedError, TimeoutError):
            return False

    async def load(self, key: ModelKey, path: Path) -> None:
        """Have every engine load a checkpoint folder, beside what it has.

        One does it first: if that kills it, for want of memory say, the others go on serving.

        Raises:
            LoadFailedError: one could not, or not in time (LoadTimeoutError); then none keeps what
                it did not have before.
            NoEngineError: there is none, or one died.
        """
        clients = self.alive
        if not clients:
            raise NoEngineError
        for some in (clients[:1], clients[1:]):
            results = await asyncio.gather(
                *(self._load(client, key, path) for client in some), return_exceptions=True
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
            client.say(Watch())
            self._forget_failures(index)
            self._background.start(self._equip(client))
        self._observe(index, event)

    def _forget_failures(self, index: int) -> None:
        for failed in [key for key in self._failed if key[0] == index]:
            del self._failed[failed]

    async def _equip(self, client: EngineClient) -> None:
        await self._configure(client)
        for key, path in list(self.wanted.items()):
            if key in client.models:  # it lived through a lost connection
                continue
            try:
                await self._load(client, key, path)
            except LoadFailedError as error:
                log.error("model not loaded", model=key[0], engine=client.index, reason=str(error))
            except NoEngineError:
                return
        self._tell()

    async def _load(self, client: EngineClient, key: ModelKey, path: Path) -> None:
        try:
            reply = await client.ask(Load(0, str(path)), self._load_seconds)
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
                await client.ask(Unload(0, *key), self._load_seconds)
            except DisconnectedError:
                return  # what is gone has freed its models
            except TimeoutError:
                log.error("model unload timed out", model=key[0], engine=client.index)
