"""Poll the store, and serve new versions, if `poll_store_seconds` is set."""

from __future__ import annotations

import asyncio
from pathlib import Path

import structlog

from budgetformer.checkpoint.manifest import MANIFEST
from service.background import DetachedThreads, StillRunningError, describe
from service.control.fleet import LoadTimeoutError, NoEngineError
from service.control.hub import Hub
from service.control.mirror import Mirror
from service.control.versions import RollOutConflictError

log = structlog.get_logger()

ANSWER_SECONDS, COPY_SECONDS = 60.0, 3600.0
"""Longest time to list the local store, and to copy new versions from the remote store."""
Stamp = tuple[tuple[str, int, int], ...]
"""Name, size and time of every file of a checkpoint folder."""


class StorePoll:
    """Check the store regularly for versions that are higher than all earlier ones.

    Such a version is served at once, or rolled out if the model's settings have a table `rollout`.

    A model that an operator rolled back or unloaded stays so until a higher version appears. A
    version that cannot be loaded is tried again when a file of its folder has changed.

    Args:
        hub: the hub, which serves the versions.
        names: models to check, as `Settings.models`; those with a version are pinned to it; empty:
            every model.
        mirror: copies new versions from the remote store, if there is one.
    """

    def __init__(self, hub: Hub, names: list[str], mirror: Mirror | None = None) -> None:
        self._hub = hub
        self._mirror = mirror
        self._pinned = {name for name, _, version in (n.partition(":") for n in names) if version}
        self._wanted = {name.partition(":")[0] for name in names}
        self._highest = {c.name: c.version for c in hub.catalog.served.values()}
        self._failed: dict[Path, tuple[Stamp, str]] = {}
        self._threads = DetachedThreads()
        self._report = hub.report_problems

    async def run(self, seconds: float) -> None:
        """Check the store at this interval, until cancelled."""
        while True:
            await asyncio.sleep(seconds)
            await self.look()

    async def look(self) -> None:
        """Check the store once; report failures, and try again the next time."""
        if self._mirror is not None:
            self._report("remote store", await self._copy(self._mirror))
        try:
            folders = await self._threads.run("look", self._new_versions, ANSWER_SECONDS)
        except (TimeoutError, StillRunningError):
            self._report("store", [f"{self._hub.catalog.store}: it does not answer"])
            return
        except Exception as error:  # the next check may succeed
            self._report("store", [f"{self._hub.catalog.store}: {describe(error)}"])
            return
        self._report("store", await self._serve(folders))

    async def _copy(self, mirror: Mirror) -> list[str]:
        try:
            return await self._threads.run("copy", mirror.copy, COPY_SECONDS)
        except (TimeoutError, StillRunningError):
            return ["the remote store does not answer"]
        except Exception as error:  # no thread could be started
            return [describe(error)]

    async def _serve(self, folders: list[tuple[Path, Stamp]]) -> list[str]:
        """Serve new versions, and return one line for each that cannot be served."""
        problems: list[str] = []
        for folder, stamp in folders:
            failed = self._failed.get(folder)
            if failed is not None and failed[0] == stamp:
                continue
            name, version = folder.parent.name, int(folder.name)
            try:
                await self._hub.versions.accept(name, version)
            except NoEngineError:
                return problems  # the next poll tries again
            except RollOutConflictError:
                continue  # tried again when the roll-out has ended
            except LoadTimeoutError as error:
                problems.append(str(error))  # the next poll tries again
                continue
            except Exception as error:  # the other versions can still be served
                self._failed[folder] = stamp, describe(error)
                log.error("new version rejected", model=name, reason=describe(error))
                continue
            self._highest[name] = version
            log.info("new version accepted", model=name, version=version)
        return problems + [f"{folder}: {reason}" for folder, (_, reason) in self._failed.items()]

    def _new_versions(self) -> list[tuple[Path, Stamp]]:
        """Return the highest version of each model, if it is higher than all earlier ones."""
        new = []
        for model in sorted(self._hub.catalog.store.iterdir()):
            name = model.name
            if name in self._pinned or (self._wanted and name not in self._wanted):
                continue
            numbers = (manifest.parent.name for manifest in model.glob(f"*/{MANIFEST}"))
            highest = max((int(number) for number in numbers if number.isdecimal()), default=0)
            served = self._hub.catalog.served.get(name)
            decided = self._hub.versions.highest(name)
            if highest > max(self._highest.get(name, 0), served.version if served else 0, decided):
                folder = model / str(highest)
                new.append((folder, _stamp(folder)))
        return new


def _stamp(folder: Path) -> Stamp:
    files = ((path.name, path.stat()) for path in sorted(folder.iterdir()))
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in files)
