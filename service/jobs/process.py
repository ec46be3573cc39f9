"""The parts of the process that runs jobs: connections, models, and the settings in force."""

from __future__ import annotations

from pathlib import Path

from service.background import run_forever
from service.ipc.control_messages import ProblemReport
from service.ipc.engine_client import Engines
from service.ipc.hub_client import HubLink
from service.job_store import JobStore
from service.jobs.answering import ChunkAnswering
from service.jobs.runner import Runner
from service.pipeline.answering import Answering
from service.pipeline.catalog_follower import CatalogFollower
from service.pipeline.served_models import Models
from service.process import decode_settings, engine_socket, hub_socket
from service.settings import Settings
from service.telemetry.logs import set_log_level


class JobProcess:
    """Run the jobs of a server.

    Args:
        settings: settings of the server.
        run_dir: folder of the sockets of hub and engines.

    Attributes:
        settings: settings in force.
        models: served models.
    """

    def __init__(self, settings: Settings, run_dir: Path) -> None:
        self.settings = settings
        sockets = [engine_socket(run_dir, i) for i in range(settings.engines)]
        self._engines = Engines(sockets)
        self.models = Models(settings.model_store, settings.default_model, run_dir)
        self._hub = HubLink(
            hub_socket(run_dir), lambda serving: self._follow(serving), [], self._configure
        )
        self._follow = CatalogFollower(self.models, self._engines, self._hub)
        answering = ChunkAnswering(
            self.models, self._hub, Answering(self._engines), lambda: self.settings
        )
        store = JobStore(settings.state_dir)
        self._runner = Runner(store, answering, lambda: self.settings)

    async def run(self) -> None:
        """Run jobs until cancelled."""
        self._engines.start()
        await self._hub.start()
        try:
            await run_forever("jobs", self._runner.run, self._report)
        finally:
            self._report("jobs", None)
            await self._hub.stop()
            await self._follow.stop()
            await self._engines.stop()

    def _report(self, _: str, reason: str | None) -> None:
        self._hub.send(ProblemReport("running jobs", reason))

    def _configure(self, line: bytes) -> None:
        self.settings = decode_settings(line)
        set_log_level(self.settings.log_level)
