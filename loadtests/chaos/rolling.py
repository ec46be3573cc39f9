"""A rolling restart of two servers behind a proxy, as an orchestrator does it."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from loadtests.chaos.load import Load, Seen
from loadtests.chaos.server import Server, Setup
from loadtests.servers import free_port

PROBE_SECONDS = 0.5
GRACE_SECONDS = 2.0
"""Seconds between draining a server and its SIGTERM, as with `preStop: sleep`."""
CONFIGURATION = """
global
    stats socket {socket} mode 600 level admin
defaults
    mode http
    timeout connect 2s
    timeout client 75s
    timeout server 75s
frontend callers
    bind 127.0.0.1:{port}
    default_backend servers
backend servers
    option httpchk GET /health/ready
    default-server check inter {interval}ms fall 1 rise 1
    server one 127.0.0.1:{one}
    server two 127.0.0.1:{two}
"""
"""Configuration without retries, so that every failed request is seen."""


def no_proxy() -> str | None:
    """Return the missing requirement for running a proxy, if any."""
    return None if shutil.which("haproxy") else "needs haproxy (Debian: haproxy)"


class _Proxy:
    """A proxy in front of two servers, whose states can be set."""

    def __init__(self, folder: Path, ports: dict[str, int]) -> None:
        self.port = free_port()
        self._socket = folder / "proxy.sock"
        configuration = folder / "proxy.cfg"
        interval = int(1000 * PROBE_SECONDS)
        configuration.write_text(
            CONFIGURATION.format(socket=self._socket, port=self.port, interval=interval, **ports)
        )
        self._process = subprocess.Popen(["haproxy", "-db", "-f", configuration])

    async def tell(self, server: str, state: str) -> None:
        """Set the state of a server: `ready`, or `drain` for no new requests."""
        reader, writer = await asyncio.open_unix_connection(self._socket)
        writer.write(f"set server servers/{server} state {state}\n".encode())
        error = (await reader.read()).decode().strip()
        writer.close()
        assert not error, error

    def stop(self) -> None:
        """Stop the proxy."""
        self._process.terminate()
        self._process.wait(10)


async def _start(port: int) -> Server:
    server = Server(Setup({"port": port, "engines": 1, "fronts": 1}))
    await server.until_whole()
    return server


@asynccontextmanager
async def _behind_proxy() -> AsyncIterator[tuple[_Proxy, dict[str, Server]]]:
    ports = {name: free_port() for name in ("one", "two")}
    servers = {}
    try:
        for name, port in ports.items():
            servers[name] = await _start(port)
        with tempfile.TemporaryDirectory() as folder:
            proxy = _Proxy(Path(folder), ports)
            try:
                yield proxy, servers
            finally:
                proxy.stop()
    finally:
        for server in servers.values():
            await server.stop()


async def rolling(repeats: int) -> Seen:
    """Drain, stop and replace each server under load."""
    async with _behind_proxy() as (proxy, servers):
        load, seen = Load(f"http://127.0.0.1:{proxy.port}"), Seen()
        await asyncio.sleep(2 * PROBE_SECONDS)
        await load.learn()

        async def work() -> None:
            for _ in range(max(1, repeats // 10)):
                for name in servers:
                    started = time.perf_counter()
                    await proxy.tell(name, "drain")
                    await asyncio.sleep(GRACE_SECONDS)
                    code = await servers[name].stop()
                    assert code == 0, f"the server ended with exit code {code}"
                    servers[name] = await _start(servers[name].port)
                    await proxy.tell(name, "ready")
                    await asyncio.sleep(2 * PROBE_SECONDS)
                    seen.recovery.append(time.perf_counter() - started)
            seen.notes.append(f"{len(seen.recovery)} servers replaced")

        await load.during(seen, work)
        return seen
