"""Serve the dense network with BentoML and its adaptive batching.

NETWORK=build/baselines/networks/ag_news-3 THREADS=1 \\
    bentoml serve bentoml_app:Classifier --port 8001
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import bentoml
from network import Network

BATCH = int(os.environ.get("BATCH", "8"))


@bentoml.service(workers=1, traffic={"timeout": 60}, logging={"access": {"enabled": False}})
class Classifier:
    def __init__(self) -> None:
        self.network = Network(Path(os.environ["NETWORK"]), int(os.environ["THREADS"]))

    @bentoml.api(route="/classify", batchable=True, max_batch_size=BATCH, max_latency_ms=60_000)
    def classify(self, texts: list[str]) -> list[dict[str, Any]]:
        return self.network(texts)
