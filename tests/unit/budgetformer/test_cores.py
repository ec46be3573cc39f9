"""Usable cores, with control groups as version 1 and 2 have them, in and out of containers."""

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
    """A folder in place of /sys/fs/cgroup, and the groups that this process says it is in."""

    root: Path

    def member(self, lines: str) -> None:
        (self.root / "membership").write_text(lines)

    def write(self, path: str, quota: int | str, period: int | None = 100_000) -> None:
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


def test_without_control_groups_the_affinity_counts(groups: Groups) -> None:
    assert (cpu_quota(), usable_cores()) == (None, 8)
    groups.member("0::/\n")
    assert (cpu_quota(), usable_cores()) == (None, 8)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("quota", "usable"),
    [(10_000, 1), (99_999, 1), (100_000, 1), (150_000, 1), (250_000, 2), (6_400_000, 8), (-1, 8)],
)
def test_a_quota_is_rounded_down_to_at_least_one_core(
    groups: Groups, version: int, quota: int, usable: int
) -> None:
    groups.member("3:cpu,cpuacct:/\n" if version == 1 else "0::/\n")
    groups.write("cpu,cpuacct" if version == 1 else ".", "max" if quota < 0 else quota)
    if quota < 0 and version == 1:
        groups.write("cpu,cpuacct", -1)
    assert usable_cores() == usable


def test_the_smallest_quota_on_the_way_to_the_root_counts(groups: Groups) -> None:
    groups.member("0::/tenant/unit.service\n")
    groups.write("tenant", 300_000)
    groups.write("tenant/unit.service", "max")
    groups.write("tenant/other.service", 100_000)
    assert (cpu_quota(), usable_cores()) == (3.0, 3)
    groups.write("tenant/unit.service", 50_000, 20_000)
    assert (cpu_quota(), usable_cores()) == (2.5, 2)


def test_in_a_container_the_path_is_the_hosts(groups: Groups) -> None:
    groups.member("4:memory:/docker/0123\n3:cpu:/docker/0123\n0::/docker/0123\n")
    groups.write("cpu", 400_000)
    (groups.root / "memory").mkdir()
    assert usable_cores() == 4


@pytest.mark.parametrize("content", ["", "max", "many 100000", "100000 0", "1 2 3", "\x00"])
def test_files_that_make_no_sense_are_no_limit(groups: Groups, content: str) -> None:
    groups.member("0::/\n")
    (groups.root / "cpu.max").write_text(content)
    assert (cpu_quota(), usable_cores()) == (None, 8)


def test_the_server_runs_as_many_engines_as_the_quota_has_cores(groups: Groups) -> None:
    groups.member("0::/\n")
    groups.write(".", 350_000)
    settings = Settings(device="cpu")
    assert settings.resolved_engines() == 3
    assert Settings(device="cpu", threads_per_engine=2).resolved_engines() == 1
    assert Settings(device="cpu", engines=7).resolved_engines() == 7


def test_torch_starts_no_more_threads_than_the_quota_has_cores(
    groups: Groups, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # so that it is put back
    monkeypatch.delenv("OMP_NUM_THREADS")
    limit_threads()
    assert "OMP_NUM_THREADS" not in os.environ
    groups.member("0::/\n")
    groups.write(".", 120_000)
    limit_threads()
    ask = python_command("-c", "import torch; print(torch.get_num_threads())")
    assert subprocess.run(ask, capture_output=True, text=True, check=True).stdout == "1\n"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    limit_threads()
    assert os.environ["OMP_NUM_THREADS"] == "5"
