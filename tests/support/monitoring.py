"""A real Prometheus that scrapes a server under test."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from tests.support.processes import free_port
from tests.support.programs import program
from tests.support.waiting import wait_until

RULES = Path(__file__).parents[2] / "docker" / "prometheus" / "rules"


@dataclass(frozen=True)
class Prometheus:
    """A running Prometheus."""

    url: str

    def api(self, path: str, **parameters: str) -> Any:
        """Ask its API, and return the data of the answer."""
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=30)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    def values(self, expression: str) -> list[float]:
        """Return the values of an instant query."""
        return [
            float(series["value"][1]) for series in self.api("query", query=expression)["result"]
        ]

    def ready(self) -> bool:
        """Ask whether it has scraped its target."""
        try:
            started = httpx.get(f"{self.url}/-/ready", timeout=30).status_code == 200
        except httpx.TransportError:
            return False
        return started and self.values('up{job="budgetformer"}') == [1.0]


@contextmanager
def prometheus(target: str, folder: Path) -> Iterator[Prometheus]:
    """Run Prometheus with the project's rules against a server's address."""
    targets = [{"targets": [urlsplit(target).netloc]}]
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [f"{RULES}/*.yml"],
        "scrape_configs": [{"job_name": "budgetformer", "static_configs": targets}],
    }
    file = folder / "prometheus.yml"
    file.write_text(json.dumps(config))  # JSON is YAML
    port = free_port()
    command = [
        program("prometheus"),
        f"--config.file={file}",
        f"--storage.tsdb.path={folder / 'prometheus'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--enable-feature=exemplar-storage",
        "--log.level=warn",
    ]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    running = Prometheus(f"http://127.0.0.1:{port}")
    try:
        wait_until(running.ready, "the first scrape")
        yield running
    finally:
        process.terminate()
        process.wait(30)
