"""Clients of the service: `Client` is blocking, `AsyncClient` has the same methods for asyncio.

They need the extra `budgetformer-serving[client]`, but neither torch nor Transformers.
"""

from __future__ import annotations

try:
    import httpx as _httpx  # noqa: F401
except ImportError as error:
    raise ImportError(
        "budgetformer.client needs httpx: pip install 'budgetformer-serving[client]'"
    ) from error

from budgetformer.client.asynchronous import AsyncClient
from budgetformer.client.blocking import Client
from budgetformer.client.calls import Options, Retry, Text
from budgetformer.client.errors import (
    ClientError,
    DeadlineExceededError,
    InputError,
    ItemFailedError,
    OverloadedError,
    ServerError,
    UnreachableError,
)
from budgetformer.client.jobs import JobOptions
from budgetformer.client.results import Classification, Failure, LabelScore, Result

__all__ = [
    "AsyncClient",
    "Classification",
    "Client",
    "ClientError",
    "DeadlineExceededError",
    "Failure",
    "InputError",
    "ItemFailedError",
    "JobOptions",
    "LabelScore",
    "Options",
    "OverloadedError",
    "Result",
    "Retry",
    "ServerError",
    "Text",
    "UnreachableError",
]
