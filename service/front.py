"""A front process: `python -m service.front RUN_DIR DESCRIPTOR INDEX` serves HTTP on a socket."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn
from fastapi import FastAPI

from service.app import create_app
from service.observability.logs import configure_logs
from service.observability.traces import open_tracing
from service.process import engine_socket, exit_with_parent, hub_socket, receive_settings

if TYPE_CHECKING:
    from service.observability.otel import Tracing

KEEP_ALIVE_SECONDS = 75
"""Longer than the minute after which load balancers let an idle connection go, so that a request
never meets a connection that is just being closed."""


class _DrainingServer(uvicorn.Server):
    """Uvicorn, with the app told at the signal, before connections close, and spans kept."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, tracing: Tracing | None) -> None:
        super().__init__(config)
        self._app = app
        self._tracing = tracing

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._app.state.draining = True
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        if self._tracing is not None:  # here, as uvicorn ends the process by the signal it caught
            await asyncio.to_thread(self._tracing.close)


def main() -> None:
    """Run the front."""
    run_dir, descriptor, index = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    settings = receive_settings()
    exit_with_parent()
    configure_logs(settings.log_level, settings.log_format, f"front-{index}")
    sockets = [engine_socket(run_dir, i) for i in range(settings.engines)]
    tracing = open_tracing(f"front-{index}")
    provider = tracing.provider if tracing else None
    app = create_app(settings, sockets, hub_socket(run_dir), provider)
    config = uvicorn.Config(
        app,
        loop="uvloop",
        http="httptools",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=int(settings.drain_seconds) or 1,
    )
    _DrainingServer(config, app, tracing).run(sockets=[socket.socket(fileno=descriptor)])


if __name__ == "__main__":
    main()
