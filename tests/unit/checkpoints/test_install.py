"""`budgetformer models add` adds complete, verified checkpoints or leaves the store unchanged."""

from __future__ import annotations

import http.server
import io
import json
import shutil
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from budgetformer.checkpoint.install import install, sources
from budgetformer.checkpoint.manifest import file_entries, write_manifest
from budgetformer.checkpoint.store import read_checkpoint, read_store
from budgetformer.errors import CheckpointError
from tests.support.stores import TOPICS


@pytest.fixture
def checkpoint(model_store: Path, tmp_path: Path) -> Path:
    """Return a copied checkpoint, for a test to damage."""
    return Path(shutil.copytree(model_store / TOPICS / "2", tmp_path / "given"))


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def tarred(folder: Path, path: Path, under: str = "") -> Path:
    with tarfile.open(path, f"w:{path.suffix[1:]}" if path.suffix != ".tar" else "w") as tar:
        tar.add(folder, under or ".")
    return path


def zipped(folder: Path, path: Path, under: str = "") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in folder.iterdir():
            archive.write(file, f"{under}/{file.name}" if under else file.name)
    return path


def refused(source: Any, store: Path, **how: Any) -> str:
    """Return the message that refuses a source, and check that the store is unchanged."""
    before = sorted(store.rglob("*"))
    with pytest.raises(CheckpointError) as caught:
        install(str(source), store, **how)
    assert sorted(store.rglob("*")) == before
    assert ".adding" not in str(caught.value)
    return str(caught.value)


FORMATS: dict[str, Callable[[Path, Path], Path]] = {
    "folder": lambda folder, _: folder,
    "tar": lambda folder, scratch: tarred(folder, scratch / "it.tar"),
    "tar.gz": lambda folder, scratch: tarred(folder, scratch / "it.gz", "topics/2"),
    "tar.xz": lambda folder, scratch: tarred(folder, scratch / "it.xz"),
    "zip": lambda folder, scratch: zipped(folder, scratch / "it.zip"),
    "zip with a folder": lambda folder, scratch: zipped(folder, scratch / "it.zip", "topics"),
}


@pytest.mark.parametrize("form", FORMATS)
def test_a_checkpoint_is_added_unchanged(
    checkpoint: Path, store: Path, tmp_path: Path, form: str
) -> None:
    (checkpoint / "notes.txt").write_text("not a file of the checkpoint")
    added = install(str(FORMATS[form](checkpoint, tmp_path)), store)
    assert (added.label, added.path) == ("topics:2", store / TOPICS / "2")
    added.verify()
    assert added.manifest == read_checkpoint(checkpoint).manifest
    assert not (added.path / "notes.txt").exists()
    assert (added.path / "README.md").is_file()
    assert [p.name for p in store.iterdir()] == [TOPICS]


def test_the_version_is_its_own_or_the_next_or_the_given_one(checkpoint: Path, store: Path) -> None:
    source = str(checkpoint)
    assert install(source, store).version == 2  # the version in its manifest
    assert install(source, store).version == 3  # the next free version
    assert install(source, store, version=9).version == 9
    assert install(source, store, version=1).version == 1
    assert "--version" in refused(source, store, version=9)
    found = read_store(store)
    assert found.errors == []
    assert [c.version for c in found.checkpoints[TOPICS]] == [1, 2, 3, 9]


def test_a_damaged_or_missing_file_is_refused(checkpoint: Path, store: Path) -> None:
    path = checkpoint / "tokenizer.json"
    path.write_bytes(path.read_bytes().replace(b"a", b"b", 1))
    assert "sha256 differs" in refused(checkpoint, store)
    path.unlink()
    assert "tokenizer.json: missing" in refused(checkpoint, store)


def test_a_file_larger_than_in_the_manifest_is_refused(checkpoint: Path, store: Path) -> None:
    with (checkpoint / "config.json").open("ab") as file:
        file.write(b" ")
    assert "config.json is larger than" in refused(checkpoint, store)


@pytest.mark.parametrize(
    "name", ["../evil.json", "/tmp/evil.json", "a/b.json", "..", "manifest.json"]
)
def test_a_manifest_with_paths_outside_its_folder_is_refused(
    checkpoint: Path, store: Path, name: str
) -> None:
    path = checkpoint / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"][name] = {"sha256": "0" * 64, "bytes": 1}
    path.write_text(json.dumps(manifest))
    assert "leaves the folder" in refused(checkpoint, store)


def test_a_manifest_with_too_large_files_is_refused(checkpoint: Path, store: Path) -> None:
    path = checkpoint / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["model.safetensors"]["bytes"] = 10**15
    path.write_text(json.dumps(manifest))
    assert "too large" in refused(checkpoint, store)


def test_a_network_that_cannot_be_loaded_is_refused(checkpoint: Path, store: Path) -> None:
    """The files agree with the manifest, but not with each other."""
    config = json.loads((checkpoint / "config.json").read_text())
    config["intermediate_size"] *= 2
    (checkpoint / "config.json").write_text(json.dumps(config))
    manifest = read_checkpoint(checkpoint).manifest
    files = file_entries(checkpoint)
    write_manifest(checkpoint, manifest.model_copy(update={"files": files}))
    assert "mismatched" in refused(checkpoint, store)


@pytest.mark.parametrize("kind", ["empty folder", "not an archive", "nothing"])
def test_a_source_without_a_checkpoint_is_refused(store: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "it"
    if kind == "empty folder":
        path.mkdir()
    elif kind == "not an archive":
        path.write_bytes(b"hello" * 1000)
    assert str(path) in refused(path, store)


def test_an_archive_of_two_checkpoints_is_refused(
    checkpoint: Path, store: Path, tmp_path: Path
) -> None:
    with tarfile.open(tmp_path / "two.tar", "w") as tar:
        tar.add(checkpoint, "a")
        tar.add(checkpoint, "b")
    assert "2 checkpoints" in refused(tmp_path / "two.tar", store)


def member(kind: bytes, name: str = "extra") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    return info


UNSAFE = {
    "traversal": tarfile.TarInfo("../evil"),
    "deep traversal": tarfile.TarInfo("a/b/../../../evil"),
    "absolute": tarfile.TarInfo("/tmp/evil"),
    "symbolic link": member(tarfile.SYMTYPE),
    "link in place of a file": member(tarfile.SYMTYPE, "config.json"),
    "hard link": member(tarfile.LNKTYPE),
    "character device": member(tarfile.CHRTYPE),
    "block device": member(tarfile.BLKTYPE),
    "pipe": member(tarfile.FIFOTYPE),
}


@pytest.mark.parametrize("kind", UNSAFE)
def test_an_unsafe_tar_is_refused(checkpoint: Path, store: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "it.tar"
    with tarfile.open(path, "w") as tar:
        tar.addfile(UNSAFE[kind], io.BytesIO())
        tar.add(checkpoint, ".")
    line = refused(path, store)
    assert "leaves the archive" in line or "neither a file nor a folder" in line
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a\\..\\..\\evil"])
def test_an_unsafe_zip_is_refused(checkpoint: Path, store: Path, tmp_path: Path, name: str) -> None:
    path = zipped(checkpoint, tmp_path / "it.zip")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, "evil")
    assert "leaves the archive" in refused(path, store)


def test_a_link_in_a_zip_is_refused(checkpoint: Path, store: Path, tmp_path: Path) -> None:
    path = zipped(checkpoint, tmp_path / "it.zip")
    link = zipfile.ZipInfo("link")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(link, "/etc/passwd")
    assert "neither a file nor a folder" in refused(path, store)


@pytest.mark.parametrize("kind", ["gz", "zip"])
def test_a_file_that_unpacks_to_more_than_in_the_manifest_is_refused(
    checkpoint: Path, store: Path, tmp_path: Path, kind: str
) -> None:
    with (checkpoint / "config.json").open("ab") as file:
        file.write(b" " * 50_000_000)
    pack = zipped if kind == "zip" else tarred
    path = pack(checkpoint, tmp_path / f"bomb.{kind}")
    assert path.stat().st_size < 5_000_000
    assert "config.json is larger than" in refused(path, store)


def test_an_archive_that_unpacks_to_too_much_is_refused(
    checkpoint: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (checkpoint / "zeros").write_bytes(bytes(10_000_000))
    path = tarred(checkpoint, tmp_path / "bomb.gz")
    monkeypatch.setattr(sources, "MAX_BYTES", 5_000_000)
    assert "unpacks to more than" in refused(path, store)


def test_an_archive_of_too_many_files_is_refused(
    checkpoint: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "MAX_MEMBERS", 3)
    for path in (tarred(checkpoint, tmp_path / "it.tar"), zipped(checkpoint, tmp_path / "it.zip")):
        assert "more than 3 files" in refused(path, store)


@pytest.mark.parametrize("kind", ["gz", "zip", "tar"])
def test_a_truncated_archive_is_refused(
    checkpoint: Path, store: Path, tmp_path: Path, kind: str
) -> None:
    path = (zipped if kind == "zip" else tarred)(checkpoint, tmp_path / f"it.{kind}")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert str(path) in refused(path, store)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[str]:
    """Return the URL of a web server that serves a folder, and redirects from /moved."""
    (tmp_path / "site").mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(tmp_path / "site"))

        def do_GET(self) -> None:
            if self.path.startswith("/moved/"):
                self.send_response(302)
                self.send_header("Location", self.path.removeprefix("/moved"))
                self.end_headers()
            else:
                super().do_GET()

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("prefix", ["", "/moved"])
def test_an_archive_is_downloaded_with_progress(
    checkpoint: Path, store: Path, tmp_path: Path, site: str, prefix: str
) -> None:
    path = tarred(checkpoint, tmp_path / "site" / "it.gz")
    progress: list[tuple[int, int | None]] = []
    added = install(
        f"{site}{prefix}/it.gz", store, tell=lambda done, total: progress.append((done, total))
    )
    assert added.label == "topics:2"
    assert progress[-1] == (path.stat().st_size, path.stat().st_size)
    assert [p.name for p in store.iterdir()] == [TOPICS]


def test_unavailable_urls_are_one_line(store: Path, site: str) -> None:
    assert "404" in refused(f"{site}/nothing.zip", store)
    assert "127.0.0.1:9" in refused("http://127.0.0.1:9/it.zip", store)
    assert "http://" in refused("http://", store)


def test_a_download_above_the_size_limit_is_refused(
    checkpoint: Path, store: Path, tmp_path: Path, site: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tarred(checkpoint, tmp_path / "site" / "it.tar")
    monkeypatch.setattr(sources, "MAX_BYTES", 10_000)
    assert "larger than 10000 bytes" in refused(f"{site}/it.tar", store)


@pytest.mark.parametrize("archived", [True, False])
def test_a_checkpoint_is_read_from_a_remote_file_system(
    checkpoint: Path, store: Path, tmp_path: Path, archived: bool
) -> None:
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    try:
        if archived:
            memory.put(str(tarred(checkpoint, tmp_path / "it.tar")), "/models/it.tar")
            source = "memory://models/it.tar"
        else:
            memory.put(str(checkpoint), "/models/topics", recursive=True)
            source = "memory://models/topics"
        assert install(source, store).label == "topics:2"
    finally:
        memory.store.clear()


def test_unavailable_remote_files_are_one_line(store: Path) -> None:
    pytest.importorskip("fsspec")
    assert "no such file" in refused("memory://nothing/here.tar", store)
    assert "nonsense" in refused("nonsense://bucket/it.tar", store)
