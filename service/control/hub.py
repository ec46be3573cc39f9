"""The hub: connections of the frontends, and the handling of their messages."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path

import msgspec
import structlog
from prometheus_client import exposition
from prometheus_client.openmetrics import exposition as openmetrics

from budgetformer.errors import BudgetFormerError, CheckpointError
from budgetformer.inference.policy import QualityName
from service.background import Background, run_forever
from service.control.catalog import Catalog, UnknownModelError
from service.control.deployment import Deployment
from service.control.engine_watch import EngineWatch
from service.control.fleet import Fleet, LoadFailedError, LoadTimeoutError, NoEngineError
from service.control.frontends import FrontendPeer, Frontends
from service.control.served_state import StateError
from service.control.versions import RollOutConflictError, RollOutError, Versions
from service.ipc.connection import Sender, handle_each, listening
from service.ipc.control_messages import (
    TO_HUB,
    CatalogApplied,
    CatalogUpdate,
    ChangeFailed,
    ChangeFailure,
    ChangeModel,
    ChangeRollOut,
    ContentReply,
    CountsReport,
    Drained,
    FrontendHello,
    GetRecentTraffic,
    HubHeartbeat,
    ModelChanged,
    ProblemReport,
    ReloadSettings,
    ReportAcknowledged,
    RequestFailed,
    Scrape,
    SettingsApplied,
    SettingsRejected,
    SettingsReloaded,
    SettingsUpdate,
    ToHub,
)
from service.ipc.engine_messages import Configure
from service.process import encode_settings
from service.scheduling.brownout import kept_above
from service.settings import Settings
from service.telemetry.metrics import Metrics
from service.telemetry.processes import Family, only_this_process
from service.telemetry.recent_traffic import RecentTraffic

log = structlog.get_logger()

SETTINGS_PATIENCE = 5.0
"""Longest time that a reload waits for all processes, in seconds; late ones apply the settings
afterwards."""
BEAT_SECONDS = 1.0
MAX_CHANGES = 16
"""Most model changes that wait for the present one."""
_REASONS: tuple[tuple[type[Exception], ChangeFailure], ...] = (
    (UnknownModelError, "unknown_model"),
    (LoadTimeoutError, "load_timeout"),
    (NoEngineError, "engine_down"),
    (RollOutConflictError, "conflict"),
    (RollOutError, "already_served"),
    (StateError, "state_not_kept"),
    (CheckpointError, "broken_checkpoint"),
    (LoadFailedError, "broken_checkpoint"),
)
"""Reason to send for each kind of error of a change; the first match counts."""
MAX_FRONTENDS = 1000
"""Most frontends whose last report number is kept; the one that reported longest ago is dropped."""


class Hub:
    """Owner of the metrics and of the model catalog, which it changes on request.

    Args:
        settings: settings of the whole server.
        catalog: versions to serve at the start.
        sockets: sockets of the engines; more engines may connect by themselves (`Fleet.add`).
        family: returns the processes of the server.

    Attributes:
        settings: settings in force.
        tasks: names of the tasks that run in this process, for `/health`.
        ready: set once a frontend can classify.
        reload: reads the settings again when a caller asks for it; raises BudgetFormerError if they
            are invalid. None: this server cannot reload its settings.
    """

    def __init__(
        self,
        settings: Settings,
        catalog: Catalog,
        sockets: list[Path],
        family: Family = only_this_process,
    ) -> None:
        self.settings = settings
        self.tasks: list[str] = []
        self.ready = asyncio.Event()
        self.reload: Callable[[], Awaitable[SettingsReloaded]] | None = None
        self.metrics = Metrics(family)
        self.metrics.register_engines(len(sockets))
        self.catalog = catalog
        self.recent = RecentTraffic(self.metrics)
        self.watch = EngineWatch(self.metrics, self.catalog, self._level_shown)
        self.fleet = Fleet(
            sockets, self.watch, self._broadcast_catalog, settings.load_timeout_seconds
        )
        self.frontends = Frontends()
        self.deployment = Deployment(
            settings,
            catalog,
            self.fleet,
            self.watch,
            self.metrics,
            self.frontends,
            self._broadcast_catalog,
        )
        self.versions = Versions(
            settings, catalog, self.deployment, self.metrics, self.report_problem
        )
        self._family = family
        self._crash_loops: dict[str, str] = {}
        self._problems: dict[str, list[str]] = {}
        self._changes = 0
        self._reported: dict[str, int] = {}
        self._equipped = False
        self._settings_generation = 0
        self._background = Background()
        for problem in self.catalog.errors:
            log.error("checkpoint skipped", reason=problem)
        self._name_unserved()

    def _name_unserved(self) -> None:
        """Log the models that have settings but are not served."""
        if unserved := sorted(self.settings.model_settings.keys() - self.catalog.served.keys()):
            log.warning("settings for models that are not served", models=unserved)

    def _level_shown(self, model: str, level: QualityName) -> QualityName | None:
        """Return the level of a model, given the level that the load allows; None: it is fixed."""
        if self.settings.quality_of(model) != "auto":
            return None
        return kept_above(self.settings.floor_of(model), level)

    async def serve(self, socket: Path | None = None) -> None:
        """Run the hub until cancelled.

        Args:
            socket: socket to listen on; None: the caller passes connections to `serve_frontend`.
        """
        self.fleet.start()
        tasks = {
            "hub-recent": self.recent.keep,
            "hub-beat": self._beat,
            "hub-rollouts": self.versions.judge,
        }
        self.tasks += tasks
        for name, work in tasks.items():
            self._background.start(run_forever(name, work, self.report_problem))
        try:
            async with listening(socket, self.serve_frontend) if socket else nullcontext():
                await asyncio.Event().wait()
        finally:
            await self._background.stop()
            await self.versions.stop()
            await self.deployment.stop()
            await self.fleet.stop()

    def report_crash_loop(self, process: str, reason: str | None) -> None:
        """Show in `/health` why a process does not stay up; None: it stays up again."""
        before = self._crash_loops.get(process)
        if reason is None:
            self._crash_loops.pop(process, None)
        else:
            self._crash_loops[process] = reason
        if self._crash_loops.get(process) != before:
            self._broadcast_catalog()

    def report_problem(self, source: str, reason: str | None) -> None:
        """Show in `/health` why a part of the server fails; None: it works again."""
        self.report_problems(source, [] if reason is None else [reason])

    def report_problems(self, source: str, problems: list[str]) -> None:
        """Show all problems of a part of the server in `/health`, and log those that are new."""
        before = self._problems.pop(source, [])
        if problems:
            self._problems[source] = problems
        for problem in problems:
            if problem not in before:
                log.error("problem reported", source=source, reason=problem)
        if before and not problems:
            log.info("problem resolved", source=source)
        if problems != before:
            self._broadcast_catalog()

    async def _beat(self) -> None:
        """Send the state of the server to the frontends once a second, and remove old metrics."""
        while True:
            self.frontends.broadcast(self._heartbeat())
            self.deployment.forget_retired(time.monotonic())
            await asyncio.sleep(BEAT_SECONDS)

    def _heartbeat(self) -> HubHeartbeat:
        """Return the message with the state of the server's parts."""
        self._equipped = self._equipped or all(map(self.fleet.equipped, self.fleet.clients))
        connected = sum(frontend.serves for frontend in self.frontends)
        tasks = {name: "; ".join(self._problems.get(name, [])) for name in self.tasks}
        return HubHeartbeat(connected, tasks, self._equipped)

    # Changes of settings

    async def configure(self, settings: Settings) -> list[str]:
        """Have every frontend and engine apply settings, including processes that start later.

        Returns:
            The names of the processes that have not applied them after `SETTINGS_PATIENCE`.
        """
        self.settings = settings
        self._name_unserved()
        self.deployment.configure(settings)
        self.versions.configure(settings)
        self._settings_generation += 1
        generation = self._settings_generation
        self.frontends.broadcast(self._new_settings())
        wanted = Configure(
            0, settings.log_level, settings.quality_floor, settings.model_floors(),
            settings.queue_items(), settings.warm_up_steps(),
        )  # fmt: skip
        configuring = asyncio.create_task(self.fleet.configure(wanted, SETTINGS_PATIENCE))
        with suppress(TimeoutError):
            async with asyncio.timeout(SETTINGS_PATIENCE):
                await self.frontends.until(lambda frontend: frontend.configured >= generation)
        engines = [f"engine-{index}" for index in await configuring]
        names = {pid: name for name, pid in self._family().items()}
        behind = [frontend.pid for frontend in self.frontends if frontend.configured < generation]
        return sorted([*(names.get(pid, f"process {pid}") for pid in behind), *engines])

    def _new_settings(self) -> SettingsUpdate:
        return SettingsUpdate(self._settings_generation, encode_settings(self.settings))

    async def _reload(self, frontend: FrontendPeer, message: ReloadSettings) -> None:
        if self.reload is None:
            reason = "settings of a server on a cluster change with its deployment"
            frontend.send(SettingsRejected(message.id, "not_supported", reason))
            return
        try:
            frontend.send(msgspec.structs.replace(await self.reload(), id=message.id))
        except BudgetFormerError as error:
            frontend.send(SettingsRejected(message.id, "invalid_settings", str(error)))
        except Exception as error:  # any error must be answered
            log.error("settings not reloaded", exc_info=error)
            frontend.send(
                RequestFailed(message.id, "the reload failed; the server's log says more")
            )

    # Connections of the frontends

    async def serve_frontend(self, reader: asyncio.StreamReader, send: Sender) -> None:
        """Handle the messages of one frontend until its connection ends."""
        frontend = FrontendPeer(send)
        if self._settings_generation:
            send(self._new_settings())
        send(self._catalog_update())
        self.frontends.add(frontend)
        try:
            await handle_each(
                reader,
                TO_HUB,
                partial(self._handle, frontend),
                partial(_answer_error, frontend),
                "frontend",
            )
        finally:
            self.frontends.discard(frontend)
            self._measure_frontends()

    def _handle(self, frontend: FrontendPeer, message: ToHub) -> None:
        frontend.last_seen = time.monotonic()
        match message:
            case CountsReport():
                self._count(frontend.name, message)
                frontend.cache_bytes = message.cache_bytes
                if message.ready:
                    self.ready.set()
                self._measure_frontends()
                frontend.send(ReportAcknowledged(message.number))
            case FrontendHello():
                frontend.name, frontend.pid = message.frontend, message.pid
                frontend.serves = bool(message.routes)
                self._measure_frontends()
                if frontend.serves:
                    self.metrics.register_routes(message.routes)
                    self.metrics.register_keys(message.keys)
                frontend.send(self._heartbeat())
            case ProblemReport():
                self.report_problem(message.source, message.reason)
            case CatalogApplied():
                frontend.applied = message.generation
                self.frontends.advanced()
            case Drained():
                frontend.drained = message.generation
                self.frontends.advanced()
            case SettingsApplied():
                frontend.configured = message.generation
                self.frontends.advanced()
            case ReloadSettings():
                self._background.start(self._reload(frontend, message))
            case Scrape():
                self.watch.refresh(self.fleet.clients)
                frontend.send(ContentReply(message.id, *self._exposition(message.openmetrics)))
            case GetRecentTraffic():
                content = msgspec.json.encode(self.recent.report(message.model))
                frontend.send(ContentReply(message.id, content, "application/json"))
            case ChangeModel() | ChangeRollOut() if self._changes > MAX_CHANGES:
                reason = "too many changes of models are waiting"
                frontend.send(ChangeFailed(message.id, "busy", reason))
            case ChangeModel() | ChangeRollOut():
                self._changes += 1
                self._background.start(self._change(frontend, message))

    def _count(self, frontend: str, report: CountsReport) -> None:
        """Count a report, unless it was already received over another connection."""
        last = self._reported.pop(frontend, -1)
        self._reported[frontend] = max(last, report.number)
        if len(self._reported) > MAX_FRONTENDS:
            del self._reported[next(iter(self._reported))]
        if report.number > last:
            self.metrics.add(report.difference)
            self.versions.count(report.difference)

    def _exposition(self, as_openmetrics: bool) -> tuple[bytes, str]:
        registry = self.metrics.registry
        if as_openmetrics:
            content = openmetrics.generate_latest(registry)  # type: ignore[no-untyped-call]
            return content, openmetrics.CONTENT_TYPE_LATEST
        return exposition.generate_latest(registry), exposition.CONTENT_TYPE_PLAIN_0_0_4

    async def _change(self, frontend: FrontendPeer, wanted: ChangeModel | ChangeRollOut) -> None:
        try:
            answer = await self._make_change(wanted)
        except Exception as error:  # any error must be answered
            reason = next((reason for kind, reason in _REASONS if isinstance(error, kind)), None)
            message = "no engine is running" if isinstance(error, NoEngineError) else str(error)
            if reason is None:
                log.error("model change failed", model=wanted.name, exc_info=error)
                message = f"{wanted.name}: {type(error).__name__}; the server's log says more"
            frontend.send(ChangeFailed(wanted.id, reason or "broken_checkpoint", message))
        else:
            frontend.send(answer)
        finally:
            self._changes -= 1

    async def _make_change(
        self, wanted: ChangeModel | ChangeRollOut
    ) -> ModelChanged | ContentReply:
        name, version, versions = wanted.name, wanted.version, self.versions
        match wanted.action:
            case "load":
                return ModelChanged(wanted.id, (await versions.load(name, version)).label)
            case "unload":
                return ModelChanged(wanted.id, (await versions.unload(name)).label)
            case "begin":
                rollout = await versions.roll_out(name, version, wanted.given)
            case "promote":
                rollout = await versions.promote(name)
            case "rollback":
                rollout = await versions.roll_back(name)
            case "show":
                rollout = versions.last_rollout(name)
        return ContentReply(wanted.id, msgspec.json.encode(rollout.report()), "application/json")

    def _measure_frontends(self) -> None:
        self.metrics.fronts.set(sum(frontend.serves for frontend in self.frontends))
        self.metrics.cache_bytes.set(sum(frontend.cache_bytes for frontend in self.frontends))

    def _broadcast_catalog(self) -> None:
        self.frontends.broadcast(self._catalog_update())

    def _catalog_update(self) -> CatalogUpdate:
        problems = [line for lines in self._problems.values() for line in lines]
        errors = sorted({*self.catalog.errors, *self.fleet.errors, *problems})
        loops = dict(sorted(self._crash_loops.items()))
        deployment = self.deployment
        return CatalogUpdate(
            deployment.generation, deployment.served(), deployment.loading, errors, loops
        )


def _answer_error(frontend: FrontendPeer, message: ToHub, reason: str) -> None:
    """Answer a message that could not be handled, if its sender waits for an answer."""
    if isinstance(
        message, ChangeModel | ChangeRollOut | ReloadSettings | Scrape | GetRecentTraffic
    ):
        frontend.send(RequestFailed(message.id, reason))
