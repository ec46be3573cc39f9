"""Autoscaling of a pool by the seconds of work that wait."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from service.cluster.autoscaling import QueueSeconds, replicas_for


@pytest.mark.parametrize(
    ("queues", "busy", "wanted"),
    [
        ([0.0, 0.0], [0.0, 0.0], 1),
        ([0.5, 0.5], [1.0, 1.0], 4),
        ([0.0, 0.0, 0.0], [0.7, 0.6, 0.6], 3),
        ([0.01], [0.1], 1),
    ],
    ids=["idle", "work waits", "busy without a queue", "nearly idle"],
)
def test_a_pool_has_the_replicas_that_its_work_needs(
    queues: list[float], busy: list[float], wanted: int
) -> None:
    assert replicas_for(queues, busy, target=0.25) == wanted


def context(metrics: dict[str, dict[str, float]] | None) -> Any:
    return SimpleNamespace(aggregated_metrics=metrics, target_num_replicas=3)


def test_the_policy_reads_the_reports_of_replicas() -> None:
    metrics = {"queue_seconds": {"a": 1.0, "b": 0.0}, "busy": {"a": 1.0, "b": 0.1}}
    assert QueueSeconds(target=0.5)(context(metrics)) == (2, {})


@pytest.mark.parametrize("metrics", [None, {}])
def test_without_reports_the_number_of_replicas_stays(metrics: dict[str, Any] | None) -> None:
    assert QueueSeconds(target=0.5)(context(metrics)) == (3, {})
