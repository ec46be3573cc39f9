"""Serve the dense network with Ray Serve and its batching.

python loadtests/baselines/ray_app.py --port 8001 --network build/baselines/networks/ag_news-3
"""
# ruff: noqa: E402 - Ray reads its environment variables when it is imported

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path
from typing import Any

# Ray's threads inherit the blocked signal; `sigwait` at the end receives it.
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
# By default, Ray gives its workers a low priority; here they are the server.
os.environ |= {
    "RAY_worker_niceness": "0",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
}

import ray
from network import Network, arguments
from ray import serve
from starlette.requests import Request

parser = arguments(__doc__)
parser.add_argument("--wait", type=float, default=0.01, help="seconds to fill a batch")
given = parser.parse_args()


@serve.deployment(max_ongoing_requests=128, ray_actor_options={"num_cpus": 1})
class Classifier:
    def __init__(self, network: str, threads: int) -> None:
        self.network = Network(Path(network), threads)

    @serve.batch(max_batch_size=given.batch, batch_wait_timeout_s=given.wait)
    async def classify(self, texts: list[str]) -> list[dict[str, Any]]:
        return self.network(texts)

    async def __call__(self, request: Request) -> dict[str, Any]:
        if request.method == "GET":  # the readiness check
            return {}
        return await self.classify((await request.json())["input"])


logging.getLogger("ray.serve").setLevel(logging.ERROR)
ray.init("local", include_dashboard=False, num_cpus=4, log_to_driver=False, logging_level="error")
serve.start(http_options={"host": "127.0.0.1", "port": given.port})
folder = str(given.network.absolute())
application = Classifier.bind(folder, given.threads)  # type: ignore[attr-defined]
serve.run(application, route_prefix="/classify")
signal.sigwait({signal.SIGTERM})
os._exit(0)  # a graceful shutdown takes half a minute; the parent process kills the other processes
