"""The versions of models that a server serves, and every change of them."""

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
"""Time between two writes of what a running roll-out has measured."""


class RollOutError(BudgetFormerError):
    """The version cannot be rolled out: it is served already, for one."""


class RollOutConflictError(RollOutError):
    """A roll-out is running, or none is, so that this cannot be done now."""


class Versions:
    """Load, unload and roll out; one change at a time.

    Args:
        settings: of the whole server.
        catalog: what is served.
        deployment: of it.
        metrics: of the server.
        report: shows problems in `/health`.
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
        self._kept = 0.0
        self._background = Background()
        for name in catalog.served:
            self._show_rollout(name)

    async def stop(self) -> None:
        """Make no further change, and keep what was measured."""
        await self._background.stop()
        self._keep_measurements()

    # One version in place of another

    async def load(self, name: str, version: int | None = None) -> Checkpoint:
        """Verify, load and warm a version in every engine, then serve it in every frontend.

        What was served before is freed once its last request is answered; a failure leaves all as
        it was.

        Raises:
            UnknownModelError: the store does not have it.
            CheckpointError: it is damaged.
            LoadFailedError: an engine cannot load it.
            LoadTimeoutError: the store or an engine takes too long.
            NoEngineError: there is no engine, or one died meanwhile.
            RollOutConflictError: the model is being rolled out.
        """
        async with self._deployment.changing:
            self._refuse_while_running(name)
            checkpoint = await self._load(name, version)
            decision = self._state.models.get(name)
            if decision is not None:  # else the highest would not be served after a restart
                decision.served = checkpoint.version
                self._keep_if_possible()
            await self._serve(checkpoint)
        return checkpoint

    async def unload(self, name: str) -> Checkpoint:
        """Take a model out of service, and free it once its last request is answered.

        A roll-out of it ends.

        Raises:
            UnknownModelError: it is not served.
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
            name: of the model.
            version: that is to come; None: that of the running roll-out, or the highest.
            given: `weight`, `shadow` and the fields of `Bounds` that differ from those of the
                running roll-out, or from the model's settings.

        Raises:
            RollOutError: this version is served already.
            RollOutConflictError: another version is being rolled out.
            StateError: it could not be kept.
            UnknownModelError, CheckpointError, LoadFailedError, NoEngineError: as `load` does.
        """
        given = given or {}
        async with self._deployment.changing:
            served = self._served(name)
            running = self._current(name)
            if running is not None:
                if version not in (None, running.candidate):
                    self._refuse_while_running(name)
                return await self._adjust(running, given)
            candidate = await self._load(name, version, but=served.version)
            usual = self._settings.rollout_of(name) or RollOutSettings()
            bounds = Bounds(usual.min_agreement, usual.max_error_rate, usual.max_latency_ratio)
            rollout = RollOut(
                name, served.version, candidate.version, usual.weight, usual.shadow, bounds,
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

    async def bring(self, name: str, version: int) -> None:
        """Serve a new version of the store, or roll it out if the settings say so.

        It raises what `load` and `roll_out` raise.
        """
        if name in self._catalog.served and self._settings.rollout_of(name) is not None:
            await self.roll_out(name, version)
        else:
            await self.load(name, version)

    async def promote(self, name: str) -> RollOut:
        """Serve the candidate alone.

        Raises:
            RollOutConflictError: none is being rolled out.
            StateError: the decision could not be kept, so nothing has changed.
        """
        async with self._deployment.changing:
            rollout = self._running(name)
            candidate = self._catalog.candidates[name]
            decision = self._state.models[name]
            ended = self._ended(rollout, "promoted", "")
            self._decide(name, ModelState(candidate.version, decision.highest, ended))
            del self._catalog.candidates[name]
            await self._serve(candidate)
            self._count_end(ended)
            return ended

    async def roll_back(self, name: str, reason: str = "") -> RollOut:
        """Take the candidate away; after a promotion: serve again what was served before.

        Raises:
            RollOutConflictError: there is nothing to go back to.
            StateError: the decision could not be kept, so nothing has changed.
            UnknownModelError, CheckpointError, LoadFailedError, NoEngineError: as `load` does.
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
            UnknownModelError: it is not served.
            RollOutConflictError: there was none.
        """
        self._served(name)
        rollout = self._state.last(name)
        if rollout is None:
            raise RollOutConflictError(f"{name} has not been rolled out")
        return rollout

    def highest(self, name: str) -> int:
        """Return the highest version of a model that was ever decided on; 0: there is none."""
        decision = self._state.models.get(name)
        return decision.highest if decision is not None else 0

    def count(self, difference: Difference) -> None:
        """Count what a frontend did for the versions that are being rolled out."""
        for name in self._catalog.candidates:
            rollout = self._current(name)
            if rollout is not None:
                rollout.count(difference)

    async def judge(self) -> None:
        """Stop roll-outs that are beyond their bounds, until cancelled."""
        while True:
            await asyncio.sleep(JUDGE_SECONDS)
            for name in list(self._catalog.candidates):
                async with self._deployment.changing:
                    rollout = self._current(name)
                    if rollout is not None and (reason := rollout.breach()):
                        await self._withdraw_candidate(name, "stopped", reason)
            if time.monotonic() - self._kept > KEEP_SECONDS:
                self._keep_measurements()

    # Settings

    def configure(self, settings: Settings) -> None:
        """Go by other settings: begin to serve the versions that they name now."""
        before, self._settings = self._settings, settings
        for name in self._catalog.served:
            version, usual = settings.version_of(name), settings.rollout_of(name)
            if version is not None and version != before.version_of(name):
                follow = self._follow(name, partial(self._serve_named, name, version))
                self._background.start(follow)
                continue
            if usual is None or usual == before.rollout_of(name) or self._current(name) is None:
                continue
            adjust = partial(self.roll_out, name, None, usual.model_dump())
            self._background.start(self._follow(name, adjust))

    async def _follow(self, name: str, change: Callable[[], Awaitable[object]]) -> None:
        """Do what the settings of a model ask for."""
        source, problem = f"settings of {name}", None
        try:
            await change()
        except Exception as error:  # whatever it is, the server goes on with what it has
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

    # Steps of a change, each under the lock

    async def _load(self, name: str, version: int | None, but: int | None = None) -> Checkpoint:
        """Read a version, and have every engine load it; it may not be the version `but`."""
        checkpoint = await self._deployment.read(name, version)
        if checkpoint.version == but:
            raise RollOutError(f"{checkpoint.label} is served already; name another version")
        await self._deployment.load(checkpoint)
        return checkpoint

    async def _serve(self, checkpoint: Checkpoint) -> None:
        """Serve a version that the engines have, in place of what was served."""
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
            self._state.keep()
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
            # It stops all the same: a version that fails must not go on because a disk is full.
            self._state.models[name] = ModelState(ended.served, decision.highest, ended)
            self._report("roll-outs", str(error))
        candidate = self._catalog.candidates.pop(name)
        self._show_rollout(name)
        await self._deployment.publish()
        self._deployment.retire(candidate)
        self._count_end(ended)
        return ended

    def _decide(self, name: str, decision: ModelState) -> None:
        """Keep a decision.

        Raises:
            StateError: it could not be kept, and is not made.
        """
        models = self._state.models
        before = models.get(name)
        models[name] = decision
        try:
            self._state.keep()
        except StateError:
            if before is None:
                del models[name]
            else:
                models[name] = before
            raise
        self._report("roll-outs", None)

    async def _decide_on(self, loaded: Checkpoint, decision: ModelState) -> None:
        """Keep a decision on a version that the engines have loaded for it.

        Raises:
            StateError: it could not be kept; the engines have freed the version.
        """
        try:
            self._decide(loaded.name, decision)
        except StateError:
            await self._deployment.unload(loaded)
            raise

    def _keep_if_possible(self) -> None:
        try:
            self._state.keep()
        except StateError as error:
            self._report("roll-outs", str(error))
        else:
            self._report("roll-outs", None)

    def _keep_measurements(self) -> None:
        if self._catalog.candidates:
            self._kept = time.monotonic()
            self._keep_if_possible()

    def _ended(self, rollout: RollOut, state: State, reason: str) -> RollOut:
        """Return a roll-out as it is when it has ended."""
        fields = {name: getattr(rollout, name) for name in rollout.__struct_fields__}
        return RollOut(**fields | {"state": state, "reason": reason, "ended": time.time()})

    def _served(self, name: str) -> Checkpoint:
        try:
            return self._catalog.served[name]
        except KeyError:
            raise UnknownModelError(f"no model {name!r} is served") from None

    def _current(self, name: str) -> RollOut | None:
        """Return the roll-out that is running; one whose model is not served now is not."""
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
        one = self._current(name)
        shown = None if one is None else (str(one.candidate), one.weight, one.shadow)
        self._metrics.show_rollout(name, shown)

    def _count_end(self, rollout: RollOut) -> None:
        self._metrics.rollouts_ended.labels(rollout.model, rollout.state).inc()
        write = log.error if rollout.state == "stopped" else log.info
        write("roll-out ended", model=rollout.model, candidate=rollout.candidate,
              state=rollout.state, reason=rollout.reason)  # fmt: skip


def _apply(rollout: RollOut, given: Mapping[str, float | None]) -> None:
    """Change a roll-out by what is given of it."""
    rollout.weight = given.get("weight", rollout.weight) or 0.0
    rollout.shadow = given.get("shadow", rollout.shadow) or 0.0
    rollout.bounds = changed(rollout.bounds, given)
