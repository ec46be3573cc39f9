"""Every change of the served model versions: load, unload, roll out, promote, roll back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial

import structlog

from budgetformer.checkpoint.store import Checkpoint
from budgetformer.errors import BudgetFormerError
from service.background import Background, describe
from service.control.catalog import Catalog, UnknownModelError
from service.control.deployment import Deployment
from service.control.rollout import Bounds, RollOut, State, changed
from service.control.served_state import ModelState, StateError
from service.settings import RollOutSettings, Settings
from service.telemetry.counts import Difference
from service.telemetry.metrics import Metrics

log = structlog.get_logger()

JUDGE_SECONDS = 1.0
KEEP_SECONDS = 10.0
"""Interval at which the measurements of running roll-outs are saved."""


class RollOutError(BudgetFormerError):
    """The version cannot be rolled out, for example because it is served already."""


class RollOutConflictError(RollOutError):
    """The change does not fit the state of the roll-out: one is running, or none is."""


class Versions:
    """Change the served versions, one change at a time.

    Args:
        settings: settings of the whole server.
        catalog: served versions.
        deployment: brings engines and frontends in line with the catalog.
        metrics: metrics of the server.
        report: shows a problem in `/health`; None: it is resolved.
    """

    def __init__(
        self,
        settings: Settings,
        catalog: Catalog,
        deployment: Deployment,
        metrics: Metrics,
        report: Callable[[str, str | None], None],
    ) -> None:
        self._settings = settings
        self._catalog = catalog
        self._state = catalog.state
        self._deployment = deployment
        self._metrics = metrics
        self._report = report
        self._saved = 0.0
        self._background = Background()
        for name in catalog.served:
            self._show_rollout(name)

    async def stop(self) -> None:
        """Cancel changes in progress, and save the measurements."""
        await self._background.stop()
        self._save_measurements()

    # One version in place of another

    async def load(self, name: str, version: int | None = None) -> Checkpoint:
        """Load a version in every engine, then serve it in every frontend.

        Engines verify and warm up the version. The version that was served before is freed once its
        last request is answered. A failure changes nothing.

        Args:
            name: name of the model.
            version: version to load; None: the highest in the store.

        Raises:
            UnknownModelError: the version is not in the store.
            CheckpointError: the checkpoint is damaged.
            LoadFailedError: an engine cannot load it.
            LoadTimeoutError: the store or an engine took too long.
            NoEngineError: no engine is running, or an engine died during the load.
            RollOutConflictError: a roll-out of the model is running.
        """
        async with self._deployment.changing:
            self._refuse_while_running(name)
            checkpoint = await self._load(name, version)
            decision = self._state.models.get(name)
            if decision is not None:  # without one, the highest version is served after a restart
                decision.served = checkpoint.version
                self._save_if_possible()
            await self._serve(checkpoint)
        return checkpoint

    async def unload(self, name: str) -> Checkpoint:
        """Stop serving a model, and free it once its last request is answered.

        A running roll-out of the model ends.

        Raises:
            UnknownModelError: the model is not served.
        """
        async with self._deployment.changing:
            if name in self._catalog.candidates:
                await self._withdraw_candidate(name, "rolled_back", "the model was unloaded")
            checkpoint = self._catalog.withdraw(name)
            await self._deployment.publish()
            self._deployment.retire(checkpoint)
        return checkpoint

    # Two versions side by side

    async def roll_out(
        self, name: str, version: int | None = None, given: Mapping[str, float | None] | None = None
    ) -> RollOut:
        """Begin a roll-out, or change the one that is running.

        Args:
            name: name of the model.
            version: new version; None: the candidate of the running roll-out, or the highest.
            given: `weight`, `shadow` and the fields of `Bounds` to change in the running roll-out,
                or to use instead of the model's settings.

        Raises:
            RollOutError: this version is served already.
            RollOutConflictError: another version is being rolled out.
            StateError: the decision could not be saved.
            UnknownModelError, CheckpointError, LoadFailedError, NoEngineError: see `load`.
        """
        given = given or {}
        async with self._deployment.changing:
            served = self._served(name)
            running = self._current(name)
            if running is not None:
                if version not in (None, running.candidate):
                    self._refuse_while_running(name)
                return await self._adjust(running, given)
            candidate = await self._load(name, version, served=served.version)
            default = self._settings.rollout_of(name) or RollOutSettings()
            bounds = Bounds(
                default.min_agreement, default.max_error_rate, default.max_latency_ratio
            )
            rollout = RollOut(
                name, served.version, candidate.version, default.weight, default.shadow, bounds,
                began=time.time(),
            )  # fmt: skip
            _apply(rollout, given)
            before = self._state.models.get(name)
            highest = max(candidate.version, served.version, before.highest if before else 0)
            await self._decide_on(candidate, ModelState(served.version, highest, rollout))
            self._catalog.candidates[name] = candidate
            self._deployment.announce(candidate)
            self._show_rollout(name)
            await self._deployment.publish()
            log.info(
                "roll-out started",
                model=name,
                served=served.version,
                candidate=candidate.version,
                weight=rollout.weight,
                shadow=rollout.shadow,
            )
            return rollout

    async def accept(self, name: str, version: int) -> None:
        """Serve a new version of the store, or roll it out if the settings say so.

        Raises:
            Exception: the errors of `load` and `roll_out`.
        """
        if name in self._catalog.served and self._settings.rollout_of(name) is not None:
            await self.roll_out(name, version)
        else:
            await self.load(name, version)

    async def promote(self, name: str) -> RollOut:
        """End a roll-out: serve the candidate only.

        Raises:
            RollOutConflictError: no roll-out of the model is running.
            StateError: the decision could not be saved, and nothing has changed.
            LoadFailedError, NoEngineError: see `load`; nothing has changed.
        """
        async with self._deployment.changing:
            rollout = self._running(name)
            candidate = self._catalog.candidates[name]
            # Soon after a restart, engines may still lack it.
            await self._deployment.load(candidate, reload=False)
            decision = self._state.models[name]
            ended = self._ended(rollout, "promoted", "")
            self._decide(name, ModelState(candidate.version, decision.highest, ended))
            del self._catalog.candidates[name]
            await self._serve(candidate)
            self._count_end(ended)
            return ended

    async def roll_back(self, name: str, reason: str = "") -> RollOut:
        """End a roll-out: withdraw the candidate; after a promotion, serve the version before it.

        Raises:
            RollOutConflictError: no roll-out is running, and the last one was not promoted.
            StateError: the decision could not be saved, and nothing has changed.
            UnknownModelError, CheckpointError, LoadFailedError, NoEngineError: see `load`.
        """
        async with self._deployment.changing:
            if self._current(name) is not None:
                return await self._withdraw_candidate(name, "rolled_back", reason)
            last = self._state.last(name)
            if last is None or last.state != "promoted":
                raise RollOutConflictError(f"{name} is not being rolled out, and was not promoted")
            before = await self._load(name, last.served)
            decision = self._state.models[name]
            ended = self._ended(last, "rolled_back", "after it was promoted")
            await self._decide_on(before, ModelState(before.version, decision.highest, ended))
            await self._serve(before)
            self._count_end(ended)
            return ended

    def last_rollout(self, name: str) -> RollOut:
        """Return the last roll-out of a model.

        Raises:
            UnknownModelError: the model is not served.
            RollOutConflictError: the model was never rolled out.
        """
        self._served(name)
        rollout = self._state.last(name)
        if rollout is None:
            raise RollOutConflictError(f"{name} has not been rolled out")
        return rollout

    def highest(self, name: str) -> int:
        """Return the highest version at the time of the last decision; 0: there was no decision."""
        decision = self._state.models.get(name)
        return decision.highest if decision is not None else 0

    def count(self, difference: Difference) -> None:
        """Add the counts of a frontend to the running roll-outs."""
        for name in self._catalog.candidates:
            rollout = self._current(name)
            if rollout is not None:
                rollout.count(difference)

    async def judge(self) -> None:
        """Stop roll-outs that exceed their bounds, until cancelled."""
        while True:
            await asyncio.sleep(JUDGE_SECONDS)
            for name in list(self._catalog.candidates):
                async with self._deployment.changing:
                    rollout = self._current(name)
                    if rollout is not None and (reason := rollout.breach()):
                        await self._withdraw_candidate(name, "stopped", reason)
            if time.monotonic() - self._saved > KEEP_SECONDS:
                self._save_measurements()

    # Settings

    def configure(self, settings: Settings) -> None:
        """Apply new settings: serve the versions and adjust the roll-outs that they name."""
        before, self._settings = self._settings, settings
        for name in self._catalog.served:
            version, rollout = settings.version_of(name), settings.rollout_of(name)
            change: Callable[[], Awaitable[object]]
            if version is not None and version != before.version_of(name):
                change = partial(self._serve_named, name, version)
            elif (
                rollout is not None
                and rollout != before.rollout_of(name)
                and self._current(name) is not None
            ):
                change = partial(self.roll_out, name, None, rollout.model_dump())
            else:
                continue
            self._background.start(self._apply_setting(name, change))

    async def _apply_setting(self, name: str, change: Callable[[], Awaitable[object]]) -> None:
        """Make a change that the settings of a model require; report its failure."""
        source, problem = f"settings of {name}", None
        try:
            await change()
        except Exception as error:  # the server goes on with the versions that it has
            problem = f"{source}: {describe(error)}"
        self._report(source, problem)

    async def _serve_named(self, name: str, version: int) -> None:
        running = self._current(name)
        if running is not None and running.candidate == version:
            await self.promote(name)
            return
        if running is not None:
            await self.roll_back(name, reason=f"the settings name version {version}")
        if self._served(name).version != version:
            await self.load(name, version)

    # Steps of a change; the caller holds the lock

    async def _load(self, name: str, version: int | None, served: int | None = None) -> Checkpoint:
        """Read a version, and have every engine load it.

        Raises:
            RollOutError: it is the version `served`.
        """
        checkpoint = await self._deployment.read(name, version)
        if checkpoint.version == served:
            raise RollOutError(f"{checkpoint.label} is served already; name another version")
        await self._deployment.load(checkpoint)
        return checkpoint

    async def _serve(self, checkpoint: Checkpoint) -> None:
        """Serve a version that the engines have loaded, in place of the served one."""
        before = self._catalog.serve(checkpoint)
        self._deployment.announce(checkpoint)
        self._show_rollout(checkpoint.name)
        await self._deployment.publish()
        if before is not None and before.version != checkpoint.version:
            self._deployment.retire(before)

    async def _adjust(self, rollout: RollOut, given: Mapping[str, float | None]) -> RollOut:
        before = rollout.weight, rollout.shadow, rollout.bounds
        _apply(rollout, given)
        try:
            self._state.save()
        except StateError:
            rollout.weight, rollout.shadow, rollout.bounds = before
            raise
        self._show_rollout(rollout.model)
        await self._deployment.publish()
        return rollout

    async def _withdraw_candidate(self, name: str, state: State, reason: str) -> RollOut:
        decision = self._state.models[name]
        ended = self._ended(self._running(name), state, reason)
        try:
            self._decide(name, ModelState(ended.served, decision.highest, ended))
        except StateError as error:
            if state != "stopped":
                raise
            # A candidate that exceeds its bounds must stop even if the decision cannot be saved.
            self._state.models[name] = ModelState(ended.served, decision.highest, ended)
            self._report("roll-outs", str(error))
        candidate = self._catalog.candidates.pop(name)
        self._show_rollout(name)
        await self._deployment.publish()
        self._deployment.retire(candidate)
        self._count_end(ended)
        return ended

    def _decide(self, name: str, decision: ModelState) -> None:
        """Save a decision.

        Raises:
            StateError: it could not be saved, and the decision before it still counts.
        """
        models = self._state.models
        before = models.get(name)
        models[name] = decision
        try:
            self._state.save()
        except StateError:
            if before is None:
                del models[name]
            else:
                models[name] = before
            raise
        self._report("roll-outs", None)

    async def _decide_on(self, loaded: Checkpoint, decision: ModelState) -> None:
        """Save a decision on a version that the engines have just loaded.

        Raises:
            StateError: it could not be saved; the engines have freed the version.
        """
        try:
            self._decide(loaded.name, decision)
        except StateError:
            await self._deployment.unload(loaded)
            raise

    def _save_if_possible(self) -> None:
        try:
            self._state.save()
        except StateError as error:
            self._report("roll-outs", str(error))
        else:
            self._report("roll-outs", None)

    def _save_measurements(self) -> None:
        if self._catalog.candidates:
            self._saved = time.monotonic()
            self._save_if_possible()

    def _ended(self, rollout: RollOut, state: State, reason: str) -> RollOut:
        """Return a copy of a roll-out that has ended now."""
        fields = {name: getattr(rollout, name) for name in rollout.__struct_fields__}
        return RollOut(**fields | {"state": state, "reason": reason, "ended": time.time()})

    def _served(self, name: str) -> Checkpoint:
        try:
            return self._catalog.served[name]
        except KeyError:
            raise UnknownModelError(f"no model {name!r} is served") from None

    def _current(self, name: str) -> RollOut | None:
        """Return the running roll-out of a model; None: there is none, or it is not served."""
        return self._state.running(name) if name in self._catalog.candidates else None

    def _running(self, name: str) -> RollOut:
        self._served(name)
        rollout = self._current(name)
        if rollout is None:
            raise RollOutConflictError(f"{name} is not being rolled out")
        return rollout

    def _refuse_while_running(self, name: str) -> None:
        running = self._current(name)
        if running is not None:
            raise RollOutConflictError(
                f"{name}:{running.candidate} is being rolled out: promote it or roll it back first"
            )

    def _show_rollout(self, name: str) -> None:
        rollout = self._current(name)
        shown = None
        if rollout is not None:
            shown = str(rollout.candidate), rollout.weight, rollout.shadow
        self._metrics.show_rollout(name, shown)

    def _count_end(self, rollout: RollOut) -> None:
        self._metrics.rollouts_ended.labels(rollout.model, rollout.state).inc()
        write = log.error if rollout.state == "stopped" else log.info
        write("roll-out ended", model=rollout.model, candidate=rollout.candidate,
              state=rollout.state, reason=rollout.reason)  # fmt: skip


def _apply(rollout: RollOut, given: Mapping[str, float | None]) -> None:
    """Change the given fields of a roll-out."""
    rollout.weight = given.get("weight", rollout.weight) or 0.0
    rollout.shadow = given.get("shadow", rollout.shadow) or 0.0
    rollout.bounds = changed(rollout.bounds, given)
