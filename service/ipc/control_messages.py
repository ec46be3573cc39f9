"""What fronts say to the hub, and it to them; see `service.ipc.frames` for the form."""

from __future__ import annotations

from typing import ClassVar, Literal, TypeAlias

import msgspec

from service.ipc.frames import Message, decoder

REASONS = ("queue_full", "deadline", "draining", "too_large", "rate")
"""Why requests are refused."""
DENIALS = ("no_key", "wrong_key", "missing_scope")
"""Why callers are turned away."""
BREAKS = ("too_many", "slow", "head_too_large", "malformed")
"""Why connections are ended before a request was there."""


class ServedVersion(msgspec.Struct, frozen=True, array_like=True):
    """A model version that is served, and its folder."""

    name: str
    version: int
    path: str


class Serving(Message, frozen=True):
    """What is served from now on; it replaces what the hub said before.

    `loading` names what may come next, as `name:version`; `errors` are checkpoints that are left
    out and other problems, each a line for people; `crash_loops` says of processes that do not
    stay up, by their name, why.
    """

    generation: int
    models: list[ServedVersion]
    loading: list[str]
    errors: list[str]
    crash_loops: dict[str, str]


class Alive(Message, frozen=True):
    """The hub handles messages; it says so once a second."""

    droppable: ClassVar[bool] = True


class Here(Message, frozen=True):
    """First message of a front: its process, and the routes that it counts requests by."""

    pid: int
    routes: list[str]


class Swapped(Message, frozen=True):
    """New requests meet the models of this generation."""

    generation: int


class Drained(Message, frozen=True):
    """No request is on its way any more that met the models before this generation."""

    generation: int


class ChangeModel(Message, frozen=True):
    """Load a version (None: the highest) and serve it, or stop serving a model."""

    id: int
    action: Literal["load", "unload"]
    name: str
    version: int | None = None


class Changed(Message, frozen=True):
    """A change was made in every front and engine: of this model version."""

    id: int
    label: str


class ChangeFailed(Message, frozen=True):
    """A change was not made, and everything is as it was."""

    id: int
    reason: Literal["unknown_model", "broken_checkpoint", "engine_down", "load_timeout", "busy"]
    message: str


class Scrape(Message, frozen=True):
    """Show the metrics, as OpenMetrics or as Prometheus text."""

    id: int
    openmetrics: bool


class TellRecent(Message, frozen=True):
    """Show what a model's texts took in the last minutes, as JSON."""

    id: int
    model: str


class Shown(Message, frozen=True):
    """What was to be shown."""

    id: int
    content: bytes
    media_type: str


class NotShown(Message, frozen=True):
    """The hub failed at a question; its log says more."""

    id: int
    message: str


class RequestEnded(Message, frozen=True):
    """A request has ended.

    Attributes:
        route: its template.
        outcome: how it ended.
        seconds: from the first byte to the last.
        traceparent: its place in a trace.
        refusal: why it was rejected, if it was: one of `REASONS`.
        denial: why its caller was turned away, if so: one of `DENIALS`.
        caller: name of the caller's key, where it is known.
    """

    route: str
    outcome: str
    seconds: float
    traceparent: str = ""
    refusal: str = ""
    denial: str = ""
    caller: str = ""


class ItemSpent(msgspec.Struct, frozen=True, array_like=True):
    """What one answered item took: its ladder step, heads, tokens and multiply-adds."""

    budget: int
    heads: int
    tokens: int
    macs: int
    dense_macs: int


class ItemsAnswered(Message, frozen=True):
    """The items of a request were answered.

    Attributes:
        model, version: by which model.
        items: what each took; those that failed are left out.
        heads_of_one: heads of the dense network.
        expected: share of the items that calibration answers at each ladder step; None: it is not
            known, and what happened counts as expected.
        stages: seconds of each stage of the request.
        truncated: items that were longer than the encoder reads.
        traceparent: the request's place in a trace.
    """

    model: str
    version: int
    items: list[ItemSpent]
    heads_of_one: int
    expected: dict[int, float] | None
    stages: dict[str, float]
    truncated: int
    traceparent: str = ""


class TextsAsked(Message, frozen=True):
    """A caller, by the name of its key, asked for so many texts."""

    caller: str
    texts: int


class KeysKnown(Message, frozen=True):
    """The names of all keys, from now on."""

    names: list[str]


class ConnectionEnded(Message, frozen=True):
    """A connection was ended before a request was there, for one of `BREAKS`."""

    reason: str


Observation: TypeAlias = RequestEnded | ItemsAnswered | TextsAsked | KeysKnown | ConnectionEnded


class Observed(Message, frozen=True):
    """What a front has seen since it last said so; it says so, if only of nothing, all the time.

    `dropped` counts what it had to drop meanwhile, because the hub did not read.
    """

    observations: list[Observation]
    dropped: int = 0


ToHub: TypeAlias = Here | Swapped | Drained | ChangeModel | Scrape | TellRecent | Observed
FromHub: TypeAlias = Serving | Alive | Changed | ChangeFailed | Shown | NotShown

TO_HUB = decoder(ToHub)
FROM_HUB = decoder(FromHub)
