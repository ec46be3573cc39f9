"""Errors of the client."""

from __future__ import annotations

import pickle

from budgetformer.client import OverloadedError, ServerError


def test_a_server_error_can_be_pickled() -> None:
    error = OverloadedError(429, "the queue is full", "queue_full", "input[3]", "request-1")
    error.retry_after = 2.0
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is OverloadedError
    assert vars(copy) == vars(error)
    assert str(copy) == str(error) == "the queue is full (status 429, request request-1)"


def test_the_message_names_a_request_only_if_the_server_did() -> None:
    assert str(ServerError(502, "bad gateway")) == "bad gateway (status 502)"
