"""The engine process: `python -m service.engine RUN_DIR INDEX`."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import sys
from pathlib import Path

import torch
import uvloop

from budgetformer.cost_table import read_tables
from service import frames
from service.connection import Say, listening
from service.engine.core import EngineCore, EngineOptions, Reply
from service.engine.protocol import PROTOCOL, TO_ENGINE, BatchRan, Hello, ToFront, Watch
from service.observability.logs import configure_logs
from service.observability.traces import open_tracing
from service.process import engine_socket, exit_with_parent, receive_settings, resident_bytes
from service.settings import Settings

HEARTBEAT_SECONDS = 1.0


class EngineServer:
    """Speak with the fronts and the hub over a local socket on behalf of one core.

    Args:
        core: the engine.
        hang_seconds: a pass that takes longer hangs.
    """

    def __init__(self, core: EngineCore, hang_seconds: float = math.inf) -> None:
        self.core = core
        self._hang_seconds = hang_seconds
        self._peers: set[Reply] = set()
        self._watchers: set[Reply] = set()
        core.broadcast = self._broadcast

    async def serve(self, socket: Path) -> None:
        """Listen on `socket` until cancelled."""
        async with listening(socket, self._came), asyncio.TaskGroup() as tasks:
            tasks.create_task(self.core.run())
            tasks.create_task(self._beat())

    async def _came(self, reader: asyncio.StreamReader, reply: Say) -> None:
        reply(self._hello())
        self._peers.add(reply)
        try:
            while (message := await frames.read(reader, TO_ENGINE)) is not None:
                if isinstance(message, Watch):
                    self._watchers.add(reply)
                else:
                    self.core.receive(message, reply)
        finally:
            self._peers.discard(reply)
            self._watchers.discard(reply)
            self.core.forget(reply)

    async def _beat(self) -> None:
        while True:
            # Whose device does not come back is as good as dead, so its heart stops too.
            if self.core.busy_seconds < self._hang_seconds:
                self._broadcast(self.core.heartbeat(resident_bytes()))
            await asyncio.sleep(HEARTBEAT_SECONDS)

    def _broadcast(self, message: ToFront) -> None:
        for reply in self._watchers if isinstance(message, BatchRan) else self._peers:
            reply(message)

    def _hello(self) -> Hello:
        core = self.core
        return Hello(PROTOCOL, os.getpid(), core.device, str(torch.__version__), core.infos)


async def _main(run_dir: Path, index: int, settings: Settings) -> None:
    options = EngineOptions(
        settings.max_queue_items,
        settings.batch_milliseconds / 1000,
        settings.batch_items,
        quality_floor=settings.quality_floor,
        brownout_seconds=settings.brownout_queue_ms / 1000,
        model_queue_items=settings.model_queue_items,
    )
    tables = read_tables(settings.cost_tables) if settings.cost_tables else {}
    core = EngineCore(options, settings.resolved_device(), settings.dtype, tables)
    tracing = open_tracing(f"engine-{index}", follow=True)
    if tracing is not None:
        core.spans = tracing.pass_spans()
    server = EngineServer(core, settings.hang_seconds)
    serving = asyncio.create_task(server.serve(engine_socket(run_dir, index)))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, serving.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await serving
    if tracing is not None:
        tracing.close()


def main() -> None:
    """Run the engine."""
    run_dir, index = Path(sys.argv[1]), int(sys.argv[2])
    settings = receive_settings()
    exit_with_parent()
    configure_logs(settings.log_level, settings.log_format, f"engine-{index}")
    torch.set_num_threads(settings.threads_per_engine)
    uvloop.run(_main(run_dir, index, settings))


if __name__ == "__main__":
    main()
