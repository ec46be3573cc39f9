"""What can go wrong between a client and the service."""

from __future__ import annotations

from budgetformer.errors import BudgetFormerError


class ClientError(BudgetFormerError):
    """Base class of the client's errors."""


class InputError(ClientError, ValueError):
    """The input cannot be sent: an item is not a text, or an option cannot be written as JSON."""


class UnreachableError(ClientError):
    """No connection could be made, or it broke, and trying again did not help."""


class DeadlineExceededError(ClientError):
    """The time that a call may take is over."""


class ItemFailedError(ClientError):
    """An item failed alone, where the shape of the answer has no place for that."""


class ServerError(ClientError):
    """The service answered with an error.

    Attributes:
        status: HTTP status.
        message: what was wrong; places such as `input[3]` count in the caller's list.
        code: a name for programs.
        param: the field that is to blame.
        request_id: the request's name in the server's log.
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
    """The service has no room or no engine (429, 503), and trying again did not help.

    Attributes:
        retry_after: seconds after which the service expects to have room; None: it did not say.
    """

    retry_after: float | None = None
