"""List and open the files of a checkpoint in a folder, in an archive or at a URL."""

from __future__ import annotations

import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Protocol, cast

from budgetformer.errors import CheckpointError

MAX_MEMBERS = 1000
MAX_BYTES = 16 * 2**30
TIMEOUT_SECONDS = 30.0
PART_BYTES = 2**20

Tell = Callable[[int, int | None], None]
"""Function that is called with the bytes fetched so far and the total (None: unknown)."""


class Source(Protocol):
    """The files of a checkpoint, by path with `/` between folders; `label` names it in messages."""

    label: str

    def names(self) -> list[str]:
        """Return the paths of all files, in the order that is fastest to read."""

    def open(self, name: str) -> BinaryIO:
        """Open a file for reading."""


class _Folder:
    def __init__(self, path: Path) -> None:
        self.label, self._path = str(path), path

    def names(self) -> list[str]:
        return sorted(p.name for p in self._path.iterdir() if p.is_file())

    def open(self, name: str) -> BinaryIO:
        return (self._path / name).open("rb")


class _Remote:
    """A folder on a remote file system that fsspec supports."""

    def __init__(self, url: str, system: Any, path: str) -> None:
        self.label, self._system = url, system
        self._paths = {
            str(entry["name"]).rpartition("/")[2]: entry["name"]
            for entry in system.ls(path, detail=True)
            if entry["type"] == "file"
        }

    def names(self) -> list[str]:
        return sorted(self._paths)

    def open(self, name: str) -> BinaryIO:
        return cast("BinaryIO", self._system.open(self._paths[name], "rb"))


class _Tar:
    def __init__(self, label: str, archive: tarfile.TarFile) -> None:
        self.label, self._archive = label, archive
        self._members: dict[str, tarfile.TarInfo] = {}
        size = 0
        for member in archive:
            _check_name(label, member.name, len(self._members))
            if not (member.isreg() or member.isdir()):
                raise CheckpointError(f"{label}: {member.name} is neither a file nor a folder")
            size += member.size
            if size > MAX_BYTES:
                raise CheckpointError(f"{label}: unpacks to more than {MAX_BYTES} bytes")
            if member.isreg():
                self._members[member.name.removeprefix("./")] = member

    def names(self) -> list[str]:
        return list(self._members)

    def open(self, name: str) -> BinaryIO:
        return cast("BinaryIO", self._archive.extractfile(self._members[name]))


class _Zip:
    def __init__(self, label: str, archive: zipfile.ZipFile) -> None:
        self.label, self._archive = label, archive
        self._members: dict[str, zipfile.ZipInfo] = {}
        for member in archive.infolist():
            _check_name(label, member.filename, len(self._members))
            kind = stat.S_IFMT(member.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise CheckpointError(f"{label}: {member.filename} is neither a file nor a folder")
            if not member.is_dir():
                self._members[member.filename] = member

    def names(self) -> list[str]:
        return list(self._members)

    def open(self, name: str) -> BinaryIO:
        return cast("BinaryIO", self._archive.open(self._members[name]))


def _check_name(label: str, name: str, count: int) -> None:
    """Check the name of a file in an archive, of which `count` files have been listed before."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts:
        raise CheckpointError(f"{label}: {name!r} leaves the archive")
    if count >= MAX_MEMBERS:
        raise CheckpointError(f"{label}: has more than {MAX_MEMBERS} files")


@contextmanager
def open_source(source: str, staging: Path, tell: Tell) -> Iterator[Source]:
    """Open a folder, an archive or a URL; an archive at a URL is downloaded to `staging`.

    Raises:
        CheckpointError: the source does not exist, cannot be fetched or read, or is unsafe.
    """
    fetched = staging / "fetched"
    try:
        if source.startswith(("http://", "https://")):
            _download(source, fetched, tell, MAX_BYTES, follow_redirects=True)
        elif "://" in source:
            remote = _fetch(source, fetched, tell, MAX_BYTES)
            if remote is not None:
                yield remote
                return
        elif Path(source).is_dir():
            yield _Folder(Path(source))
            return
        elif not Path(source).is_file():
            raise CheckpointError(f"{source}: no such file or folder")
        else:
            fetched = Path(source)
        with _archive(source, fetched) as archive:
            yield archive
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise CheckpointError(f"{source}: damaged archive: {error}") from error


@contextmanager
def _archive(label: str, path: Path) -> Iterator[Source]:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as zipped:
            yield _Zip(label, zipped)
    elif tarfile.is_tarfile(path):
        with tarfile.open(path) as tar:
            yield _Tar(label, tar)
    else:
        raise CheckpointError(f"{label}: neither a tar nor a zip file")


def download(url: str, target: Path, tell: Tell, max_bytes: int) -> None:
    """Download the file at a URL to `target`, without following redirects.

    Args:
        url: http(s) URL, or any URL that fsspec supports.
        target: file to write.
        tell: function that is called with the bytes fetched and the total (None: unknown).
        max_bytes: maximum size of the file.

    Raises:
        CheckpointError: the file does not exist, cannot be fetched, or is too large.
    """
    if url.startswith(("http://", "https://")):
        _download(url, target, tell, max_bytes, follow_redirects=False)
    elif _fetch(url, target, tell, max_bytes) is not None:
        raise CheckpointError(f"{url}: a folder, not a file")


def _download(
    url: str, target: Path, tell: Tell, max_bytes: int, *, follow_redirects: bool
) -> None:
    try:
        import httpx
    except ImportError as error:
        raise _needs("httpx", url) from error
    try:
        with (
            httpx.stream(
                "GET", url, follow_redirects=follow_redirects, timeout=TIMEOUT_SECONDS
            ) as response,
            target.open("wb") as file,
        ):
            if not response.is_success:
                raise CheckpointError(f"{url}: {response.status_code} {response.reason_phrase}")
            length = response.headers.get("content-length")
            total = int(length) if length and length.isdecimal() else None
            for part in response.iter_raw(PART_BYTES):
                _keep(url, file, part, tell, total, max_bytes)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise CheckpointError(f"{url}: {error or type(error).__name__}") from error


def _fetch(url: str, target: Path, tell: Tell, max_bytes: int) -> Source | None:
    """Return the folder at a URL, or download the file there and return None."""
    try:
        import fsspec
    except ImportError as error:
        raise _needs("fsspec", url) from error
    try:
        system, path = fsspec.core.url_to_fs(url)
        if system.isdir(path):
            return _Remote(url, system, path)
        total = system.size(path)
        with system.open(path, "rb") as file, target.open("wb") as written:
            while part := file.read(PART_BYTES):
                _keep(url, written, part, tell, total, max_bytes)
    except FileNotFoundError as error:
        raise CheckpointError(f"{url}: no such file or folder") from error
    except (OSError, ValueError, ImportError) as error:
        raise CheckpointError(f"{url}: {error}") from error
    return None


def _keep(
    url: str, file: BinaryIO, part: bytes, tell: Tell, total: int | None, max_bytes: int
) -> None:
    file.write(part)
    if file.tell() > max_bytes:
        raise CheckpointError(f"{url}: larger than {max_bytes} bytes")
    tell(file.tell(), total)


def _needs(package: str, url: str) -> CheckpointError:
    return CheckpointError(
        f"{url}: requires {package} (pip install 'budgetformer-serving[remote]')"
    )
