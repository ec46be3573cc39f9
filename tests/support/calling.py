"""KServe over gRPC: the server of a running service, and Triton's client for it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import InferInput
from tritonclient.grpc.aio import InferenceServerClient
from tritonclient.utils import InferenceServerException

from service.grpc.server import InferenceServer
from tests.support.processes import free_port
from tests.support.serving import Service

SERVICE = "/inference.GRPCInferenceService"


@dataclass
class Calling:
    """A gRPC server in this process, Triton's client, and a channel for other messages."""

    server: InferenceServer
    triton: InferenceServerClient
    channel: grpc.aio.Channel

    async def send(self, method: str, message: bytes, **options: Any) -> bytes:
        """Send bytes, which need not be a valid message."""
        call = self.channel.unary_unary(method if "/" in method else f"{SERVICE}/{method}")
        answer: bytes = await call(message, **options)
        return answer


@asynccontextmanager
async def calling(running: Service) -> AsyncIterator[Calling]:
    """Serve a service over gRPC."""
    port = free_port()
    settings = running.app.state.shared.settings.model_copy(update={"grpc_port": port})
    server = InferenceServer(settings)
    await server.start(running.app)
    address = f"{settings.host}:{port}"
    try:
        async with InferenceServerClient(address) as triton, unlimited(address) as channel:
            yield Calling(server, triton, channel)
    finally:
        await server.stop()


def unlimited(address: str) -> grpc.aio.Channel:
    """Return a channel that accepts answers of any size."""
    return grpc.aio.insecure_channel(address, [("grpc.max_receive_message_length", -1)])


def texts_input(texts: Sequence[str], name: str = "text", flat: bool = False) -> InferInput:
    """Return texts as a tensor."""
    values = np.array([text.encode() for text in texts], np.object_)
    return tensor(name, values if flat else values.reshape(-1, 1), "BYTES")


def tensor(name: str, values: Any, datatype: str) -> InferInput:
    """Return an input with these values."""
    created = InferInput(name, list(values.shape), datatype)
    created.set_data_from_numpy(values)
    return created


async def refused(asking: Any, status: str, match: str = "") -> dict[str, str]:
    """Check that a call ends with this status, and return its trailing metadata."""
    with pytest.raises((InferenceServerException, grpc.RpcError)) as caught:
        await asking
    error: Any = caught.value
    if isinstance(error, InferenceServerException):
        assert error.status() == f"StatusCode.{status}", error
        assert match in error.message()
        error = error.__cause__ or error.__context__
    else:
        assert error.code().name == status, error
        assert match in error.details()
    return {name: str(value) for name, value in error.trailing_metadata() or ()}
