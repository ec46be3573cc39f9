"""New versions that come into the store are served by themselves, where that is asked for."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path

import structlog

from budgetformer.checkpoint.manifest import MANIFEST
from service.background import DetachedThreads, StillRunningError, describe
from service.control.fleet import LoadTimeoutError, NoEngineError
from service.control.hub import Hub
from service.control.mirror import Mirror, copy
from service.control.versions import RollOutConflictError

log = structlog.get_logger()

ANSWER_SECONDS, COPY_SECONDS = 60.0, 3600.0
"""How long one look into the local store, and one copy of what is new elsewhere, may take."""
Stamp = tuple[tuple[str, int, int], ...]
"""Name, size and time of every file of a checkpoint folder."""


class StorePoll:
    """Look into the store from time to time, and take up what is newer than all before.

    It is served at once, or rolled out if the model's settings have a table `rollout`.

    A version that was put back or taken away by hand stays so until a higher one comes. A folder
    that cannot be loaded is tried again when something in it has changed.

    Args:
        hub: serves it.
        mirror: brings new versions into the store, if there is a store elsewhere.
        names: models to look for, as `Settings.models`: those with a version are pinned to it;
            empty: every model.
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
        """Look every so many seconds, until cancelled."""
        while True:
            await asyncio.sleep(seconds)
            await self.look()

    async def look(self) -> None:
        """Look once; what fails is reported, and tried again the next time."""
        if self._mirror is not None:
            self._report("remote store", await self._copy(self._mirror))
        try:
            found = await self._threads.run("look", self._newest, ANSWER_SECONDS)
        except (TimeoutError, StillRunningError):
            self._report("store", [f"{self._hub.catalog.store}: it does not answer"])
            return
        except Exception as error:  # whatever it is, the next look may succeed
            self._report("store", [f"{self._hub.catalog.store}: {describe(error)}"])
            return
        self._report("store", await self._serve(found))

    async def _copy(self, mirror: Mirror) -> list[str]:
        try:
            return await self._threads.run("copy", partial(copy, mirror), COPY_SECONDS)
        except (TimeoutError, StillRunningError):
            return ["the remote store does not answer"]
        except Exception as error:  # no thread can be started
            return [describe(error)]

    async def _serve(self, found: list[tuple[Path, Stamp]]) -> list[str]:
        """Serve new versions, and return what cannot be served."""
        problems: list[str] = []
        for folder, stamp in found:
            failed = self._failed.get(folder)
            if failed is not None and failed[0] == stamp:
                continue
            name, version = folder.parent.name, int(folder.name)
            try:
                await self._hub.versions.bring(name, version)
            except NoEngineError:
                return problems  # it is tried again
            except RollOutConflictError:
                continue  # it is tried again when the roll-out has ended
            except LoadTimeoutError as error:
                problems.append(str(error))  # it is tried again
                continue
            except Exception as error:  # whatever it is, this version alone is not served
                self._failed[folder] = stamp, describe(error)
                log.error("new version rejected", model=name, reason=describe(error))
                continue
            self._highest[name] = version
            log.info("new version accepted", model=name, version=version)
        return problems + [f"{folder}: {reason}" for folder, (_, reason) in self._failed.items()]

    def _newest(self) -> list[tuple[Path, Stamp]]:
        """Return the highest version of each model whose version is higher than all before."""
        found = []
        for model in sorted(self._hub.catalog.store.iterdir()):
            name = model.name
            if name in self._pinned or (self._wanted and name not in self._wanted):
                continue
            versions = [int(p.parent.name) for p in model.glob(f"*/{MANIFEST}") if _numbered(p)]
            served = self._hub.catalog.served.get(name)
            decided = self._hub.versions.highest(name)
            known = max(self._highest.get(name, 0), served.version if served else 0, decided)
            highest = max(versions, default=0)
            if highest > known:
                folder = model / str(highest)
                found.append((folder, _stamp(folder)))
        return found


def _numbered(manifest: Path) -> bool:
    return manifest.parent.name.isdecimal()


def _stamp(folder: Path) -> Stamp:
    files = ((path.name, path.stat()) for path in sorted(folder.iterdir()))
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in files)
