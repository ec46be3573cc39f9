"""The errors of the client."""

from __future__ import annotations

from budgetformer.errors import BudgetFormerError


class ClientError(BudgetFormerError):
    """Base class of the client's errors."""


class InputError(ClientError, ValueError):
    """The input cannot be sent: an item is not a text, or an option cannot be written as JSON."""


class UnreachableError(ClientError):
    """No connection could be opened, or it broke, and retries did not help."""


class DeadlineExceededError(ClientError):
    """The deadline of a call has passed."""


class ItemFailedError(ClientError):
    """One text failed, in a call whose result format cannot represent that."""


class ServerError(ClientError):
    """The service answered with an error.

    Attributes:
        status: HTTP status.
        message: description of the error; indices such as `input[3]` are those of the caller's
            list.
        code: error code, for programs.
        param: name of the invalid field.
        request_id: id of the request in the server's log.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(f"{message} (status {status}, request {request_id})")
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.request_id = request_id


class OverloadedError(ServerError):
    """The service is overloaded or has no engine (429, 503), and retries did not help.

    Attributes:
        retry_after: seconds of the server's Retry-After; None: it sent none.
    """

    retry_after: float | None = None
