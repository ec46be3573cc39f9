"""The client of the load tests counts correctly if the server closes connections."""

from __future__ import annotations

import asyncio
from typing import Any

from loadtests.openloop import Client

TIMEOUT = b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


class Impatient(asyncio.Protocol):
    """Closes its first connection before any request, and answers on the others."""

    connections = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        Impatient.connections += 1
        if Impatient.connections == 1:
            transport.write(TIMEOUT)
            transport.close()

    def data_received(self, _: bytes) -> None:
        self.transport.write(ANSWER)


async def test_connections_closed_by_the_server_are_replaced() -> None:
    loop = asyncio.get_running_loop()
    errors: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: errors.append(context))
    served = await loop.create_server(Impatient, "127.0.0.1", 0)
    async with served:
        host, port = served.sockets[0].getsockname()
        client = Client(f"http://{host}:{port}/classify", spin=False)
        await client.connect(1)
        while client.connections:
            await asyncio.sleep(0)
        phase = await client.closed("one", [client.request({})], 1, 0.05)
        client.close()
        while client.connections:
            await asyncio.sleep(0)
    assert errors == []
    assert phase.due > 0
    assert phase.statuses == {"200": phase.due}
