"""A roll-out on a real server continues after a kill and is ended by the settings."""

from __future__ import annotations

import signal
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.processes import Server, server
from tests.support.serving import ADMIN, ADMIN_KEY
from tests.support.stores import TOPICS, sentences
from tests.support.waiting import wait_until

pytestmark = pytest.mark.timeout(300)

TEXT = sentences("animals")[0]
FRONTENDS = 2


def versions(running: Server, count: int = 60) -> Counter[str]:
    """Count the versions that answer, over new connections to both frontends."""
    seen: Counter[str] = Counter()
    for i in range(count):
        headers = {"X-Request-Id": f"request-{i}"}
        answer = httpx.post(f"{running.url}/classify", json={"input": TEXT}, headers=headers)
        seen[answer.raise_for_status().json()["model"]] += 1
    return seen


def rollout(running: Server, **body: Any) -> dict[str, Any]:
    """Begin or change a roll-out, or show it if there are no arguments."""
    url = f"{running.url}/models/{TOPICS}/rollout"
    answer = httpx.request("POST" if body else "GET", url, json=body, headers=ADMIN, timeout=60)
    return dict(answer.raise_for_status().json())


def test_a_roll_out_continues_after_a_kill_and_ends_by_settings(
    model_store: Path, tmp_path: Path
) -> None:
    file = tmp_path / "budgetformer.toml"
    first = f'admin_key = "{ADMIN_KEY}"\n[models.{TOPICS}]\nversion = 1\n'
    file.write_text(first)
    options = {
        "fronts": str(FRONTENDS),
        "config": str(file),
        "default_model": TOPICS,
        "state_dir": str(tmp_path / "state"),
    }
    with server(model_store, tmp_path, engines=1, **options) as running:
        wait_until(lambda: running.scrape().total("fronts") == FRONTENDS, "all frontends")
        assert rollout(running, version=2, weight=0.5)["state"] == "running"
        before = versions(running)
        assert set(before) == {"topics:1", "topics:2"}
        family = running.children
        running.process.kill()
        running.process.wait()
        for process in family:
            if process.is_running():
                process.kill()
    with server(model_store, tmp_path, engines=1, **options) as running:
        wait_until(lambda: running.scrape().total("fronts") == FRONTENDS, "all frontends")
        assert rollout(running)["state"] == "running"
        wait_until(lambda: versions(running) == before, "the share of the requests")
        file.write_text(first.replace("version = 1", "version = 2"))
        running.process.send_signal(signal.SIGHUP)
        wait_until(lambda: versions(running) == {"topics:2": 60}, "the promotion")
        assert rollout(running)["state"] == "promoted"
