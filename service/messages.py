"""The meaning of every error code and log event, and the page that lists them.

`python -m service.messages docs/messages.md` writes the page.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple


class ErrorCode(NamedTuple):
    """Documentation of a value of `error.code`.

    Attributes:
        statuses: HTTP statuses of responses with this code.
        meaning: cause of the error.
        action: remedy for the caller.
    """

    statuses: tuple[int, ...]
    meaning: str
    action: str


ERROR_CODES = {
    "already_served": ErrorCode((422,), "This version is served already.", "Name another version."),
    "body_too_large": ErrorCode(
        (413,), "The request body is larger than `max_body_bytes`.", "Send fewer texts at a time."
    ),
    "broken_checkpoint": ErrorCode(
        (422,),
        "The checkpoint cannot be loaded; the message names the file and the cause.",
        "Check it with `budgetformer models verify`.",
    ),  # fmt: skip
    "busy": ErrorCode((503,), "Too many changes of models are waiting.", "Try again."),
    "conflict": ErrorCode(
        (409,),
        "The change does not fit the state of the roll-out.",
        "Read `GET /models/{name}/rollout`; promote or roll back first.",
    ),  # fmt: skip
    "deadline": ErrorCode(
        (429,),
        "The deadline cannot be met at the present load.",
        "Wait for `Retry-After`, or allow more time with `timeout_ms`.",
    ),  # fmt: skip
    "draining": ErrorCode(
        (503,), "The server is shutting down.", "Send the request to another instance."
    ),
    "engine_down": ErrorCode(
        (503,), "No engine is running; the supervisor restarts it.", "Try again."
    ),
    "engine_failed": ErrorCode(
        (503,),
        "The engine failed to handle the request.",
        "Try again; the server's log has the cause.",
    ),  # fmt: skip
    "headers_too_large": ErrorCode(
        (431,),
        "The request line and headers are larger than `max_header_bytes`.",
        "Send fewer headers.",
    ),  # fmt: skip
    "hub_down": ErrorCode(
        (503,),
        "The supervisor does not answer, so nothing can be changed or scraped.",
        "Try again.",
    ),  # fmt: skip
    "internal_error": ErrorCode(
        (500,), "The server has a fault.", "Report it with the line of the server's log."
    ),
    "invalid_encoding": ErrorCode(
        (400,), "The body is not compressed as `Content-Encoding` says.", "Fix the client."
    ),
    "invalid_field": ErrorCode(
        (400, 422), "A field has an invalid value; `param` names it.", "Fix the field."
    ),
    "invalid_header_length": ErrorCode(
        (400,),
        "`Inference-Header-Content-Length` is not the length of the JSON part.",
        "Fix the client.",
    ),  # fmt: skip
    "invalid_http": ErrorCode(
        (400,), "The bytes are not one unambiguous HTTP request.", "Fix the client or the proxy."
    ),
    "invalid_json": ErrorCode(
        (400,), "The body is not valid JSON; the message says where.", "Fix the client."
    ),
    "invalid_message": ErrorCode((400,), "The gRPC message cannot be decoded.", "Fix the client."),
    "invalid_settings": ErrorCode(
        (422,), "The settings are invalid, and nothing has changed.", "Fix the TOML file."
    ),
    "invalid_shape": ErrorCode(
        (400, 422),
        "A tensor's shape does not fit its values or the other inputs.",
        "Fix the tensor.",
    ),
    "item_failed": ErrorCode(
        (500,),
        "One text cannot be classified; `param` names it.",
        "Send the other texts without it, and report it.",
    ),  # fmt: skip
    "jobs_unavailable": ErrorCode(
        (503,),
        "The folder for jobs cannot be written.",
        "Make `state_dir` writable; `/health` has the reason.",
    ),
    "load_timeout": ErrorCode(
        (504,), "The store or an engine took longer than `load_timeout_seconds`.", "Try again."
    ),
    "loading": ErrorCode((503,), "The model is being loaded.", "Wait for `Retry-After`."),
    "method_not_allowed": ErrorCode(
        (405,), "The route has no such method.", "Use a method that the header `Allow` lists."
    ),
    "missing_field": ErrorCode(
        (400, 422), "A required field is missing; `param` names it.", "Add the field."
    ),
    "missing_scope": ErrorCode(
        (403,), "The key may not do this.", "Use a key with the scope that the message names."
    ),
    "no_key": ErrorCode((401,), "Authentication is required.", "Send a key."),
    "no_model": ErrorCode(
        (503,), "No model is served.", "Load one; `/health` shows what could not be loaded."
    ),
    "no_result": ErrorCode(
        (409,), "The job has no result: it is not finished, or it failed.", "Read `GET /jobs/{id}`."
    ),
    "no_such_quality": ErrorCode(
        (422,), "The model has no such quality level.", "Read its levels in `GET /models/{name}`."
    ),
    "not_acceptable": ErrorCode(
        (406,),
        "The request prefers an Arrow stream, but the server lacks pyarrow.",
        "Install the extra `arrow`, or accept JSON.",
    ),  # fmt: skip
    "not_found": ErrorCode((404,), "There is no such route.", "Read `/docs`."),
    "not_ready": ErrorCode((503,), "The server cannot classify yet.", "Wait for `Retry-After`."),
    "not_supported": ErrorCode(
        (501,),
        "A server on a Ray cluster has no jobs, and its settings cannot be reloaded.",
        "Classify texts with `/classify`; change settings with the deployment.",
    ),  # fmt: skip
    "queue_full": ErrorCode(
        (429,),
        "The queues of the engines are full.",
        "Wait for `Retry-After`, then send less at a time.",
    ),  # fmt: skip
    "rate": ErrorCode(
        (429,), "The key has spent its `texts_per_second`.", "Wait for `Retry-After`."
    ),
    "request_timeout": ErrorCode(
        (408,), "The request did not arrive within `receive_seconds`.", "Send it again, faster."
    ),
    "source_not_allowed": ErrorCode(
        (422,), "The URL is not under a prefix that `job_sources` allows.", "Upload the file."
    ),
    "state_not_kept": ErrorCode(
        (503,),
        "The decision cannot be written to `state_dir`, so nothing has changed.",
        "Make the folder writable.",
    ),  # fmt: skip
    "text_too_long": ErrorCode(
        (422,),
        "A text is longer than the server or the model takes; `param` names it.",
        "Shorten it, or leave `truncate` at true.",
    ),  # fmt: skip
    "timeout": ErrorCode(
        (504,), "The deadline passed before the answer was ready.", "Allow more time, or retry."
    ),
    "too_many_connections": ErrorCode(
        (503,), "The server has `max_connections` open.", "Keep connections open and share them."
    ),
    "too_many_items": ErrorCode(
        (413,),
        "The request has more texts or values than the server takes.",
        "Send fewer at a time.",
    ),  # fmt: skip
    "too_many_jobs": ErrorCode(
        (429,),
        "The server keeps `max_jobs` jobs, or `max_jobs_bytes` of their files.",
        "Remove jobs that are done with `DELETE /jobs/{id}`.",
    ),
    "too_many_requests": ErrorCode(
        (429,), "The key has `max_requests` requests in flight.", "Wait for `Retry-After`."
    ),
    "unknown_field": ErrorCode(
        (422,),
        "The request has a field that is not known; the message suggests the nearest.",
        "Remove or rename it.",
    ),  # fmt: skip
    "unknown_job": ErrorCode(
        (404,), "There is no such job, or it belongs to another key.", "Read `GET /jobs`."
    ),
    "unknown_model": ErrorCode(
        (404,),
        "No such model or version is served or stored; the message lists what is.",
        "Name one of those.",
    ),  # fmt: skip
    "unknown_service": ErrorCode(
        (404,), "gRPC: there is no such service.", "Leave its name empty."
    ),
    "unsupported_media_type": ErrorCode(
        (415,),
        "The content type or compression is not supported.",
        "Send `application/json`, uncompressed or with gzip or deflate.",
    ),  # fmt: skip
    "wrong_key": ErrorCode((401,), "The key is not known.", "Send a valid key."),
}
"""Documentation of each error code."""

EVENTS = {
    "answer lost": (
        "An answer between two processes could not be decoded or delivered; its caller gets an "
        "error."
    ),
    "background task failed": (
        "A task of one request or change failed unexpectedly; `exc_info` has the cause. Report it."
    ),
    "batch size reduced: out of memory": (
        "The device ran out of memory; batches hold fewer texts until there is room."
    ),
    "batch size restored": "There is room again; batches grow towards their limit.",
    "candidate failed": (
        "A candidate of a roll-out failed at shadow texts; they are counted as failed."
    ),
    "checkpoint copied": "A version was copied from the remote store.",
    "checkpoint copy failed": (
        "A version could not be copied from the remote store; it is tried again with the next poll."
    ),
    "checkpoint skipped": (
        "A checkpoint is damaged and not served; the reason names the file. Other models are "
        "served."
    ),
    "connection closed: bad frame": "A process sent bytes that are not a message.",
    "connection closed: the peer does not read": (
        "A process does not read its messages; `unsent` bytes were waiting."
    ),
    "connection closed: unexpected error": (
        "Reading a connection between processes failed; it is opened again."
    ),
    "connection lost: unexpected error": (
        "A connection between processes failed; it is opened again."
    ),
    "connections not accepted": (
        "The process has no file descriptors or memory for more connections; it tries again."
    ),
    "cost table ignored: measured on another device or precision": (
        "Prices are measured while serving instead."
    ),
    "counts not recorded": "A metric could not be counted; the others are.",
    "device lost, engine stopped": (
        "The GPU no longer runs operations of the engine. The supervisor restarts the engine."
    ),
    "draining": ("The server was stopped; it answers requests in flight for at most `seconds`."),
    "engine died with a request in flight": (
        "The request is sent once more, to another engine or to the restarted one."
    ),
    "engine list not received from the hub": (
        "A frontend on a cluster did not receive the list of replicas; it uses the last list."
    ),
    "environment variables of other services ignored": (
        "Kubernetes sets such variables; they are not settings."
    ),
    "fork server killed: broken pipe": (
        "Its engines end with it; the supervisor starts all of them again."
    ),
    "fork server killed: not responding": (
        "Its engines end with it; the supervisor starts all of them again."
    ),
    "fork server: unexpected output ignored": (
        "The fork server wrote a line that is not an answer."
    ),
    "frontends did not apply the model catalog in time": (
        "Frontends with these process ids still serve the models before the change."
    ),
    "item failed": "One text of a batch could not be classified; the others were.",
    "key limited by each frontend alone: too many key names": (
        "The table of shared limits is full; each frontend applies the limits of this key alone."
    ),
    "keys not reloaded": "The key file is invalid; the keys before it stay valid.",
    "keys reloaded": "The key file has changed and was read.",
    "message handling failed": "A process could not handle a message; its sender gets an error.",
    "model catalog not applied": "A frontend could not apply a change of models; it tries again.",
    "model change failed": (
        "Loading, unloading or rolling out failed unexpectedly; everything is as it was."
    ),
    "model load failed": "An engine failed unexpectedly while it loaded a checkpoint.",
    "model load timed out": "An engine did not load a checkpoint in time; it serves what it has.",
    "model loaded": "An engine has loaded and warmed a version.",
    "model not loaded": "An engine that started cannot load a version that is to be served.",
    "model unload timed out": "An engine did not free a version in time.",
    "new version accepted": (
        "The poll of the store found a higher version; it is served or rolled out."
    ),
    "new version rejected": (
        "The poll of the store found a version that cannot be loaded; it is tried again when "
        "its files change."
    ),
    "open-file limit below connection limit": (
        "The process may open fewer files than `max_connections`; raise `ulimit -n`."
    ),
    "problem reported": (
        "A part of the server has a problem; `/health` shows it until it is solved."
    ),
    "problem resolved": "The problem that was reported is gone.",
    "process down": (
        "A process ended or could not be started; it is started again after `restart_in` seconds."
    ),
    "process killed: did not end in time": "The process did not end in time after SIGTERM.",
    "process killed: not responding": (
        "The process sent nothing for `hang_seconds`; it is started again."
    ),
    "job cancelled": "A job was cancelled by its caller; its files are removed.",
    "job ended": "A job has finished or failed; `reason` says why, if it failed.",
    "job failed: unexpected error": "A job met a fault of the server. Report it.",
    "job started": "The process for jobs has started or resumed a job.",
    "ready": "The server can classify for the first time.",
    "replica died with a request in flight": "On a cluster: the request is sent once more.",
    "replica ended with a request in flight": "On a cluster: the request is sent once more.",
    "replica failed": "On a cluster: a replica answered with an error.",
    "request": (
        "A request was answered: route, status, outcome, milliseconds, key, client. Never its "
        "texts."
    ),
    "roll-out ended": "It was promoted, rolled back, or stopped by itself; `reason` says why.",
    "roll-out started": "A candidate is served beside the present version.",
    "serving on a cluster": "The server listens at this address.",
    "settings for models that are not served": (
        "Those models may be loaded later; or their names are wrong."
    ),
    "settings not applied": "A frontend could not apply new settings; the old ones stay in force.",
    "settings not reloaded": "The settings are invalid; the old ones stay in force.",
    "settings reloaded": (
        "New settings are in force; `needs_restart` names those that need a restart."
    ),
    "starting": "The server starts its processes.",
    "stopped": "The server has ended.",
    "task failed": (
        "A task of the supervisor failed; it is started again after `restart_in` seconds."
    ),
    "unexpected error": "A request met a fault of the server and was answered 500. Report it.",
    "unresponsive engine disconnected": (
        "An engine sent nothing for some seconds; its requests are sent to another one."
    ),
    "connection closed: peer not understood": (
        "The process belongs to another version of the program; the connection is not used."
    ),
    "weights not shared": (
        "The engine holds its own copy of the weights, since shared memory is not available."
    ),
}
"""Meaning of each log event; the field `level` says how serious it is."""


def page() -> str:
    """Return the page, as Markdown."""
    lines = [
        "# Error codes and log events",
        "",
        "`python -m service.messages docs/messages.md` writes this page from the code.",
        "",
        "## Error codes",
        "`error.code` of an answer that is not 2xx ([shape](api.md#errors)).",
        "",
        "| code | status | meaning | what to do |",
        "|---|---|---|---|",
        *(
            f"| `{code}` | {', '.join(map(str, statuses))} | {meaning} | {action} |"
            for code, (statuses, meaning, action) in sorted(ERROR_CODES.items())
        ),
        "",
        "## Log events",
        "The field `event` of a log line. No line holds a text that a caller sent.",
        "",
        "| event | meaning |",
        "|---|---|",
        *(f"| `{event}` | {meaning} |" for event, meaning in sorted(EVENTS.items())),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the page to the file named on the command line."""
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
