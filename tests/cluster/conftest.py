"""A real Ray cluster on this machine: a head and two hosts, each with processes of its own.

A host has room for three engines, and runs a frontend and one engine of each pool: there may be one
more.
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

# Ray probes with little patience: on a machine that is busy with other things none would come up.
os.environ |= RAY | {
    "RAY_AUTH_MODE": "disabled",
    "RAY_raylet_start_wait_time_s": "120",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
    # A cluster that serves on this machine has the usual ones.
    "RAY_SERVE_HAPROXY_METRICS_PORT": "19101",
    "RAY_SERVE_HAPROXY_STATS_PORT": "18404",
    # What engines say of themselves moves the number of engines so often.
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
}


class Running:
    """The application on a cluster; the first host is the one to lose."""

    def __init__(self, url: str, cluster: Any, store: Path) -> None:
        self.url = url
        self.cluster = cluster
        self.store = store
        self.client = httpx.Client(base_url=url, timeout=60)

    def health(self) -> dict[str, Any]:
        """Return the whole picture."""
        try:
            picture = self.client.get("/health").json()
        except (httpx.HTTPError, ValueError):
            return {"status": "unavailable", "engines": []}
        assert isinstance(picture, dict)
        return picture

    def whole(self, engines: int) -> bool:
        """Say whether so many engines are there with every model."""
        picture = self.health()
        alive = [engine for engine in picture["engines"] if engine["alive"]]
        loaded = all(len(engine["models"]) == 2 for engine in alive)
        return picture["status"] == "ok" and len(alive) == engines and loaded

    def answer(self, texts: list[str], **fields: Any) -> dict[str, Any]:
        """Return the answer of a request that succeeds."""
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
        wait_until(lambda: application.whole(2 * HOSTS), "all engines", PATIENCE)
        yield application
        application.client.close()
        serve.shutdown()
    finally:
        ray.shutdown()
        cluster.shutdown()
