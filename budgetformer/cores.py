"""The number of cores that this process may use, from its affinity and its cgroups' CPU quotas."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
"""File that lists this process's control groups, one line per hierarchy."""


def usable_cores() -> int:
    """Return the number of cores that this process may use, at least 1.

    A quota (`docker --cpus`, a CPU limit of Kubernetes, systemd's CPUQuota) is rounded down: with
    one engine more, the kernel would throttle all of them; the frontend uses the remainder.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = cpu_quota()
    return max(1, min(cores or 1, int(cores or 1 if quota is None else quota)))


def cpu_quota() -> float | None:
    """Return the CPU quota of this process's control groups in cores; None: no limit."""
    quotas = [quota for folder in cgroups("cpu") if (quota := _quota(folder)) is not None]
    return min(quotas, default=None)


def limit_threads() -> None:
    """Limit the threads of OpenMP (used by torch and NumPy) to the cores of the CPU quota.

    Call this before importing them: by default they count the cores of the machine.
    """
    if cpu_quota() is not None:
        os.environ.setdefault("OMP_NUM_THREADS", str(usable_cores()))


def cgroups(controller: str) -> Iterator[Path]:
    """Yield the folders of this process's control groups, from the root to the innermost.

    Version 2 has one hierarchy, version 1 one per controller. In a container, the root is the
    container's group, and the path on the host may not exist.
    """
    try:
        lines = MEMBERSHIP.read_text().splitlines()
    except OSError:
        lines = ["0::/"]
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        roots = [CGROUPS / controllers, CGROUPS / controller] if controllers else [CGROUPS]
        root = next(filter(Path.is_dir, roots), None)
        if root is not None:
            innermost = root / path.lstrip("/")
            parents = [folder for folder in innermost.parents if folder.is_relative_to(root)]
            yield from reversed([innermost, *parents])


def _quota(folder: Path) -> float | None:
    """Return the quota of a control group in cores; None: it has none or cannot be read."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text()
            period = (folder / "cpu.cfs_period_us").read_text()
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):  # such as "max"
        return None
