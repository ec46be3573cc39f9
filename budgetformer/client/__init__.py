"""A client of the service: `Client` blocks, `AsyncClient` awaits; otherwise they are the same.

It is an extra of the distribution, `budgetformer-serving[client]`, and needs neither torch nor
Transformers in its process.
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
