"""Errors that clients see, and the function that converts them to responses."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from fastapi import Response
from pydantic import BaseModel

from service.http.responses import json_response

REASONS = {
    400: "invalid_request",
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    406: "not_acceptable",
    408: "request_timeout",
    409: "conflict",
    413: "too_large",
    415: "unsupported_media_type",
    422: "invalid_field",
    429: "overloaded",
    431: "headers_too_large",
    500: "internal_error",
    501: "not_supported",
    503: "unavailable",
    504: "timeout",
}


_MESSAGE_LENGTH, _SHOWN_LENGTH = 2000, 100


def shorten(name: str) -> str:
    """Return a name from a client, shortened for an error message."""
    return name if len(name) <= _SHOWN_LENGTH else f"{name[:_SHOWN_LENGTH]}..."


CLIENT_GONE = 499
"""Status in metrics and logs if the client has disconnected; never sent."""


class ClientGoneError(Exception):
    """The client closed its connection before the response."""


@dataclass
class ApiError(Exception):
    """An error response.

    Attributes:
        status: HTTP status.
        message: what is wrong, where, and what to do; never the text of an input.
        param: invalid field; None: not a single field.
        code: error code; None: that of the status in `REASONS`.
        retry_after: seconds for the header Retry-After; None: no header.
    """

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    retry_after: int | None = None

    def body(self) -> dict[str, Any]:
        """Return the error object."""
        kind = REASONS.get(self.status, "error")
        return {
            "message": self.message[:_MESSAGE_LENGTH],
            "type": kind,
            "param": self.param,
            "code": self.code or kind,
        }


class ErrorSchema(BaseModel):
    """Base of the schemas of errors, one for each API."""

    @classmethod
    @abstractmethod
    def content(cls, error: ApiError) -> dict[str, Any]:
        """Return an error in this schema, as plain data."""


def error_response(error: ApiError, schema: type[ErrorSchema]) -> Response:
    """Return the response for an error: status, headers, and a body in `schema`."""
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    if error.status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    return json_response(schema.content(error), error.status, headers)


CLASSIFYING = (400, 401, 403, 404, 408, 413, 415, 422, 429, 503, 504)
"""Statuses of the errors of classification routes."""


def errors_as(
    schema: type[ErrorSchema], statuses: Iterable[int] = ()
) -> dict[int | str, dict[str, Any]]:
    """Return the argument `responses` of routes that report errors in `schema`.

    OpenAPI lists `statuses` one by one; `Dialects` uses the schema for all errors.
    """
    any_other: dict[int | str, Any] = {
        "default": {"model": schema, "description": "Why there is no answer"}
    }
    return {status: {"model": schema} for status in statuses} | any_other
