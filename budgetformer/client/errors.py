"""Exceptions that the client raises."""

from __future__ import annotations

from budgetformer.errors import BudgetFormerError, readable


class ClientError(BudgetFormerError):
    """Base class of the client's errors."""


class InputError(ClientError, ValueError):
    """The input cannot be sent: an item is not a text, or an option cannot be written as JSON."""


class UnreachableError(ClientError):
    """The server could not be reached.

    Connecting failed or the connection broke, also after retries.
    """


class DeadlineExceededError(ClientError):
    """The deadline of a call has passed."""


class ItemFailedError(ClientError):
    """One item failed, and the call's result format has no place for the error of a single item."""


class ServerError(ClientError):
    """The service answered with an error.

    Attributes:
        status: HTTP status.
        message: description of the error; indices such as `input[3]` are those of the caller's
            list.
        code: error code, for programs.
        param: name of the invalid field.
        request_id: id of the request in the server's log; None if the server sent none.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(status, message, code, param, request_id)  # pickle calls with these
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.request_id = request_id

    def __str__(self) -> str:
        request = "" if self.request_id is None else f", request {self.request_id}"
        return readable(f"{self.message} (status {self.status}{request})")


class OverloadedError(ServerError):
    """The service is overloaded or has no engine (429, 503), and retries did not help.

    Attributes:
        retry_after: seconds to wait, from the Retry-After header; None if the server sent no such
            header.
    """

    retry_after: float | None = None
