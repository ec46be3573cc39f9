"""Messages between frontends and the hub; `service.ipc.frames` defines their encoding."""

from __future__ import annotations

from typing import ClassVar, Literal, TypeAlias

import msgspec

from service.ipc.frames import Message, decoder
from service.telemetry.counts import Difference


class ServedVersion(msgspec.Struct, frozen=True, array_like=True):
    """A served model version, and its folder.

    Attributes:
        candidate: whether it is being rolled out beside the served version.
        weight: share of the requests that a candidate answers.
        shadow: share of the other requests that a candidate also computes.
    """

    name: str
    version: int
    path: str
    candidate: bool = False
    weight: float = 0.0
    shadow: float = 0.0


class CatalogUpdate(Message, frozen=True):
    """The model catalog from now on, and the state of the server.

    Attributes:
        generation: number of the catalog, which rises with each change.
        models: versions to serve.
        loading: versions that are being loaded, as `name:version`.
        errors: skipped checkpoints and other problems, one line each.
        crash_loops: reason by name of each process that keeps ending.
    """

    generation: int
    models: list[ServedVersion]
    loading: list[str]
    errors: list[str]
    crash_loops: dict[str, str]


class HubHeartbeat(Message, frozen=True):
    """Heartbeat of the hub, sent once a second and to each new frontend.

    Attributes:
        frontends: number of connected frontends.
        tasks: error by name of each task of the supervisor and the hub; "": the task runs.
        equipped: whether every engine has loaded, or failed to load, all models; it stays true.
    """

    droppable: ClassVar[bool] = True

    frontends: int
    tasks: dict[str, str]
    equipped: bool


class FrontendHello(Message, frozen=True):
    """First message of a frontend, sent again when its keys change.

    The process that runs jobs is a frontend without routes.

    Attributes:
        frontend: unique id of the frontend, the same for each of its connections.
        pid: process id.
        routes, keys: all routes and names of keys, which are label values of its counts.
    """

    frontend: str
    pid: int
    routes: list[str]
    keys: list[str]


class CatalogApplied(Message, frozen=True):
    """New requests use the models of this generation."""

    generation: int


class Drained(Message, frozen=True):
    """No request uses models that this generation retired any more."""

    generation: int


class ChangeModel(Message, frozen=True):
    """Load a version (None: the highest) and serve it, or stop serving a model."""

    id: int
    action: Literal["load", "unload"]
    name: str
    version: int | None = None


class ChangeRollOut(Message, frozen=True):
    """Begin, change, end or show a roll-out; the answer is `ContentReply`, as JSON.

    Attributes:
        version: candidate; None: that of the running roll-out, or the highest version.
        given: settings of the roll-out, see `Versions.roll_out`.
    """

    id: int
    action: Literal["begin", "promote", "rollback", "show"]
    name: str
    version: int | None = None
    given: dict[str, float | None] = {}


class ModelChanged(Message, frozen=True):
    """A change was made in every frontend and engine; `label` names the model version."""

    id: int
    label: str


ChangeFailure: TypeAlias = Literal[
    "unknown_model", "broken_checkpoint", "engine_down", "load_timeout", "busy", "conflict",
    "already_served", "state_not_kept",
]  # fmt: skip


class ChangeFailed(Message, frozen=True):
    """A change failed, and nothing has changed."""

    id: int
    reason: ChangeFailure
    message: str


class SettingsUpdate(Message, frozen=True):
    """The settings of the server from now on, encoded by `encode_settings`."""

    generation: int
    settings: bytes


class SettingsApplied(Message, frozen=True):
    """This frontend has applied the settings of this generation."""

    generation: int


class ReloadSettings(Message, frozen=True):
    """Read the settings again, and apply in all processes those that need no restart."""

    id: int


class SettingsReloaded(Message, frozen=True):
    """The settings were read again.

    Attributes:
        changed: names of the settings that have changed.
        needs_restart: names of the settings that differ, but need a restart.
        waiting_for: names of the processes that have not applied the change yet.
    """

    id: int
    changed: list[str]
    needs_restart: list[str]
    waiting_for: list[str]


class SettingsRejected(Message, frozen=True):
    """Nothing has changed: the settings are invalid, or this server cannot reload settings."""

    id: int
    reason: Literal["invalid_settings", "not_supported"]
    message: str


class Scrape(Message, frozen=True):
    """Return the metrics, as OpenMetrics or as Prometheus text."""

    id: int
    openmetrics: bool


class GetRecentTraffic(Message, frozen=True):
    """Return the recent traffic of a model, as JSON; see `service.telemetry.recent_traffic`."""

    id: int
    model: str


class ContentReply(Message, frozen=True):
    """The answer to `Scrape`, `GetRecentTraffic` or `ChangeRollOut`."""

    id: int
    content: bytes
    media_type: str


class RequestFailed(Message, frozen=True):
    """The hub failed to answer; its log has the reason."""

    id: int
    message: str


class ProblemReport(Message, frozen=True):
    """A part of the server, such as the folder for jobs, fails; `reason` None: it has recovered."""

    source: str
    reason: str | None


class CountsReport(Message, frozen=True):
    """The counts of a frontend since its last report, sent again until acknowledged.

    Attributes:
        number: number that rises with each report, so that the hub counts none twice.
        difference: counts since the last report.
        cache_bytes: size of the answer cache.
        ready: whether the frontend can classify.
    """

    number: int
    difference: Difference
    cache_bytes: int = 0
    ready: bool = False


class ReportAcknowledged(Message, frozen=True):
    """The hub has counted the report with this number, and all before it."""

    number: int


ToHub: TypeAlias = (
    FrontendHello | CatalogApplied | Drained | ChangeModel | ChangeRollOut | Scrape
    | GetRecentTraffic | CountsReport | SettingsApplied | ReloadSettings | ProblemReport
)  # fmt: skip
FromHub: TypeAlias = (
    CatalogUpdate | HubHeartbeat | ReportAcknowledged | ModelChanged | ChangeFailed | ContentReply
    | RequestFailed | SettingsUpdate | SettingsReloaded | SettingsRejected
)  # fmt: skip

TO_HUB = decoder(ToHub)
FROM_HUB = decoder(FromHub)
