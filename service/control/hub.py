"""The hub itself: connections of the fronts, and what they ask for."""

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

from budgetformer.checkpoint.store import Checkpoint
from budgetformer.errors import BudgetFormerError, CheckpointError
from budgetformer.inference.policy import QualityName
from service.background import Background, DetachedThreads, StillRunningError, run_forever
from service.control.catalog import Catalog, UnknownModelError
from service.control.engine_watch import EngineWatch
from service.control.fleet import Fleet, LoadFailedError, LoadTimeoutError, NoEngineError
from service.ipc.connection import Say, handle_each, listening
from service.ipc.control_messages import (
    TO_HUB,
    Acknowledged,
    Alive,
    Changed,
    ChangeFailed,
    ChangeModel,
    Drained,
    Here,
    NewSettings,
    NotShown,
    ReloadSettings,
    Report,
    Scrape,
    ServedVersion,
    Serving,
    SettingsRefused,
    SettingsReloaded,
    SettingsTaken,
    Shown,
    Swapped,
    TellRecent,
    ToHub,
)
from service.ipc.engine_messages import Configure
from service.process import encode_settings
from service.scheduling.brownout import kept_above
from service.settings import DEFAULT_QUALITY, Settings
from service.telemetry.metrics import QUALITY_RANK, Metrics
from service.telemetry.processes import Family, only_this_process
from service.telemetry.recent_traffic import Recent

log = structlog.get_logger()

SWAP_PATIENCE = 30.0
"""Seconds that a change waits for every front; one that hangs is not waited for longer."""
SETTINGS_PATIENCE = 5.0
"""Seconds that a reload waits for every process; those that are late take the settings over when
they can."""
BEAT_SECONDS = 1.0
MAX_CHANGES = 16
"""Changes of models that may wait for the one that is being made."""
MAX_RETIRED = 50
"""Retired versions whose series are still shown; beyond, those retired first go first."""
MAX_FRONTENDS = 1000
"""Frontends whose last report is remembered; beyond, the one heard longest ago goes first."""


class FrontPeer:
    """A front that is connected."""

    def __init__(self, say: Say) -> None:
        self.say = say
        self.name = ""
        self.pid = 0
        self.heard = time.monotonic()
        self.swapped = self.drained = self.configured = 0
        self.cache_bytes = 0


class Hub:
    """Own the metrics, say what is served, change it on request.

    Args:
        settings: of the whole server.
        catalog: what it begins with.
        sockets: where its engines listen; those that come by themselves (`Fleet.meet`) are more.
        family: its processes.

    Attributes:
        settings: in force.
        tasks: names of the tasks that are to run in this process, for `/health`.
        ready: set once a frontend can classify.
        reload: reads the settings again, for who asks for it over a frontend; raises
            BudgetFormerError if they are invalid. None: this server cannot.
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
        self.metrics.know_engines(len(sockets))
        self.catalog = catalog
        self.recent = Recent(self.metrics)
        self.watch = EngineWatch(self.metrics, self.catalog, self._level_shown)
        self.fleet = Fleet(sockets, self.watch, self._tell_all, settings.load_timeout_seconds)
        self.fronts: set[FrontPeer] = set()
        self._family = family
        self._crash_loops: dict[str, str] = {}
        self._problems: dict[str, list[str]] = {}
        self._retired: dict[tuple[str, int], float] = {}
        self._retired_seconds = settings.retired_series_seconds
        self._load_seconds = settings.load_timeout_seconds
        self._threads = DetachedThreads()
        self._changes = 0
        self._reported: dict[str, int] = {}
        self._loading: list[str] = []
        self._equipped = False
        self._generation = 0
        self._settings_generation = 0
        self._moved = asyncio.Event()
        self._changing = asyncio.Lock()
        self._background = Background()
        for problem in self.catalog.errors:
            log.error("checkpoint left out", reason=problem)
        for checkpoint in self.catalog.served.values():
            self._announce(checkpoint)
            self.fleet.wanted[checkpoint.name, checkpoint.version] = checkpoint.path

        self._name_unserved()

    def _name_unserved(self) -> None:
        """Say which models have settings and are not served: they may come, or it is a mistake."""
        if unserved := sorted(self.settings.model_settings.keys() - self.catalog.served.keys()):
            log.warning("settings of models that are not served", models=unserved)

    def _level_shown(self, model: str, level: QualityName) -> QualityName | None:
        """Return the level of a model where the load allows this one; None: it is fixed."""
        if self.settings.quality_of(model) != "auto":
            return None
        return kept_above(self.settings.floor_of(model), level)

    async def serve(self, socket: Path | None = None) -> None:
        """Listen on `socket` until cancelled; None: fronts come in another way, to `came`."""
        self.fleet.start()
        own = {"hub-recent": self.recent.keep, "hub-beat": self._beat}
        self.tasks += own
        for name, work in own.items():
            self._background.start(run_forever(name, work, self.report_problem))
        try:
            async with listening(socket, self.came) if socket else nullcontext():
                await asyncio.Event().wait()
        finally:
            await self._background.stop()
            await self.fleet.stop()

    def report_crash_loop(self, process: str, reason: str | None) -> None:
        """Tell the fronts that a process does not stay up (None: that it does again)."""
        before = self._crash_loops.get(process)
        if reason is None:
            self._crash_loops.pop(process, None)
        else:
            self._crash_loops[process] = reason
        if self._crash_loops.get(process) != before:
            self._tell_all()

    def report_problem(self, source: str, reason: str | None) -> None:
        """Show in `/health` why a part of the server fails (None: it does no more)."""
        self.report_problems(source, [] if reason is None else [reason])

    def report_problems(self, source: str, problems: list[str]) -> None:
        """Show all problems of a part of the server in `/health`, and log those that are new."""
        before = self._problems.pop(source, [])
        if problems:
            self._problems[source] = problems
        for problem in problems:
            if problem not in before:
                log.error("server problem", source=source, reason=problem)
        if before and not problems:
            log.info("server problem solved", source=source)
        if problems != before:
            self._tell_all()

    # Changes of what is served

    async def load(self, name: str, version: int | None = None) -> Checkpoint:
        """Verify, load and warm a version in every engine, then serve it in every front.

        What was served before is freed once its last request is answered; a failure leaves all as
        it was.

        Raises:
            UnknownModelError: the store does not have it.
            CheckpointError: it is damaged.
            LoadFailedError: an engine cannot load it.
            LoadTimeoutError: the store or an engine takes too long.
            NoEngineError: there is no engine, or one died meanwhile.
        """
        async with self._changing:
            checkpoint = await self._read(name, version)
            key = (checkpoint.name, checkpoint.version)
            self._loading = [checkpoint.label]
            self._tell_all()
            try:
                await self.fleet.load(key, checkpoint.path)
            finally:
                self._loading = []
                self._tell_all()
            before = self.catalog.serve(checkpoint)
            self._announce(checkpoint)
            await self._publish()
            if before is not None and before.version != checkpoint.version:
                self._retire(before)
        return checkpoint

    async def _read(self, name: str, version: int | None) -> Checkpoint:
        read = partial(self.catalog.candidate, name, version)
        try:
            return await self._threads.run((name, version), read, self._load_seconds)
        except TimeoutError:
            message = f"{name}: the store does not answer within {self._load_seconds:g} s"
            raise LoadTimeoutError(message) from None
        except StillRunningError:
            message = f"{name}: the store has not answered an earlier attempt yet"
            raise LoadTimeoutError(message) from None

    async def unload(self, name: str) -> Checkpoint:
        """Take a model out of service, and free it once its last request is answered.

        Raises:
            UnknownModelError: it is not served.
        """
        async with self._changing:
            checkpoint = self.catalog.withdraw(name)
            await self._publish()
            self._retire(checkpoint)
        return checkpoint

    def _announce(self, checkpoint: Checkpoint) -> None:
        self._retired.pop((checkpoint.name, checkpoint.version), None)
        self.metrics.know_model(checkpoint.name, str(checkpoint.version), checkpoint.budgets)
        self._show_quality(checkpoint.name)
        self.watch.show_models()

    def _show_quality(self, model: str) -> None:
        quality = self.settings.quality_of(model)
        usual = DEFAULT_QUALITY if quality == "auto" else quality
        rank = QUALITY_RANK.get(usual, 0) if isinstance(usual, str) else 0
        for gauge in (self.metrics.quality_level, self.metrics.quality_configured):
            gauge.labels(model).set(rank)

    def _retire(self, checkpoint: Checkpoint) -> None:
        self.watch.show_models()
        if checkpoint.name not in self.catalog.served:
            for gauge in (self.metrics.quality_level, self.metrics.quality_configured):
                gauge.remove(checkpoint.name)
        self._retired[checkpoint.name, checkpoint.version] = time.monotonic()
        self._background.start(self._free(checkpoint, self._generation))

    def forget_retired(self, now: float) -> None:
        """Remove the series of versions that are served no more, some time after they were."""
        while self._retired:
            key, since = next(iter(self._retired.items()))
            if now - since < self._retired_seconds and len(self._retired) <= MAX_RETIRED:
                return
            del self._retired[key]
            name, version = key
            self.metrics.forget_model(name, str(version))
            if name not in self.catalog.served and name not in {n for n, _ in self._retired}:
                self.watch.forget_model(name)
                self.metrics.forget_name(name)

    async def _beat(self) -> None:
        """Tell the fronts that the hub handles messages, and how it is; do what is due."""
        while True:
            alive = self._alive()
            for front in self.fronts:
                front.say(alive)
            self.forget_retired(time.monotonic())
            await asyncio.sleep(BEAT_SECONDS)

    def _alive(self) -> Alive:
        """Return the state of this server's parts, as the hub knows it."""
        self._equipped = self._equipped or all(map(self.fleet.equipped, self.fleet.clients))
        connected = sum(front.pid > 0 for front in self.fronts)
        tasks = {name: "; ".join(self._problems.get(name, [])) for name in self.tasks}
        return Alive(connected, tasks, self._equipped)

    async def _free(self, checkpoint: Checkpoint, generation: int) -> None:
        """Take a model from the engines once no front has a request for it."""
        await self._until(lambda front: front.drained >= generation)
        async with self._changing:
            again = self.catalog.served.get(checkpoint.name)
            if again is None or again.version != checkpoint.version:
                await self.fleet.unload((checkpoint.name, checkpoint.version))

    async def _publish(self) -> None:
        """Return when every front serves what is to be served now."""
        self._generation += 1
        generation = self._generation
        self._tell_all()
        try:
            async with asyncio.timeout(SWAP_PATIENCE):
                await self._until(lambda front: front.swapped >= generation)
        except TimeoutError:
            behind = [front.pid for front in self.fronts if front.swapped < generation]
            log.error("frontends did not apply the model catalog in time", pids=behind)

    async def _until(self, reached: Callable[[FrontPeer], bool]) -> None:
        while not all(map(reached, self.fronts)):
            self._moved.clear()
            await self._moved.wait()

    # Changes of settings

    async def configure(self, settings: Settings) -> list[str]:
        """Have every frontend and engine go by settings, also each that begins later.

        Returns:
            The names of the processes that do not go by them after `SETTINGS_PATIENCE`.
        """
        self.settings = settings
        self._name_unserved()
        for model in self.catalog.served:
            self._show_quality(model)
        self._settings_generation += 1
        generation = self._settings_generation
        for front in self.fronts:
            front.say(self._new_settings())
        wanted = Configure(
            0, settings.log_level, settings.quality_floor, settings.model_floors(),
            settings.queue_items(), settings.warm_up_steps(),
        )  # fmt: skip
        configuring = asyncio.create_task(self.fleet.configure(wanted, SETTINGS_PATIENCE))
        with suppress(TimeoutError):
            async with asyncio.timeout(SETTINGS_PATIENCE):
                await self._until(lambda front: front.configured >= generation)
        engines = [f"engine-{index}" for index in await configuring]
        names = {pid: name for name, pid in self._family().items()}
        behind = [front.pid for front in self.fronts if front.configured < generation]
        return sorted([*(names.get(pid, f"process {pid}") for pid in behind), *engines])

    def _new_settings(self) -> NewSettings:
        return NewSettings(self._settings_generation, encode_settings(self.settings))

    async def _reload(self, front: FrontPeer, asked: ReloadSettings) -> None:
        if self.reload is None:
            reason = "settings of a server on a cluster change with its deployment"
            front.say(SettingsRefused(asked.id, "not_supported", reason))
            return
        try:
            front.say(msgspec.structs.replace(await self.reload(), id=asked.id))
        except BudgetFormerError as error:
            front.say(SettingsRefused(asked.id, "invalid_settings", str(error)))
        except Exception as error:  # whatever it is, whoever asked must hear of it
            log.error("settings not reloaded", exc_info=error)
            front.say(NotShown(asked.id, "the reload failed; the server's log says more"))

    # Connections of the fronts

    async def came(self, reader: asyncio.StreamReader, say: Say) -> None:
        """Serve one front until its connection ends."""
        front = FrontPeer(say)
        if self._settings_generation:
            say(self._new_settings())
        say(self._serving())
        self.fronts.add(front)
        try:
            await handle_each(
                reader, TO_HUB, partial(self._take, front), partial(_answer, front), "frontend"
            )
        finally:
            self.fronts.discard(front)
            self._measure_fronts()
            self._moved.set()

    def _take(self, front: FrontPeer, message: ToHub) -> None:
        front.heard = time.monotonic()
        match message:
            case Report():
                self._count(front.name, message)
                front.cache_bytes = message.cache_bytes
                if message.ready:
                    self.ready.set()
                self._measure_fronts()
                front.say(Acknowledged(message.number))
            case Here():
                front.name, front.pid = message.frontend, message.pid
                self._measure_fronts()
                self.metrics.know_routes(message.routes)
                self.metrics.know_keys(message.keys)
                front.say(self._alive())
            case Swapped():
                front.swapped = message.generation
                self._moved.set()
            case Drained():
                front.drained = message.generation
                self._moved.set()
            case SettingsTaken():
                front.configured = message.generation
                self._moved.set()
            case ReloadSettings():
                self._background.start(self._reload(front, message))
            case Scrape():
                self.watch.refresh(self.fleet.clients)
                front.say(Shown(message.id, *self._exposition(message.openmetrics)))
            case TellRecent():
                told = msgspec.json.encode(self.recent.tell(message.model))
                front.say(Shown(message.id, told, "application/json"))
            case ChangeModel() if self._changes > MAX_CHANGES:
                reason = "too many changes of models are waiting"
                front.say(ChangeFailed(message.id, "busy", reason))
            case ChangeModel():
                self._changes += 1
                self._background.start(self._change(front, message))

    def _count(self, frontend: str, report: Report) -> None:
        """Count a report, unless it came before over another connection."""
        last = self._reported.pop(frontend, -1)
        self._reported[frontend] = max(last, report.number)
        if len(self._reported) > MAX_FRONTENDS:
            del self._reported[next(iter(self._reported))]
        if report.number > last:
            self.metrics.add(report.difference)

    def _exposition(self, as_openmetrics: bool) -> tuple[bytes, str]:
        registry = self.metrics.registry
        if as_openmetrics:
            shown = openmetrics.generate_latest(registry)  # type: ignore[no-untyped-call]
            return shown, openmetrics.CONTENT_TYPE_LATEST
        return exposition.generate_latest(registry), exposition.CONTENT_TYPE_PLAIN_0_0_4

    async def _change(self, front: FrontPeer, wanted: ChangeModel) -> None:
        try:
            if wanted.action == "load":
                checkpoint = await self.load(wanted.name, wanted.version)
            else:
                checkpoint = await self.unload(wanted.name)
        except UnknownModelError as error:
            front.say(ChangeFailed(wanted.id, "unknown_model", str(error)))
        except LoadTimeoutError as error:
            front.say(ChangeFailed(wanted.id, "load_timeout", str(error)))
        except (CheckpointError, LoadFailedError) as error:
            front.say(ChangeFailed(wanted.id, "broken_checkpoint", str(error)))
        except NoEngineError:
            front.say(ChangeFailed(wanted.id, "engine_down", "no engine is running"))
        except Exception as error:  # whatever it is, whoever asked must hear of it
            log.error("a change of models failed", model=wanted.name, exc_info=error)
            reason = f"{wanted.name}: {type(error).__name__}; the server's log says more"
            front.say(ChangeFailed(wanted.id, "broken_checkpoint", reason))
        else:
            front.say(Changed(wanted.id, checkpoint.label))
        finally:
            self._changes -= 1

    def _measure_fronts(self) -> None:
        self.metrics.fronts.set(sum(front.pid > 0 for front in self.fronts))
        self.metrics.cache_bytes.set(sum(front.cache_bytes for front in self.fronts))

    def _tell_all(self) -> None:
        serving = self._serving()
        for front in self.fronts:
            front.say(serving)

    def _serving(self) -> Serving:
        models = [
            ServedVersion(c.name, c.version, str(c.path)) for c in self.catalog.served.values()
        ]
        found = [line for lines in self._problems.values() for line in lines]
        errors = sorted({*self.catalog.errors, *self.fleet.errors, *found})
        loops = dict(sorted(self._crash_loops.items()))
        return Serving(self._generation, models, self._loading, errors, loops)


def _answer(front: FrontPeer, message: ToHub, reason: str) -> None:
    """Answer a message that could not be handled, if it asks for an answer."""
    if isinstance(message, ChangeModel | ReloadSettings | Scrape | TellRecent):
        front.say(NotShown(message.id, reason))
