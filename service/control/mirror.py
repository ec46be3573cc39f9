"""A store elsewhere, of which the local one is a copy: `s3://bucket/models` and its like."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from pathlib import Path

import structlog

from budgetformer.checkpoint.install import install
from budgetformer.checkpoint.manifest import MANIFEST, NAME
from budgetformer.errors import CheckpointError
from service.background import describe
from service.settings import Settings

log = structlog.get_logger()

START_SECONDS = 120.0
"""How long a server waits for the store elsewhere before it serves what is here."""
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
        self.url = url.rstrip("/")
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
                install(f"{self.url}/{name}/{version}", self._store, version, try_out=False)
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # a driver raises what it likes; the others are copied
                told = str(error) if isinstance(error, CheckpointError) else describe(error)
                problems.append(f"{self.url}/{name}/{version}: {told}")
            else:
                log.info("checkpoint copied", model=name, version=version)
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

            system, root = fsspec.core.url_to_fs(self.url)
            found = system.glob(f"{root}/*/*/{MANIFEST}")
        except ImportError as error:
            message = f"{self.url}: {error} (pip install 'budgetformer-serving[remote]')"
            raise CheckpointError(message) from error
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # every file system has errors of its own
            raise CheckpointError(f"{self.url}: {describe(error)}") from error
        models: dict[str, list[int]] = {}
        for path in map(str, found):
            name, version = ["", "", *path.split("/")][-3:-1]
            if NAME_PATTERN.fullmatch(name) and version.isdecimal():
                models.setdefault(name, []).append(int(version))
        return models


def mirror_of(settings: Settings) -> Mirror | None:
    """Return the mirror that the settings ask for, and make the folder that it copies into."""
    if settings.remote_store is None:
        return None
    settings.model_store.mkdir(parents=True, exist_ok=True)
    return Mirror(settings.remote_store, settings.model_store, settings.models)


def copy(mirror: Mirror) -> list[str]:
    """Copy what is new, and return what could not be copied, a line each."""
    try:
        return mirror.copy()
    except CheckpointError as error:
        return [str(error)]
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # what a driver lists need not be paths
        return [f"{mirror.url}: {describe(error)}"]


def copy_at_start(mirror: Mirror, seconds: float = START_SECONDS) -> None:
    """Copy what is new before serving, and log what could not be copied.

    A store elsewhere that does not answer in time is not waited for.
    """
    problems = [f"the remote store does not answer within {seconds:g} s"]

    def work() -> None:
        problems[:] = copy(mirror)

    copying = threading.Thread(target=work, daemon=True, name="copy")
    copying.start()
    copying.join(seconds)
    for problem in problems:
        log.error("checkpoint copy failed", reason=problem)
