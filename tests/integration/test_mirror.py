"""Copying checkpoints from a remote store to the local one."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from itertools import product
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from structlog.testing import capture_logs

from budgetformer.checkpoint.store import read_store
from service.control.mirror import Mirror, copy_at_start
from service.control.poll import StorePoll
from tests.support.serving import service
from tests.support.stores import PAIRS, TOPICS, sentences

TEXT = sentences("animals")[0]


@pytest.fixture
def bucket(store: Path, tmp_path: Path) -> str:
    """Return the URL of a remote store with topics 1 and 2, and pairs."""
    MemoryFileSystem().put(str(store), f"/{tmp_path.name}", recursive=True)
    return f"memory://{tmp_path.name}"


def path_in_bucket(bucket: str, path: str) -> str:
    return f"{bucket.removeprefix('memory:/')}/{path}"


def versions(folder: Path) -> dict[str, list[int]]:
    found = read_store(folder).checkpoints
    return {name: [c.version for c in checkpoints] for name, checkpoints in found.items()}


def test_the_highest_version_of_every_model_is_copied(bucket: str, tmp_path: Path) -> None:
    assert Mirror(bucket, tmp_path / "here", []).copy() == []
    assert versions(tmp_path / "here") == {PAIRS: [1], TOPICS: [2]}
    for checkpoints in read_store(tmp_path / "here").checkpoints.values():
        for checkpoint in checkpoints:
            checkpoint.verify()


def test_only_the_requested_version_is_copied(bucket: str, tmp_path: Path) -> None:
    Mirror(bucket, tmp_path / "here", ["topics:1"]).copy()
    assert versions(tmp_path / "here") == {TOPICS: [1]}


def test_existing_versions_are_not_copied_again(bucket: str, tmp_path: Path) -> None:
    mirror = Mirror(bucket, tmp_path / "here", [TOPICS])
    mirror.copy()
    MemoryFileSystem().rm(path_in_bucket(bucket, "topics/2/model.safetensors"))
    assert mirror.copy() == []


def test_a_damaged_checkpoint_is_reported_and_leaves_no_files(bucket: str, tmp_path: Path) -> None:
    MemoryFileSystem().pipe(path_in_bucket(bucket, "topics/2/model.safetensors"), b"nonsense")
    (problem,) = Mirror(bucket, tmp_path / "here", []).copy()
    assert "topics/2" in problem
    assert versions(tmp_path / "here") == {PAIRS: [1]}
    assert not list((tmp_path / "here").glob(".adding-*"))


@pytest.mark.parametrize("url", ["nosuchscheme://bucket/models", "memory://nothing"])
def test_an_empty_store_copies_nothing_and_an_unknown_scheme_is_an_error(
    url: str, tmp_path: Path
) -> None:
    mirror = Mirror(url, tmp_path / "here", [])
    if url.startswith("memory"):
        assert mirror.copy() == []
    else:
        (problem,) = mirror.copy()
        assert problem.startswith(f"{url}: ")


async def test_new_versions_in_the_remote_store_are_served(bucket: str, tmp_path: Path) -> None:
    here = tmp_path / "here"
    mirror = Mirror(bucket, here, [TOPICS])
    Mirror(bucket, here, ["topics:1"]).copy()
    async with service(here, models=[TOPICS]) as running:
        assert (await running.answer(TEXT))["model"] == "topics:1"
        await StorePoll(running.hub, [TOPICS], mirror).look()
        assert (await running.answer(TEXT))["model"] == "topics:2"


def test_hidden_folders_are_ignored(bucket: str, store: Path, tmp_path: Path) -> None:
    shutil.copytree(store / PAIRS / "1", tmp_path / "odd")
    manifest = json.loads((tmp_path / "odd" / "manifest.json").read_text())
    (tmp_path / "odd" / "manifest.json").write_text(json.dumps(manifest))
    MemoryFileSystem().put(
        str(tmp_path / "odd"), path_in_bucket(bucket, ".hidden/1"), recursive=True
    )
    Mirror(bucket, tmp_path / "here", []).copy()
    assert versions(tmp_path / "here") == {PAIRS: [1], TOPICS: [2]}


class DriverError(BaseException):
    """An exception of a driver that is not even an `Exception`."""


ERRORS = (
    ValueError("no bucket"), KeyError("x"), OSError(5, "Input/output error"), RuntimeError(),
    MemoryError(), StopIteration(), SystemExit(3), GeneratorExit(), asyncio.CancelledError(),
    DriverError("two\nlines"),
)  # fmt: skip
each_error = pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)


class FailingFileSystem(MemoryFileSystem):  # type: ignore[misc]
    """A remote store whose driver raises when it lists or opens files."""

    protocol = "failing"
    cachable = False
    list_error: BaseException | None = None
    open_error: BaseException | None = None

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.replace("failing:", "memory:")))

    def glob(self, path: str, **named: object) -> object:
        if self.list_error is not None:
            raise self.list_error
        return super().glob(path, **named)

    def _open(self, path: str, *given: object, **named: object) -> object:
        if self.open_error is not None and "topics" in path:
            raise self.open_error
        return super()._open(path, *given, **named)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> type[FailingFileSystem]:
    fsspec.register_implementation("failing", FailingFileSystem, clobber=True)
    monkeypatch.setattr(FailingFileSystem, "list_error", None)
    monkeypatch.setattr(FailingFileSystem, "open_error", None)
    return FailingFileSystem


async def test_errors_of_a_driver_are_reported_and_the_server_keeps_serving(
    bucket: str, tmp_path: Path, failing: type[FailingFileSystem]
) -> None:
    here, elsewhere = tmp_path / "here", bucket.replace("memory:", "failing:")
    Mirror(elsewhere, here, ["topics:1"]).copy()
    async with service(here, models=[TOPICS]) as running:
        poll = StorePoll(running.hub, [TOPICS], Mirror(elsewhere, here, [TOPICS]))

        async def problems() -> list[str]:
            await running.client.get("/metrics")
            return list((await running.client.get("/health")).json()["errors"])

        for fault, error in product(("list_error", "open_error"), ERRORS):
            setattr(failing, fault, error)
            with capture_logs() as lines:
                for _ in range(3):
                    await poll.look()
            (line,) = [line for line in lines if line["event"] == "problem reported"]
            assert line["source"] == "remote store"
            assert elsewhere in line["reason"]
            assert await problems() == [line["reason"]]
            assert "\n" not in line["reason"]
            assert (await running.answer(TEXT))["model"] == "topics:1"
            setattr(failing, fault, None)
            running.hub.report_problems("remote store", [])
        await poll.look()
        assert await problems() == []
        assert (await running.answer(TEXT))["model"] == "topics:2"


@each_error
@pytest.mark.parametrize("fault", ["list_error", "open_error"])
def test_errors_of_a_driver_at_start_leave_the_local_store_as_it_is(
    bucket: str,
    store: Path,
    tmp_path: Path,
    failing: type[FailingFileSystem],
    fault: str,
    error: BaseException,
) -> None:
    here, elsewhere = tmp_path / "here", bucket.replace("memory:", "failing:")
    shutil.copytree(store / TOPICS / "1", here / TOPICS / "1")
    setattr(failing, fault, error)
    with capture_logs() as lines:
        copy_at_start(Mirror(elsewhere, here, [TOPICS, PAIRS]))
    problems = [line for line in lines if line["log_level"] == "error"]
    assert [line["event"] for line in problems] == ["checkpoint copy failed"]
    wanted = {TOPICS: [1]} if fault == "list_error" else {TOPICS: [1], PAIRS: [1]}
    assert versions(here) == wanted, "the others are copied"


@pytest.mark.parametrize("found", [None, True, [None], [5, "a"], {"a/1/manifest.json": 1}])
def test_any_listing_of_a_driver_is_handled(
    bucket: str,
    tmp_path: Path,
    failing: type[FailingFileSystem],
    monkeypatch: pytest.MonkeyPatch,
    found: object,
) -> None:
    monkeypatch.setattr(failing, "glob", lambda *_, **__: found)
    mirror = Mirror(bucket.replace("memory:", "failing:"), tmp_path / "here", [])
    assert all("failing://" in problem for problem in mirror.copy())


def test_start_does_not_wait_for_a_hanging_driver(
    bucket: str, tmp_path: Path, failing: type[FailingFileSystem], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    monkeypatch.setattr(failing, "glob", lambda *_, **__: gate.wait(60) and [])
    with capture_logs() as lines:
        copy_at_start(Mirror(bucket.replace("memory:", "failing:"), tmp_path / "here", []), 0.01)
    gate.set()
    (line,) = lines
    assert "does not answer" in line["reason"]
