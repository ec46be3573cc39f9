"""Steady traffic of single texts and small batches, against a running server.

pip install -e '.[loadtest]'
locust -f loadtests/locustfile.py --headless -u 16 -r 4 -t 60s -H http://127.0.0.1:8000
"""

from __future__ import annotations

from typing import Any

from locust import FastHttpUser, constant, task
from texts import sentence


class Caller(FastHttpUser):
    wait_time = constant(0)

    @task(8)
    def single(self) -> None:
        self._classify("single", sentence())

    @task(1)
    def batch(self) -> None:
        self._classify("batch of 16", [sentence() for _ in range(16)])

    def _classify(self, name: str, given: Any) -> None:
        with self.client.post(
            "/classify", json={"input": given}, name=name, catch_response=True
        ) as response:
            if response.status_code == 200:
                wanted = len(given) if isinstance(given, list) else 1
                if len(response.json()["data"]) != wanted:
                    response.failure("answers are missing")
