"""Copy checkpoints from a remote store, such as `s3://bucket/models`, to the local one."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog

from budgetformer.checkpoint.install import install
from budgetformer.checkpoint.manifest import MANIFEST, NAME
from budgetformer.errors import CheckpointError
from service.background import describe
from service.settings import Settings

log = structlog.get_logger()

START_SECONDS = 120.0
"""Longest time that a server waits for the remote store at its start."""
NAME_PATTERN = re.compile(NAME)


class Mirror:
    """Copy checkpoints from a remote store to the local one, each completely and verified.

    For each model, only the highest version is copied, or the version that the settings name. A
    version that the local store already has is not copied again: published versions do not change.

    Args:
        url: URL of the remote store, in any scheme that fsspec supports.
        store: folder of the local store.
        names: models to copy, as `Settings.models`; empty: all.
    """

    def __init__(self, url: str, store: Path, names: list[str]) -> None:
        self.url = url.rstrip("/")
        self._store = store
        self._wanted = {n: v for n, _, v in (name.partition(":") for name in names)}

    def copy(self) -> list[str]:
        """Copy new versions, and return one line for each problem; never raise an error."""
        problems: list[str] = []
        with _added_to(problems, self.url):
            for name, version in self._missing():
                url = f"{self.url}/{name}/{version}"
                with _added_to(problems, url):
                    install(url, self._store, version, try_out=False)
                    log.info("checkpoint copied", model=name, version=version)
        return problems

    def _missing(self) -> Iterator[tuple[str, int]]:
        """Yield name and version of each checkpoint to copy."""
        for name, versions in sorted(self._remote_versions().items()):
            if self._wanted and name not in self._wanted:
                continue
            pinned = self._wanted.get(name, "")
            version = int(pinned) if pinned.isdecimal() else max(versions)
            folder = self._store / name / str(version)
            if version in versions and not (folder / MANIFEST).exists():
                yield name, version

    def _remote_versions(self) -> dict[str, list[int]]:
        try:
            import fsspec

            system, root = fsspec.core.url_to_fs(self.url)
            manifests = system.glob(f"{root}/*/*/{MANIFEST}")
        except ImportError as error:
            message = f"{error} (pip install 'budgetformer-serving[remote]')"
            raise CheckpointError(message) from error
        models: dict[str, list[int]] = {}
        for path in map(str, manifests):
            name, version = ["", "", *path.split("/")][-3:-1]
            if NAME_PATTERN.fullmatch(name) and version.isdecimal():
                models.setdefault(name, []).append(int(version))
        return models


def mirror_of(settings: Settings) -> Mirror | None:
    """Return the mirror of the remote store in the settings, if any; create the local store."""
    if settings.remote_store is None:
        return None
    settings.model_store.mkdir(parents=True, exist_ok=True)
    return Mirror(settings.remote_store, settings.model_store, settings.models)


@contextmanager
def _added_to(problems: list[str], url: str) -> Iterator[None]:
    """Add an error of this context to the problems; drivers of fsspec raise errors of any type."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        reason = str(error) if isinstance(error, CheckpointError) else describe(error)
        problems.append(f"{url}: {reason}")


def copy_at_start(mirror: Mirror, seconds: float = START_SECONDS) -> None:
    """Copy new versions before serving, and log those that could not be copied.

    Args:
        mirror: mirror of the remote store.
        seconds: longest time to wait for the remote store.
    """
    problems = [f"the remote store does not answer within {seconds:g} s"]

    def run() -> None:
        problems[:] = mirror.copy()

    copying = threading.Thread(target=run, daemon=True, name="copy")
    copying.start()
    copying.join(seconds)
    for problem in problems:
        log.error("checkpoint copy failed", reason=problem)
