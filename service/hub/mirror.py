"""A store elsewhere, of which the local one is a copy: `s3://bucket/models` and its like."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import structlog

from budgetformer.checkpoint import MANIFEST, NAME
from budgetformer.errors import CheckpointError, one_line
from budgetformer.install import install
from service.settings import Settings

log = structlog.get_logger()

NAME_PATTERN = re.compile(NAME)


class Mirror:
    """Copy checkpoints from a store elsewhere into the local one, each whole and verified.

    Only what would be served is copied: the highest version of a model, or the one that is named.
    A version that is there already is left alone: what was published under a number stays so.

    Args:
        url: the store, in any scheme that fsspec knows.
        store: the local folder.
        names: models to copy, as `Settings.models`; empty: all.
    """

    def __init__(self, url: str, store: Path, names: list[str]) -> None:
        self._url = url.rstrip("/")
        self._store = store
        self._wanted = {n: v for n, _, v in (name.partition(":") for name in names)}

    def copy(self) -> list[str]:
        """Copy what is new, and return what could not be copied, a line each.

        Raises:
            CheckpointError: the store elsewhere cannot be listed.
        """
        problems = []
        for name, version in self._missing():
            try:
                install(f"{self._url}/{name}/{version}", self._store, version, try_out=False)
            except CheckpointError as error:
                problems.append(str(error))
            else:
                log.info("a checkpoint was copied", model=name, version=version)
        return problems

    def _missing(self) -> Iterator[tuple[str, int]]:
        for name, versions in sorted(self._there().items()):
            if self._wanted and name not in self._wanted:
                continue
            pinned = self._wanted.get(name, "")
            version = int(pinned) if pinned.isdecimal() else max(versions)
            folder = self._store / name / str(version)
            if version in versions and not (folder / MANIFEST).exists():
                yield name, version

    def _there(self) -> dict[str, list[int]]:
        try:
            import fsspec

            system, root = fsspec.core.url_to_fs(self._url)
            found = system.glob(f"{root}/*/*/{MANIFEST}")
        except ImportError as error:
            message = f"{self._url}: {error} (pip install 'budgetformer-serving[remote]')"
            raise CheckpointError(message) from error
        except Exception as error:  # every file system has errors of its own
            told = one_line(error) or type(error).__name__
            raise CheckpointError(f"{self._url}: {told}") from error
        models: dict[str, list[int]] = {}
        for path in found:
            name, version = str(path).split("/")[-3:-1]
            if NAME_PATTERN.fullmatch(name) and version.isdecimal():
                models.setdefault(name, []).append(int(version))
        return models


def mirror_of(settings: Settings) -> Mirror | None:
    """Return the mirror that the settings ask for, and make the folder that it copies into."""
    if settings.remote_store is None:
        return None
    settings.model_store.mkdir(parents=True, exist_ok=True)
    return Mirror(settings.remote_store, settings.model_store, settings.models)


def copy(mirror: Mirror) -> None:
    """Copy what is new, and log what could not be copied: what is here can be served meanwhile."""
    try:
        problems = mirror.copy()
    except CheckpointError as error:
        problems = [str(error)]
    for problem in problems:
        log.error("a checkpoint was not copied", reason=problem)
