"""What frontends say to the hub, and it to them; see `service.ipc.frames` for the form."""

from __future__ import annotations

from typing import ClassVar, Literal, TypeAlias

import msgspec

from service.ipc.frames import Message, decoder
from service.telemetry.counts import Difference


class ServedVersion(msgspec.Struct, frozen=True, array_like=True):
    """A model version that is served, and its folder.

    Attributes:
        candidate: it is being rolled out beside the version that is served.
        weight: share of the requests that it answers as a candidate.
        shadow: share of the other requests that it computes too.
    """

    name: str
    version: int
    path: str
    candidate: bool = False
    weight: float = 0.0
    shadow: float = 0.0


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
    """The hub handles messages; it says so once a second, and to each new frontend.

    Attributes:
        frontends: how many are connected to it.
        tasks: those of the supervisor and the hub, by name: why each one fails, "" if it runs.
        equipped: every engine has loaded, or failed to load, all models; it stays true.
    """

    droppable: ClassVar[bool] = True

    frontends: int
    tasks: dict[str, str]
    equipped: bool


class Here(Message, frozen=True):
    """First message of a frontend, sent again when its keys change.

    The process that runs jobs is a frontend without routes.

    Attributes:
        frontend: tells it from all others, also when its connection is made anew.
        pid: its process.
        routes, keys: that it counts requests by; all that there are.
    """

    frontend: str
    pid: int
    routes: list[str]
    keys: list[str]


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


class ChangeRollOut(Message, frozen=True):
    """Begin or change a roll-out, end it, or show the last one; the answer is `Shown`, as JSON.

    `version` None: that of the running roll-out, or the highest. `given`: see `Versions.roll_out`.
    """

    id: int
    action: Literal["begin", "promote", "rollback", "show"]
    name: str
    version: int | None = None
    given: dict[str, float | None] = {}


class Changed(Message, frozen=True):
    """A change was made in every frontend and engine: of this model version."""

    id: int
    label: str


ChangeFailure: TypeAlias = Literal[
    "unknown_model", "broken_checkpoint", "engine_down", "load_timeout", "busy", "conflict",
    "already_served", "state_not_kept",
]  # fmt: skip


class ChangeFailed(Message, frozen=True):
    """A change was not made, and everything is as it was."""

    id: int
    reason: ChangeFailure
    message: str


class NewSettings(Message, frozen=True):
    """The settings of the whole server from now on, as `encode_settings` writes them."""

    generation: int
    settings: bytes


class SettingsTaken(Message, frozen=True):
    """This frontend goes by the settings of this generation."""

    generation: int


class ReloadSettings(Message, frozen=True):
    """Read the settings again, and have all processes take over those that may change."""

    id: int


class SettingsReloaded(Message, frozen=True):
    """The settings were read again.

    Attributes:
        changed: names of settings that changed.
        needs_restart: names of settings that differ and stay as they were.
        waiting_for: processes that have not taken the change over yet.
    """

    id: int
    changed: list[str]
    needs_restart: list[str]
    waiting_for: list[str]


class SettingsRefused(Message, frozen=True):
    """The settings as they are now are invalid, so nothing changed; or they cannot be reloaded."""

    id: int
    reason: Literal["invalid_settings", "not_supported"]
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


class Trouble(Message, frozen=True):
    """A part of the server, such as the folder of jobs, fails (no reason: it does no more)."""

    source: str
    reason: str | None


class Report(Message, frozen=True):
    """What a frontend counted since its report before; sent again until it is acknowledged.

    `number` rises from report to report, so the hub counts none twice. `cache_bytes` is the size of
    the answers that it keeps, `ready` whether it can classify.
    """

    number: int
    difference: Difference
    cache_bytes: int = 0
    ready: bool = False


class Acknowledged(Message, frozen=True):
    """The hub has counted the report of this number, and those before it."""

    number: int


ToHub: TypeAlias = (
    Here | Swapped | Drained | ChangeModel | ChangeRollOut | Scrape | TellRecent | Report
    | SettingsTaken | ReloadSettings | Trouble
)  # fmt: skip
FromHub: TypeAlias = (
    Serving | Alive | Acknowledged | Changed | ChangeFailed | Shown | NotShown | NewSettings
    | SettingsReloaded | SettingsRefused
)  # fmt: skip

TO_HUB = decoder(ToHub)
FROM_HUB = decoder(FromHub)
