"""A real Ray cluster on this machine: a head and two hosts.

Each host has cores for three engines. It runs a frontend and one engine of each pool, so it has
room for one more engine.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.cluster import RAY
from tests.support.processes import free_port
from tests.support.stores import model_store
from tests.support.waiting import wait_until

__all__ = ["model_store"]

PATIENCE = 300.0
SCALING = {
    "replicas": 2, "max_replicas": 3, "target_seconds": 0.005, "up_seconds": 1, "down_seconds": 1,
}  # fmt: skip
ADMIN_KEY = "open-sesame"
HOSTS = 2

# Ray's default timeouts are too short for a busy machine.
os.environ |= RAY | {
    "RAY_AUTH_MODE": "disabled",
    "RAY_raylet_start_wait_time_s": "120",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
    # The default ports belong to a cluster that may already run on this machine.
    "RAY_SERVE_HAPROXY_METRICS_PORT": "19101",
    "RAY_SERVE_HAPROXY_STATS_PORT": "18404",
    # Seconds between the reports that scale the number of engines.
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
}


class Running:
    """The application on a cluster."""

    def __init__(self, url: str, cluster: Any, store: Path) -> None:
        self.url = url
        self.cluster = cluster
        self.store = store
        self.client = httpx.Client(base_url=url, timeout=60)

    def health(self) -> dict[str, Any]:
        """Return the answer of /health, or the status "unavailable"."""
        try:
            health = self.client.get("/health").json()
        except (httpx.HTTPError, ValueError):
            return {"status": "unavailable", "engines": []}
        assert isinstance(health, dict)
        return health

    def has_engines(self, count: int) -> bool:
        """Return whether exactly `count` engines are alive and have loaded both models."""
        health = self.health()
        alive = [engine for engine in health["engines"] if engine["alive"]]
        loaded = all(len(engine["models"]) == 2 for engine in alive)
        return health["status"] == "ok" and len(alive) == count and loaded

    def answer(self, texts: list[str], **fields: Any) -> dict[str, Any]:
        """Classify texts, and return the answer."""
        body = {"input": texts, "timeout_ms": 60_000} | fields
        response = self.client.post("/classify", json=body)
        assert response.status_code == 200, response.text
        answer = response.json()
        assert isinstance(answer, dict)
        return answer


@pytest.fixture(scope="module")
def running(model_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Return the application: engines for step 0 and engines for all steps, one on each host."""
    ray = pytest.importorskip("ray", reason="needs Ray (make test-cluster)")
    from ray import serve
    from ray.cluster_utils import Cluster
    from ray.serve.config import HTTPOptions

    from service.cluster.application import NAME, build
    from service.settings import Pool, Settings

    store = tmp_path_factory.mktemp("cluster") / "store"
    for name in ("topics/1", "pairs/1"):
        shutil.copytree(model_store / name, store / name)
    port = free_port()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        for _ in range(HOSTS):
            cluster.add_node(num_cpus=3)
        ray.init(cluster.address, namespace="serve", log_to_driver=False)
        serve.start(proxy_location="HeadOnly", http_options=HTTPOptions(port=port))
        pools = {
            "small": Pool(max_step=0, replicas=HOSTS),
            "large": Pool(**SCALING),
        }
        settings = Settings(
            model_store=store, default_model="topics", pools=pools, dtype="float32",
            fronts=2, admin_key=ADMIN_KEY, log_level="warning", hang_seconds=60,
        )  # fmt: skip
        serve.run(build(settings), name=NAME)
        application = Running(f"http://127.0.0.1:{port}", cluster, store)
        wait_until(lambda: application.has_engines(2 * HOSTS), "all engines", PATIENCE)
        yield application
        application.client.close()
        serve.shutdown()
    finally:
        ray.shutdown()
        cluster.shutdown()
