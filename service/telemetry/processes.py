"""CPU time, memory and open files of the server's processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress

import psutil
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

Family = Callable[[], Mapping[str, int]]
"""Returns the names of the server's processes and their ids."""


def only_this_process() -> Mapping[str, int]:
    """Return this process as the only one, under the name `supervisor`."""
    return {"supervisor": os.getpid()}


class FamilyCollector(Collector):
    """The usual process metrics of Prometheus, for each process of a server by its name.

    Args:
        prefix: prefix of the metrics' names.
        family: returns the processes.
    """

    def __init__(self, prefix: str, family: Family) -> None:
        self._prefix = prefix
        self._family = family

    def describe(self) -> Iterator[Metric]:
        """Yield the metrics without values."""
        yield from self._metrics()

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of all running processes."""
        metrics = self._metrics()
        for name, pid in self._family().items():
            with suppress(psutil.Error, OSError):  # the process has ended
                process = psutil.Process(pid)
                with process.oneshot():
                    times = process.cpu_times()
                    values = (
                        times.user + times.system,
                        process.memory_info().rss,
                        process.create_time(),
                        process.num_fds(),
                        process.rlimit(psutil.RLIMIT_NOFILE)[0],
                    )
                for metric, value in zip(metrics, values, strict=True):
                    metric.add_metric([name], value)
        yield from metrics

    def _metrics(self) -> list[CounterMetricFamily | GaugeMetricFamily]:
        prefix, labels = f"{self._prefix}_process", ["process"]
        return [
            CounterMetricFamily(f"{prefix}_cpu_seconds", "CPU time.", labels=labels),
            GaugeMetricFamily(f"{prefix}_resident_memory_bytes", "Resident memory.", labels=labels),
            GaugeMetricFamily(f"{prefix}_start_time_seconds", "Start, Unix time.", labels=labels),
            GaugeMetricFamily(f"{prefix}_open_fds", "Open file descriptors.", labels=labels),
            GaugeMetricFamily(f"{prefix}_max_fds", "Limit on open descriptors.", labels=labels),
        ]
