"""A store elsewhere, copied into the local one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from budgetformer.checkpoint import read_store
from budgetformer.errors import CheckpointError
from service.hub.mirror import Mirror
from service.hub.poll import StorePoll
from tests.support.serving import service
from tests.support.stores import PAIRS, TOPICS, sentences

TEXT = sentences("animals")[0]


@pytest.fixture
def bucket(store: Path, tmp_path: Path) -> str:
    """Return the URL of a store with topics 1 and 2, and pairs."""
    MemoryFileSystem().put(str(store), f"/{tmp_path.name}", recursive=True)
    return f"memory://{tmp_path.name}"


def inside(bucket: str, path: str) -> str:
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


def test_a_model_that_is_asked_for_alone_or_by_its_version(bucket: str, tmp_path: Path) -> None:
    Mirror(bucket, tmp_path / "here", ["topics:1"]).copy()
    assert versions(tmp_path / "here") == {TOPICS: [1]}


def test_what_is_there_is_not_copied_again(bucket: str, tmp_path: Path) -> None:
    mirror = Mirror(bucket, tmp_path / "here", [TOPICS])
    mirror.copy()
    MemoryFileSystem().rm(inside(bucket, "topics/2/model.safetensors"))
    assert mirror.copy() == []


def test_a_damaged_one_is_named_and_leaves_nothing_behind(bucket: str, tmp_path: Path) -> None:
    MemoryFileSystem().pipe(inside(bucket, "topics/2/model.safetensors"), b"nonsense")
    (problem,) = Mirror(bucket, tmp_path / "here", []).copy()
    assert "topics/2" in problem
    assert versions(tmp_path / "here") == {PAIRS: [1]}
    assert not list((tmp_path / "here").glob(".adding-*"))


@pytest.mark.parametrize("url", ["nosuchscheme://bucket/models", "memory://nothing"])
def test_a_store_that_cannot_be_listed_or_is_empty(url: str, tmp_path: Path) -> None:
    mirror = Mirror(url, tmp_path / "here", [])
    if url.startswith("memory"):
        assert mirror.copy() == []
    else:
        with pytest.raises(CheckpointError, match="nosuchscheme"):
            mirror.copy()


async def test_what_comes_into_the_bucket_is_served(bucket: str, tmp_path: Path) -> None:
    here = tmp_path / "here"
    mirror = Mirror(bucket, here, [TOPICS])
    Mirror(bucket, here, ["topics:1"]).copy()
    async with service(here, models=[TOPICS]) as running:
        assert (await running.answer(TEXT))["model"] == "topics:1"
        await StorePoll(running.hub, [TOPICS], mirror).look()
        assert (await running.answer(TEXT))["model"] == "topics:2"


def test_a_name_that_leads_elsewhere_is_passed_over(
    bucket: str, store: Path, tmp_path: Path
) -> None:
    shutil.copytree(store / PAIRS / "1", tmp_path / "odd")
    manifest = json.loads((tmp_path / "odd" / "manifest.json").read_text())
    (tmp_path / "odd" / "manifest.json").write_text(json.dumps(manifest))
    MemoryFileSystem().put(str(tmp_path / "odd"), inside(bucket, ".hidden/1"), recursive=True)
    Mirror(bucket, tmp_path / "here", []).copy()
    assert versions(tmp_path / "here") == {PAIRS: [1], TOPICS: [2]}
