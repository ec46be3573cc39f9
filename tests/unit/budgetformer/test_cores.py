"""Usable cores under control groups of version 1 and 2, in and outside containers."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from budgetformer import cores
from budgetformer.cores import cpu_quota, limit_threads, usable_cores
from budgetformer.subprocesses import python_command
from service.settings import Settings


@dataclass
class Groups:
    """A folder in place of /sys/fs/cgroup, and a file in place of /proc/self/cgroup."""

    root: Path

    def set_membership(self, lines: str) -> None:
        (self.root / "membership").write_text(lines)

    def set_quota(self, path: str, quota: int | str, period: int | None = 100_000) -> None:
        folder = self.root / path
        folder.mkdir(parents=True, exist_ok=True)
        if path.startswith("cpu"):
            (folder / "cpu.cfs_quota_us").write_text(f"{quota}\n")
            (folder / "cpu.cfs_period_us").write_text(f"{period}\n")
        else:
            (folder / "cpu.max").write_text(f"{quota} {period}\n")


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Groups:
    monkeypatch.setattr(cores, "CGROUPS", tmp_path)
    monkeypatch.setattr(cores, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    return Groups(tmp_path)


def test_without_a_quota_the_affinity_counts(groups: Groups) -> None:
    assert (cpu_quota(), usable_cores()) == (None, 8)
    groups.set_membership("0::/\n")
    assert (cpu_quota(), usable_cores()) == (None, 8)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("quota", "usable"),
    [(10_000, 1), (99_999, 1), (100_000, 1), (150_000, 1), (250_000, 2), (6_400_000, 8), (-1, 8)],
)
def test_a_quota_is_rounded_down_to_at_least_one_core(
    groups: Groups, version: int, quota: int, usable: int
) -> None:
    groups.set_membership("3:cpu,cpuacct:/\n" if version == 1 else "0::/\n")
    groups.set_quota("cpu,cpuacct" if version == 1 else ".", "max" if quota < 0 else quota)
    if quota < 0 and version == 1:
        groups.set_quota("cpu,cpuacct", -1)
    assert usable_cores() == usable


def test_the_smallest_quota_of_group_and_ancestors_counts(groups: Groups) -> None:
    groups.set_membership("0::/tenant/unit.service\n")
    groups.set_quota("tenant", 300_000)
    groups.set_quota("tenant/unit.service", "max")
    groups.set_quota("tenant/other.service", 100_000)
    assert (cpu_quota(), usable_cores()) == (3.0, 3)
    groups.set_quota("tenant/unit.service", 50_000, 20_000)
    assert (cpu_quota(), usable_cores()) == (2.5, 2)


def test_a_container_may_see_its_path_on_the_host(groups: Groups) -> None:
    groups.set_membership("4:memory:/docker/0123\n3:cpu:/docker/0123\n0::/docker/0123\n")
    groups.set_quota("cpu", 400_000)
    (groups.root / "memory").mkdir()
    assert usable_cores() == 4


@pytest.mark.parametrize("content", ["", "max", "many 100000", "100000 0", "1 2 3", "\x00"])
def test_invalid_quota_files_are_ignored(groups: Groups, content: str) -> None:
    groups.set_membership("0::/\n")
    (groups.root / "cpu.max").write_text(content)
    assert (cpu_quota(), usable_cores()) == (None, 8)


def test_the_server_runs_one_engine_per_core_of_the_quota(groups: Groups) -> None:
    groups.set_membership("0::/\n")
    groups.set_quota(".", 350_000)
    settings = Settings(device="cpu")
    assert settings.resolved_engines() == 3
    assert Settings(device="cpu", threads_per_engine=2).resolved_engines() == 1
    assert Settings(device="cpu", engines=7).resolved_engines() == 7


def test_torch_uses_no_more_threads_than_cores_of_the_quota(
    groups: Groups, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # so that monkeypatch restores it
    monkeypatch.delenv("OMP_NUM_THREADS")
    limit_threads()
    assert "OMP_NUM_THREADS" not in os.environ
    groups.set_membership("0::/\n")
    groups.set_quota(".", 120_000)
    limit_threads()
    command = python_command("-c", "import torch; print(torch.get_num_threads())")
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "1\n"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    limit_threads()
    assert os.environ["OMP_NUM_THREADS"] == "5"
