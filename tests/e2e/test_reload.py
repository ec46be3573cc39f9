"""Settings and certificates of a real server are reloaded under load."""

from __future__ import annotations

import json
import shutil
import signal
import ssl
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import pytest

from tests.support.certificates import make_certificate
from tests.support.processes import Server, free_port, server
from tests.support.serving import ADMIN, ADMIN_KEY
from tests.support.stores import TOPICS, sentences
from tests.support.waiting import wait_until

pytestmark = pytest.mark.timeout(300)

TEXT = sentences("animals")[0]
FRONTENDS = 2
FIRST = f'admin_key = "{ADMIN_KEY}"\nquality = "balanced"\naccess_log = 0\n'


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "budgetformer.toml"
    path.write_text(FIRST)
    return path


@pytest.fixture
def running(model_store: Path, tmp_path: Path, file: Path) -> Iterator[Server]:
    options = {"models": TOPICS, "fronts": str(FRONTENDS), "config": str(file)}
    with server(model_store, tmp_path, engines=1, **options) as running:
        wait_until(lambda: all_serve(running), "all frontends")
        yield running


def all_serve(running: Server) -> bool:
    return running.scrape().total("fronts") == FRONTENDS


def reload(running: Server) -> httpx.Response:
    return httpx.post(f"{running.url}/settings/reload", headers=ADMIN, timeout=30)


def lines(running: Server) -> list[dict[str, Any]]:
    return [json.loads(line) for line in running.log.read_text().splitlines()]


def qualities(running: Server) -> set[str]:
    """Return the levels at which requests without a quality are answered, over new connections."""
    answers = [
        httpx.post(f"{running.url}/classify", json={"input": TEXT}, timeout=30) for _ in range(12)
    ]
    return {answer.headers["x-quality"] for answer in answers}


@contextmanager
def load(running: Server) -> Iterator[Callable[[], Counter[int]]]:
    """Send requests until the block ends; yield a function that counts the answers by status."""
    statuses: Counter[int] = Counter()
    stop = Event()

    def ask() -> None:
        with httpx.Client(base_url=running.url, timeout=30) as client:
            while not stop.is_set():
                statuses[
                    client.post("/classify", json={"input": TEXT, "heads": 2}).status_code
                ] += 1

    with ThreadPoolExecutor(4) as pool:
        callers = [pool.submit(ask) for _ in range(4)]
        try:
            yield lambda: statuses
        finally:
            stop.set()
        for caller in callers:
            caller.result()


def test_settings_change_under_load_without_a_failed_request(running: Server, file: Path) -> None:
    with load(running) as statuses:
        wait_until(lambda: statuses().total() > 50, "answers")
        assert qualities(running) == {"balanced"}
        assert not [line for line in lines(running) if line["event"] == "request"]
        file.write_text(FIRST.replace("balanced", "fast") + 'log_level = "debug"\n')
        assert reload(running).json() == {
            "changed": ["quality", "log_level"], "needs_restart": [], "waiting_for": [],
        }  # fmt: skip
        assert qualities(running) == {"fast"}
        before = statuses().total()
        wait_until(lambda: statuses().total() > before + 50, "answers")
    assert set(statuses()) == {200}
    written = {line["process"] for line in lines(running) if line["event"] == "request"}
    assert written <= {"frontend-0", "frontend-1"}
    assert written


def test_a_restarted_frontend_has_the_new_settings(running: Server, file: Path) -> None:
    file.write_text(FIRST.replace("balanced", "fast"))
    running.process.send_signal(signal.SIGHUP)
    wait_until(lambda: qualities(running) == {"fast"}, "the change")
    for victim in [one for one in running.children if "service.frontend" in one.cmdline()]:
        victim.kill()
        victim.wait()
    wait_until(lambda: running.ready() and all_serve(running), "other frontends")
    assert qualities(running) == {"fast"}


def test_a_table_of_the_file_changes_one_model(running: Server, file: Path) -> None:
    file.write_text(f'{FIRST}[models.{TOPICS}]\nquality = "best"\n[models.absent]\n')
    assert reload(running).json()["changed"] == ["model_settings"]
    assert qualities(running) == {"best"}
    (line,) = [one for one in lines(running) if one.get("models") == ["absent"]]
    assert line["level"] == "warning"


def test_invalid_settings_change_nothing_and_fixed_ones_are_named(
    running: Server, file: Path
) -> None:
    for wrong in ('quality = "fst"', "quallity = 1", "quality = ", "access_log = 2"):
        file.write_text(FIRST.replace('quality = "balanced"', wrong))
        refused = reload(running)
        assert refused.status_code == 422
        assert refused.json()["error"]["code"] == "invalid_settings"
        assert "\n" not in refused.json()["error"]["message"]
        assert qualities(running) == {"balanced"}
    file.write_text(FIRST.replace("balanced", "fast") + "max_queue_items = 7\n")
    assert reload(running).json() == {
        "changed": ["quality"], "needs_restart": ["max_queue_items"], "waiting_for": [],
    }  # fmt: skip
    assert qualities(running) == {"fast"}
    last = [line for line in lines(running) if line["event"] == "settings reloaded"][-1]
    assert (last["level"], last["needs_restart"]) == ("warning", ["max_queue_items"])
    assert ADMIN_KEY not in running.log.read_text()


def test_new_connections_get_new_certificates(model_store: Path, tmp_path: Path) -> None:
    first, second, used = (tmp_path / name for name in ("first", "second", "used"))
    make_certificate(first)
    make_certificate(second)
    shutil.copytree(first, used)
    port = free_port()
    options = {
        "models": TOPICS, "admin_key": ADMIN_KEY, "metrics_port": str(port),
        "tls_cert": str(used / "chain.pem"), "tls_key": str(used / "key.pem"),
    }  # fmt: skip
    probes = f"http://127.0.0.1:{port}"
    with server(model_store, tmp_path, engines=1, probes=probes, **options) as running:
        address = running.address.replace("http:", "https:")

        def shown() -> list[str]:
            return [one["url"] for one in lines(running) if one["event"] in ("starting", "ready")]

        wait_until(lambda: shown() == [address] * 2, "the address in the log")

        def client(folder: Path) -> httpx.Client:
            trusted = ssl.create_default_context(cafile=folder / "chain.pem")
            return httpx.Client(base_url=address, verify=trusted, timeout=30, headers=ADMIN)

        with client(first) as before:
            assert before.get("/health/live").status_code == 200
            shutil.copytree(second, used, dirs_exist_ok=True)
            (used / "key.pem").write_text("no key")
            assert before.post("/settings/reload").status_code == 422
            shutil.copytree(second, used, dirs_exist_ok=True)
            assert before.post("/settings/reload").json()["waiting_for"] == []
            assert before.get("/health/live").status_code == 200, "open connections stay"
            with client(second) as after:
                assert after.get("/health/live").status_code == 200
            with client(first) as late, pytest.raises(httpx.ConnectError):
                late.get("/health/live")
