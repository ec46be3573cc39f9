"""The fork server, which forks the engines: `python -m service.engine RUN_DIR`."""

from __future__ import annotations

if __name__ == "__main__":
    import service.without_rich  # noqa: F401

import asyncio
import contextlib
import signal
import sys
from pathlib import Path

import torch
import uvloop

from service.control.fork_server import fork_on_demand
from service.engine.server import EngineServer, core_of
from service.process import (
    engine_socket,
    exit_with_parent,
    freeze_garbage_collector,
    name_process,
    receive_settings,
)
from service.settings import Settings
from service.telemetry.logs import configure_logs
from service.telemetry.traces import open_tracing


async def _main(run_dir: Path, index: int, settings: Settings) -> None:
    shared = run_dir if settings.engines > 1 else None
    core = core_of(settings, _device(settings, index), shared=shared)
    tracing = open_tracing(f"engine-{index}", follow=True)
    if tracing is not None:
        core.spans = tracing.pass_spans()
    server = EngineServer(core, settings.hang_seconds)
    serving = asyncio.create_task(server.serve(engine_socket(run_dir, index)))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, serving.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await serving
    core.loader.stop_sharing()
    if tracing is not None:
        tracing.close()


def _device(settings: Settings, index: int) -> str:
    """Return the device of an engine; engines take GPUs in turn."""
    gpus = torch.cuda.device_count() if settings.device == "cuda" else 0
    return f"cuda:{index % gpus}" if gpus > 1 else settings.device


def main() -> None:
    """Run the fork server, and an engine in each process that it forks."""
    run_dir = Path(sys.argv[1])
    settings = receive_settings()
    freeze_garbage_collector()
    name_process("fork-server")
    index = fork_on_demand()
    if index is None:
        return
    name = f"engine-{index}"
    name_process(name)
    exit_with_parent()
    configure_logs(settings.log_level, settings.log_format, name)
    torch.set_num_threads(settings.threads_per_engine)
    uvloop.run(_main(run_dir, index, settings))


if __name__ == "__main__":
    main()
