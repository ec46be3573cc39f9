"""A frontend process, which serves HTTP on sockets that it shares with the other frontends.

`python -m service.frontend RUN_DIR INDEX USAGE LISTENER [METRICS_LISTENER]`

The last three are file descriptors: of the shared file for the usage of keys, of the listening
socket for requests, and of the one for probes and metrics.
"""

from __future__ import annotations

if __name__ == "__main__":
    import service.without_rich  # noqa: F401

import asyncio
import contextlib
import os
import resource
import socket
import ssl
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import structlog
import uvicorn
from fastapi import FastAPI

from service.http.acceptor import Acceptor
from service.http.admission import Admission
from service.http.app import create_app, protocol_of
from service.http.private import new_protocol, open_connections
from service.ipc.engine_client import Engines
from service.key_usage import KeyUsage
from service.process import (
    collect_seldom,
    engine_socket,
    exit_with_parent,
    freeze_garbage_collector,
    hub_socket,
    name_process,
    receive_settings,
)
from service.settings import Settings
from service.telemetry.logs import configure_logs, drain_logs, set_log_level
from service.telemetry.traces import open_tracing

if TYPE_CHECKING:
    from service.grpc.server import InferenceServer
    from service.telemetry.otel import Tracing

log = structlog.get_logger()

KEEP_ALIVE_SECONDS = 75
"""Longer than the 60 s after which load balancers close an idle connection, so that a request is
never sent to a connection that the server is closing."""
SPARE_DESCRIPTORS = 256
"""Maximum number of open files of a frontend besides its connections."""


class _SharedServer(uvicorn.Server):
    """Uvicorn on a listening socket that it shares with the other frontends.

    Args:
        config: configuration of uvicorn.
        app: application.
        listener: listening socket.
        seconds: time limit of a TLS handshake.
    """

    def __init__(
        self, config: uvicorn.Config, app: FastAPI, listener: socket.socket, seconds: float
    ) -> None:
        super().__init__(config)
        self._app = app
        self._acceptor = Acceptor(listener, seconds)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._acceptor.start(partial(new_protocol, self), self.config.ssl, self._full)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._acceptor.close()
        await super().shutdown(sockets)

    def renew_certificates(self, settings: Settings) -> None:
        """Read the certificates again, for new connections.

        Raises:
            OSError: a file cannot be used; the old certificates stay in use.
        """
        if settings.tls_cert is not None:
            fresh = uvicorn.Config(self._app, log_config=None, **_tls(settings))
            fresh.load()
            assert fresh.ssl is not None
            self._acceptor.encrypt(fresh.ssl)

    def _full(self) -> bool:
        admission: Admission = self._app.state.shared.admission
        return admission.closes_at_once(open_connections(self))


class _SideServer(_SharedServer):
    """Uvicorn on a second port, which leaves signals to the server on the first."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _DrainingServer(_SharedServer):
    """Uvicorn with a graceful shutdown.

    At the signal, `admission.draining` is set. Then the gRPC server drains, then this server, then
    the server on the second port stops. At last, spans and logs are flushed.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        app: FastAPI,
        listener: socket.socket,
        seconds: float,
        tracing: Tracing | None,
        side: _SideServer | None,
        grpc: InferenceServer | None,
    ) -> None:
        super().__init__(config, app, listener, seconds)
        self._tracing = tracing
        self._side = side
        self._grpc = grpc
        self._side_task: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._side is not None:
            self._side_task = asyncio.create_task(self._side.serve([]))
        if self._grpc is not None:
            await self._grpc.start(self._app)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._app.state.shared.admission.draining = True
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._grpc is not None:  # before uvicorn's shutdown, which ends the application
            self._acceptor.close()
            await self._grpc.stop()
        await super().shutdown(sockets)
        if self._side is not None and self._side_task is not None:
            self._side.should_exit = True
            await self._side_task
        # Here and not after `run`: uvicorn then raises the signal again, which ends the process.
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.close)
        await asyncio.to_thread(drain_logs)


def main() -> None:
    """Run the frontend."""
    run_dir, index = Path(sys.argv[1]), int(sys.argv[2])
    usage = int(sys.argv[3])
    listener, *side_listeners = (socket.socket(fileno=fd) for fd in map(int, sys.argv[4:]))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    settings = receive_settings()
    exit_with_parent()
    name = f"frontend-{index}"
    name_process(name)
    configure_logs(settings.log_level, settings.log_format, name)
    sockets = [engine_socket(run_dir, i) for i in range(settings.engines)]
    tracing = open_tracing(name)
    provider = tracing.provider if tracing else None
    engines = Engines(sockets, first=index)
    shared = run_dir if settings.fronts > 1 else None
    counted = KeyUsage(usage, settings.fronts, index)
    grpc = _grpc_server(settings)
    labels = grpc.labels if grpc else ()
    app = create_app(settings, engines, hub_socket(run_dir), provider, shared, labels, counted)
    _raise_descriptors(settings.max_connections * (1 if grpc is None else 2))
    common: dict[str, Any] = {
        "loop": "uvloop",
        "http": protocol_of(app, settings),
        "ws": "none",
        "log_config": None,
        "access_log": False,
        "server_header": False,
        # Forwarded headers are ignored without `trusted_proxies`; uvicorn would trust 127.0.0.1.
        "proxy_headers": bool(settings.trusted_proxies),
        "forwarded_allow_ips": settings.trusted_proxies,
        "timeout_keep_alive": KEEP_ALIVE_SECONDS,
        "timeout_graceful_shutdown": int(settings.drain_seconds) or 1,
    }
    config = uvicorn.Config(app, lifespan="on", **common, **_tls(settings))
    seconds, side = settings.receive_seconds, None
    for side_listener in side_listeners:
        side_config = uvicorn.Config(app, lifespan="off", **common)
        side = _SideServer(side_config, app, side_listener, seconds)
    server = _DrainingServer(config, app, listener, seconds, tracing, side, grpc)
    app.state.shared.on_settings += [
        server.renew_certificates, lambda changed: set_log_level(changed.log_level),
    ]  # fmt: skip
    if grpc is not None:
        app.state.shared.on_settings.append(grpc.renew_certificates)
    freeze_garbage_collector()
    collect_seldom()
    server.run(sockets=[])  # the acceptors accept all connections


def _grpc_server(settings: Settings) -> InferenceServer | None:
    if settings.grpc_port is None:
        return None
    # gRPC's C library would write a line that is not a log event for each failed handshake.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from service.grpc.server import InferenceServer

    return InferenceServer(settings)


def _tls(settings: Settings) -> dict[str, Any]:
    """Return uvicorn's options for TLS."""
    if settings.tls_cert is None:
        return {}
    options = {"ssl_certfile": settings.tls_cert, "ssl_keyfile": settings.tls_key}
    if settings.tls_client_ca is None:
        return options
    return options | {"ssl_ca_certs": settings.tls_client_ca, "ssl_cert_reqs": ssl.CERT_REQUIRED}


def _raise_descriptors(connections: int) -> None:
    """Raise the limit of open files to what the connections need, up to the hard limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + SPARE_DESCRIPTORS
    limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    if limit < wanted:
        log.warning("open-file limit below connection limit", files=limit, connections=connections)


if __name__ == "__main__":
    main()
