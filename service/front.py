"""The front process: `python -m service.front RUN_DIR DESCRIPTOR` serves HTTP on an open socket."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from types import FrameType

import structlog
import uvicorn
from fastapi import FastAPI

from service.app import create_app
from service.observability.logs import configure_logs
from service.observability.traces import open_tracing
from service.process import engine_socket, exit_with_parent, receive_settings

KEEP_ALIVE_SECONDS = 75
"""Longer than the minute after which load balancers let an idle connection go, so that a request
never meets a connection that is just being closed."""


class _DrainingServer(uvicorn.Server):
    """Uvicorn, with the app told at the signal, before connections close."""

    def __init__(self, config: uvicorn.Config, app: FastAPI) -> None:
        super().__init__(config)
        self._app = app

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._app.state.draining = True
        super().handle_exit(sig, frame)


def main() -> None:
    """Run the front."""
    run_dir, descriptor = Path(sys.argv[1]), int(sys.argv[2])
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    settings = receive_settings()
    exit_with_parent()
    configure_logs(settings.log_level, settings.log_format)
    structlog.contextvars.bind_contextvars(process="front")
    sockets = [engine_socket(run_dir, i) for i in range(settings.engines)]
    tracing = open_tracing("front")
    app = create_app(settings, sockets, tracing.provider if tracing else None)
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
    _DrainingServer(config, app).run(sockets=[socket.socket(fileno=descriptor)])
    if tracing is not None:
        tracing.close()


if __name__ == "__main__":
    main()
