"""The engine process: `python -m service.engine RUN_DIR INDEX`."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from pathlib import Path

import torch
import uvloop

from service.engine.server import EngineServer, core_of
from service.observability.logs import configure_logs
from service.observability.traces import open_tracing
from service.process import (
    engine_socket,
    exit_with_parent,
    keep_what_is_here,
    receive_settings,
)
from service.settings import Settings


async def _main(run_dir: Path, index: int, settings: Settings) -> None:
    core = core_of(settings, settings.resolved_device())
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
    keep_what_is_here()
    uvloop.run(_main(run_dir, index, settings))


if __name__ == "__main__":
    main()
