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
    ids=["at rest", "work waits", "busy without a queue", "hardly anything"],
)
def test_a_pool_has_as_many_as_its_work_needs(
    queues: list[float], busy: list[float], wanted: int
) -> None:
    assert replicas_for(queues, busy, target=0.25) == wanted


def context(metrics: dict[str, dict[str, float]] | None) -> Any:
    return SimpleNamespace(aggregated_metrics=metrics, target_num_replicas=3)


def test_the_policy_reads_what_replicas_say() -> None:
    told = {"queue_seconds": {"a": 1.0, "b": 0.0}, "busy": {"a": 1.0, "b": 0.1}}
    assert QueueSeconds(target=0.5)(context(told)) == (2, {})


@pytest.mark.parametrize("told", [None, {}])
def test_while_nobody_says_anything_nothing_changes(told: dict[str, Any] | None) -> None:
    assert QueueSeconds(target=0.5)(context(told)) == (3, {})
