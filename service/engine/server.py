"""Connect the core of an engine with frontends and the hub."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import structlog
import torch

from budgetformer.cost.table import read_tables
from service.engine.core import EngineCore, EngineOptions
from service.engine.device import EXIT_CODE, DeviceLostError
from service.engine.requests import Reply
from service.ipc.connection import Sender, handle_each, listening
from service.ipc.engine_messages import (
    PROTOCOL,
    TO_ENGINE,
    BatchReport,
    Classify,
    Configure,
    Done,
    Failed,
    Hello,
    Load,
    SubscribeBatches,
    ToEngine,
    ToFrontend,
    Unload,
)
from service.process import resident_bytes
from service.settings import Settings
from service.telemetry.logs import drain_logs, set_log_level

log = structlog.get_logger()

HEARTBEAT_SECONDS = 1.0


def core_of(
    settings: Settings, device: str, max_step: int | None = None, shared: Path | None = None
) -> EngineCore:
    """Create the core of an engine from the settings.

    Args:
        settings: settings of the whole server.
        device: device of the engine.
        max_step: see `EngineOptions`.
        shared: see `EngineCore`.

    Raises:
        CostTableError: the cost tables are invalid.
    """
    options = EngineOptions(
        settings.max_queue_items,
        settings.batch_milliseconds / 1000,
        settings.batch_items,
        quality_floor=settings.quality_floor,
        brownout_seconds=settings.brownout_queue_ms / 1000,
        model_queue_items=settings.queue_items(),
        model_floors=settings.model_floors(),
        warm_up_steps=settings.warm_up_steps(),
        max_step=max_step,
    )
    tables = read_tables(settings.cost_tables) if settings.cost_tables else {}
    return EngineCore(options, device, settings.dtype, tables, shared)


def _exit_at_once(code: int) -> None:
    drain_logs()
    os._exit(code)


class EngineServer:
    """Connections of an engine: messages to its core, answers, heartbeats and events.

    Args:
        core: core of the engine.
        hang_seconds: time after which a pass counts as hanging.
        exit: ends this process at once with an exit code when the device is lost. Connections are
            not closed and threads are not joined, since they may wait for the device.

    Attributes:
        receive: called with each message and a function that sends answers; by default the core's.
    """

    def __init__(
        self,
        core: EngineCore,
        hang_seconds: float = math.inf,
        exit: Callable[[int], object] = _exit_at_once,
    ) -> None:
        self.core = core
        self.receive: Callable[[ToEngine, Reply], None] = core.receive
        self._hang_seconds = hang_seconds
        self._exit = exit
        self._peers: set[Sender] = set()
        self._subscribers: dict[Sender, int] = {}
        """Number of reports dropped for each watcher since its last report."""
        core.broadcast = self._broadcast

    @property
    def hangs(self) -> bool:
        """Whether the device has not finished a pass in time."""
        return self.core.busy_seconds >= self._hang_seconds

    async def serve(self, socket: Path) -> None:
        """Listen on a local socket and compute, until cancelled."""
        async with listening(socket, self.serve_connection):
            await self.work()

    async def work(self) -> None:
        """Compute and send a heartbeat every second, until cancelled.

        If the device is lost, the process ends: frontends then use other engines, and the
        supervisor (or Ray) starts a new process.
        """
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self.core.run())
                tasks.create_task(self._beat())
        except* DeviceLostError as lost:
            log.critical(
                "device lost, engine stopped",
                device=self.core.device,
                reason=str(lost.exceptions[0]),
                exit_code=EXIT_CODE,
            )
            self._exit(EXIT_CODE)

    async def serve_connection(self, reader: asyncio.StreamReader, reply: Sender) -> None:
        """Handle the messages of one connection until it ends."""
        reply(self._hello())
        self._peers.add(reply)

        def handle(message: ToEngine) -> None:
            if isinstance(message, SubscribeBatches):
                self._subscribers[reply] = 0
            elif isinstance(message, Configure):
                set_log_level(message.log_level)
                self.core.configure(
                    dataclasses.replace(
                        self.core.options,
                        quality_floor=message.quality_floor,
                        model_floors=message.model_floors,
                        model_queue_items=message.queue_items,
                        warm_up_steps=message.warm_up_steps,
                    )
                )
                reply(Done(message.id))
            else:
                self.receive(message, reply)

        def failed(message: ToEngine, reason: str) -> None:
            if isinstance(message, Classify | Load | Unload | Configure):
                reply(Failed(message.id, reason))

        try:
            await handle_each(reader, TO_ENGINE, handle, failed, "client")
        finally:
            self._peers.discard(reply)
            self._subscribers.pop(reply, None)
            self.core.forget(reply)

    async def _beat(self) -> None:
        while True:
            if not self.hangs:
                self._broadcast(self.core.heartbeat(_memory_bytes(self.core.device)))
            await asyncio.sleep(HEARTBEAT_SECONDS)

    def _broadcast(self, message: ToFrontend) -> None:
        if not isinstance(message, BatchReport):
            for reply in self._peers:
                reply(message)
            return
        for reply, dropped in self._subscribers.items():
            report = msgspec.structs.replace(message, dropped=dropped) if dropped else message
            self._subscribers[reply] = 0 if reply(report) else dropped + 1

    def _hello(self) -> Hello:
        core = self.core
        return Hello(PROTOCOL, os.getpid(), core.device, str(torch.__version__), core.loader.infos)


def _memory_bytes(device: str) -> int:
    """Return the device memory that this process uses, in bytes."""
    if device.startswith("cuda"):
        return torch.cuda.memory_reserved(device)
    return resident_bytes()
