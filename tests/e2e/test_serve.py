"""`budgetformer serve`: metrics, health, killed and hung processes, shutdown, failed starts."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from transformers import pipeline

from budgetformer.cost.table import CostTable, StepCost
from tests.support.classifiers import save_classifier
from tests.support.command_line import CommandLine
from tests.support.processes import COMMAND, Server, clean_environment, server
from tests.support.stores import (
    LABELS,
    labelled_sentences,
    sentences,
    single_label_rows,
    write_jsonl,
)
from tests.support.waiting import wait_until

pytestmark = pytest.mark.timeout(300)

ROWS = labelled_sentences()
TEXT = sentences("animals")[0]


@pytest.fixture(scope="module")
def running(model_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Return a server with two engines."""
    folder = tmp_path_factory.mktemp("served")
    with server(
        model_store, folder, engines=2, default_model="topics", log_level="debug"
    ) as running:
        yield running


async def send_all(url: str, bodies: list[dict[str, Any]], at_once: int) -> list[httpx.Response]:
    limits = httpx.Limits(max_connections=at_once)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=120) as client:
        return await asyncio.gather(*(client.post("/classify", json=body) for body in bodies))


def test_metrics_add_up_to_concurrent_answers(running: Server) -> None:
    before = running.scrape()
    qualities = ["fast", "balanced", "best", 1.5]
    bodies = [
        {"input": [text for text, _ in ROWS[start : start + 9]], "quality": quality}
        for quality in qualities
        for start in range(0, len(ROWS), 9)
    ]
    responses = asyncio.run(send_all(running.url, bodies, at_once=12))
    assert {response.status_code for response in responses} == {200}
    items = [item for response in responses for item in response.json()["data"]]
    assert len(items) == len(qualities) * len(ROWS)

    best = [
        item
        for body, response in zip(bodies, responses, strict=True)
        if body["quality"] == "best"
        for item in response.json()["data"]
    ]
    right = sum(item["label"] == label for item, (_, label) in zip(best, ROWS, strict=True))
    assert right > 0.9 * len(ROWS)

    after = running.scrape()
    where = {"model": "topics", "version": 2}
    budgets = {item["heads"]["budget"] for item in items}
    assert budgets == {0, 1, 2, 3, 4}
    for budget in budgets:
        answered = sum(item["heads"]["budget"] == budget for item in items)
        assert after.minus(before, "items_total", budget=budget, **where) == answered
    for name, value in {
        "heads_used_total": sum(item["heads"]["used"] for item in items),
        "heads_total": sum(item["heads"]["total"] for item in items),
        "macs_total": sum(item["macs"] for item in items),
        "dense_macs_total": sum(item["dense_macs"] for item in items),
        "item_tokens_sum": sum(item["tokens"] for item in items),
    }.items():
        assert after.minus(before, name, **where) == value, name
    grown = after.minus(before, "requests_total", route="/classify", outcome="ok")
    assert grown == len(bodies)


def test_each_engine_is_a_process(running: Server) -> None:
    engines = running.engines()
    assert set(engines) == {0, 1}
    assert set(engines.values()) <= {child.pid for child in running.children}
    assert running.process.pid not in engines.values()


def test_readiness_is_logged_once(running: Server) -> None:
    def ready_lines() -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in running.log.read_text().splitlines()]
        return [line for line in lines if line["event"] == "ready"]

    wait_until(lambda: bool(ready_lines()), "the line")
    (ready,) = ready_lines()
    assert ready["level"] == "info"
    assert ready["url"] == running.address
    assert ready["models"] == httpx.get(f"{running.url}/health").json()["models"]
    assert (ready["frontends"], ready["engines"], ready["device"]) == (1, 2, "cpu")
    assert 0 < ready["seconds"] < 90


def test_health_shows_every_task_of_the_supervisor(running: Server) -> None:
    def components() -> dict[str, Any]:
        found = httpx.get(f"{running.url}/health").json()["components"]
        assert isinstance(found, dict)
        return found

    wait_until(lambda: components()["frontends"]["connected"] == 1, "the report of the frontend")
    shown = components()
    assert {name: one["status"] for name, one in shown.items()} == dict.fromkeys(
        ("hub", "supervisor", "engines", "frontends"), "ok"
    )
    own = {
        "hub", "hub-beat", "hub-recent", "hub-rollouts", "readiness", "silence", "job folder",
        "job process",
    }  # fmt: skip
    children = {"engine-0", "engine-1", "frontend-0"}
    assert shown["supervisor"]["tasks"] == dict.fromkeys(own | children, "ok")


def test_invalid_requests_get_errors(running: Server) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"[" * 100_000

    for response, status in (
        (httpx.post(f"{running.url}/classify", content=chunks()), 400),
        (httpx.post(f"{running.url}/classify", content=b"[" * 100_000), 400),
        (httpx.post(f"{running.url}/classify", json={"input": []}), 422),
        (httpx.get(f"{running.url}/nowhere"), 404),
    ):
        assert response.status_code == status
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_a_body_of_64_megabytes_is_refused(running: Server) -> None:
    host, port = running.url.removeprefix("http://").split(":")
    head = f"POST /classify HTTP/1.1\r\nHost: {host}\r\nContent-Length: {64 * 2**20}\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(head.encode() + b" " * 1000)
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


def test_evaluate_with_a_url_uses_the_server(
    running: Server, model_store: Path, tmp_path: Path, command: CommandLine
) -> None:
    data = write_jsonl(tmp_path / "test.jsonl", single_label_rows()[:30])
    arguments = ["evaluate", "--data", data, "--model", "topics", "--model-store", model_store]
    local = json.loads(command(*arguments, "--json").out)
    served = json.loads(command(*arguments, "--json", "--url", running.url).out)
    assert [row["quality"] for row in local] == ["fast", "balanced", "best", "full budget"]
    for expected, actual in zip(local, served, strict=True):
        assert actual["budgets"] == expected["budgets"]
        assert actual["accuracy"] == expected["accuracy"]
        assert actual["mean_macs"] == pytest.approx(expected["mean_macs"])


def test_requests_of_a_killed_engine_are_answered_or_refused(running: Server) -> None:
    before = running.scrape()
    victim = running.engines()[0]
    bodies = [{"input": [text for text, _ in ROWS], "heads": 4} for _ in range(40)]
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(lambda: asyncio.run(send_all(running.url, bodies, at_once=8)))
        wait_until(lambda: running.in_flight() > 0 or sending.done(), "requests in flight")
        psutil.Process(victim).kill()
        responses = sending.result()
    assert len(responses) == len(bodies)
    assert {response.status_code for response in responses} <= {200, 503}
    for response in responses:
        if response.status_code == 503:
            assert int(response.headers["retry-after"]) >= 1
            assert response.json()["error"]["type"] == "unavailable"
    running.wait_ready(engines=2)
    assert victim not in running.engines().values()
    assert running.scrape().minus(before, "engine_restarts_total") == 1
    assert httpx.post(f"{running.url}/classify", json={"input": TEXT}).status_code == 200


def test_without_engines_requests_wait_or_get_503(running: Server) -> None:
    for pid in running.engines().values():
        psutil.Process(pid).kill()
    wait_until(lambda: not running.ready(), "the loss of readiness")
    response = httpx.post(f"{running.url}/classify", json={"input": TEXT}, timeout=60)
    assert response.status_code in (200, 503)
    running.wait_ready(engines=2)
    assert httpx.post(f"{running.url}/classify", json={"input": TEXT}).status_code == 200


def test_all_engines_give_identical_answers_also_after_restarts(
    running: Server,
) -> None:
    bodies = [{"input": TEXT, "heads": heads} for heads in (0, 1, 4)]

    def answers() -> list[str]:
        with httpx.Client(base_url=running.url, timeout=60) as client:
            # The two engines answer in turn.
            responses = [client.post("/classify", json=body) for body in bodies for _ in range(2)]
        return [json.dumps(response.json()["data"]) for response in responses]

    before = answers()
    assert before[::2] == before[1::2]
    for pid in running.engines().values():
        psutil.Process(pid).kill()
    wait_until(lambda: not running.ready(), "the loss of readiness")
    running.wait_ready(engines=2)
    assert answers() == before


def test_a_hung_engine_is_replaced_and_its_requests_are_answered(
    model_store: Path, tmp_path: Path
) -> None:
    options = {"default_model": "topics", "hang_seconds": "8"}
    with server(model_store, tmp_path, engines=2, **options) as running:
        victim = running.engines()[0]
        psutil.Process(victim).suspend()
        bodies = [{"input": TEXT, "heads": 4, "timeout_ms": 60_000}] * 20
        responses = asyncio.run(send_all(running.url, bodies, at_once=20))
        assert [response.status_code for response in responses] == [200] * 20
        wait_until(
            lambda: running.engines().get(0) not in (victim, None), "another engine in its place"
        )
        running.wait_ready(engines=2)
        assert "process killed: not responding" in running.log.read_text()
        assert running.scrape().total("engine_restarts_total") == 1


def test_an_engine_that_cannot_start_ends_readiness_with_a_reason(
    model_store: Path, tmp_path: Path
) -> None:
    tables = tmp_path / "tables.json"
    tables.write_text(CostTable("topics:2", "cpu", "float32", (StepCost(1e-3, 0, 0),) * 5).dump())
    with server(model_store, tmp_path, engines=1, cost_tables=str(tables)) as running:
        tables.rename(tmp_path / "away")
        psutil.Process(running.engines()[0]).kill()

        def reason() -> str:
            loops = httpx.get(f"{running.url}/health", timeout=30).json()["crash_loops"]
            return str(loops)

        wait_until(
            lambda: "engine-0 does not stay up: it ended with exit code 1; 3 failed" in reason(),
            "the reason",
            60,
        )
        refused = httpx.get(f"{running.url}/health/ready", timeout=30)
        assert refused.status_code == 503
        assert "engine-0" in refused.json()["error"]["message"]
        (tmp_path / "away").rename(tables)
        running.wait_ready(engines=1)
        assert httpx.get(f"{running.url}/health", timeout=30).json()["crash_loops"] == []


def test_a_killed_frontend_is_replaced_while_another_answers(
    model_store: Path, tmp_path: Path
) -> None:
    options = {"default_model": "topics", "fronts": "2"}
    with server(model_store, tmp_path, engines=1, **options) as running:
        for _ in range(4):
            assert httpx.post(f"{running.url}/classify", json={"input": TEXT}).status_code == 200

        def fronts() -> dict[str, float]:
            return running.scrape().by("process", "process_start_time_seconds")

        wait_until(lambda: {"frontend-0", "frontend-1"} <= set(fronts()), "both fronts")
        before = fronts()
        victim = next(c for c in running.children if "service.frontend" in c.cmdline())
        victim.kill()

        def replaced() -> list[str]:
            return [name for name, start in fronts().items() if start != before.get(name, start)]

        wait_until(lambda: fronts().keys() >= before.keys() and replaced() != [], "both fronts")
        (name,) = replaced()
        assert name.startswith("frontend-")

        def counted() -> bool:
            shown = running.scrape()
            return shown.total("requests_total", route="/classify", outcome="ok") == 4

        wait_until(counted, "the counts of the killed frontend")


@pytest.fixture
def short() -> Iterator[Path]:
    """Return a folder with a path short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="bf-") as folder:
        yield Path(folder)


def test_engines_share_weights_and_remove_them_at_their_end(
    model_store: Path, tmp_path: Path, short: Path
) -> None:
    def links() -> list[str]:
        return [path.name for path in short.glob("*/*-float32") if path.is_symlink()]

    def mapped(pid: int) -> str:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
        (inode,) = {line.split()[4] for line in lines if "/memfd:" in line}
        return inode

    options = {"default_model": "topics", "models": "topics"}
    environment = {"TMPDIR": str(short)}
    with server(model_store, tmp_path, engines=2, environment=environment, **options) as running:
        assert len({mapped(pid) for pid in running.engines().values()}) == 1
        assert len(links()) == 1
        running.process.kill()
        running.process.wait()
        wait_until(lambda: not links(), "the end of the engines")


def test_engines_are_restarted_after_the_fork_server_was_killed(
    model_store: Path, tmp_path: Path
) -> None:
    with server(model_store, tmp_path, engines=2, default_model="topics") as running:
        before = running.engines()
        (victim,) = [child for child in running.children if child.name() == "fork-server"]
        victim.kill()
        wait_until(
            lambda: not set(running.engines().values()) & set(before.values()), "other engines"
        )
        running.wait_ready(engines=2)
        assert httpx.post(f"{running.url}/classify", json={"input": TEXT}).status_code == 200
        assert "process down" in running.log.read_text()


def test_texts_are_not_logged(running: Server) -> None:
    for body in (
        {"input": "xyzzy plugh"},
        {"input": ["xyzzy", 5]},
        {"input": "xyzzy", "topk": "xyzzy"},
        {"input": "xyzzy", "model": "nothing"},
    ):
        httpx.post(f"{running.url}/classify", json=body)
    httpx.post(f"{running.url}/classify", content=b'{"input": "xyzzy')
    log = running.log.read_text()
    assert '"route": "/classify"' in log
    assert "xyzzy" not in log


def test_every_log_line_is_json(running: Server) -> None:
    for line in running.log.read_text().splitlines():
        assert isinstance(json.loads(line), dict)


def test_running_requests_are_answered_before_a_stop(model_store: Path, tmp_path: Path) -> None:
    texts = [text for text, _ in ROWS] * 8
    body = {"input": texts, "heads": 4, "timeout_ms": 100_000}
    with server(model_store, tmp_path, engines=1, default_model="topics") as running:
        family = running.children
        with ThreadPoolExecutor(4) as pool:
            url = f"{running.url}/classify"
            futures = [pool.submit(httpx.post, url, json=body, timeout=120) for _ in range(4)]
            wait_until(lambda: _all_begun(running, futures, len(texts)), "requests in flight")
            code = running.terminate()
            responses = [future.result() for future in futures]
        assert code == 0
        assert [response.status_code for response in responses] == [200] * 4
        for response in responses:
            assert len(response.json()["data"]) == len(texts)
        assert not [child for child in family if child.is_running()]


def _all_begun(running: Server, futures: list[Future[httpx.Response]], items: int) -> bool:
    """Return whether every request is answered or in flight."""
    done = sum(future.done() for future in futures)
    return running.in_flight() >= (len(futures) - done) * items


def test_all_children_end_with_a_killed_supervisor(model_store: Path, tmp_path: Path) -> None:
    with server(model_store, tmp_path, engines=1, default_model="topics") as running:
        family = running.children
        assert len(family) >= 2
        running.process.kill()
        assert running.process.wait(30) == -signal.SIGKILL
        wait_until(lambda: not any(map(_alive, family)), "the end of all children")


def _alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def refused(*arguments: str, code: int = 2) -> str:
    """Run a server that cannot start, and return its only line of output."""
    done = subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=60,
        check=False, env=clean_environment(),
    )  # fmt: skip
    assert done.returncode == code
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return line


def test_a_port_in_use_is_one_line(model_store: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for flags in ([f"--port={port}"], ["--port=0", f"--metrics-port={port}", "--fronts=2"]):
            line = refused(*flags, f"--model-store={model_store}", code=2)
            assert f"127.0.0.1:{port}" in line


def test_a_too_long_path_for_sockets_is_one_line(
    model_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / ("long" * 20)
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    line = refused("--port=0", f"--model-store={model_store}", "--engines=1")
    assert str(folder) in line
    assert "TMPDIR" in line


def test_a_missing_store_is_one_line(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere"
    assert f"{missing}: no such folder" in refused("--port=0", f"--model-store={missing}", code=1)


def test_a_missing_default_model_is_one_line(model_store: Path) -> None:
    line = refused("--port=0", f"--model-store={model_store}", "--default-model=nothing", code=1)
    assert "nothing" in line


def test_the_card_has_the_labels_of_the_training_data(running: Server) -> None:
    response = httpx.get(f"{running.url}/models/topics")
    assert response.json()["labels"] == list(LABELS)


def test_a_transformers_classifier_can_be_served(tmp_path: Path) -> None:
    """It is added to the store once, and has the probabilities of the pipeline."""
    folder = save_classifier(tmp_path / "mine", "distilbert")
    store = tmp_path / "store"
    expected = pipeline("text-classification", model=str(folder), top_k=None)([TEXT])[0]
    with server(store, tmp_path, engines=1, model=str(folder)) as running:
        answer = httpx.post(
            f"{running.url}/classify", json={"input": TEXT, "quality": "fast"}
        ).json()
        (item,) = answer["data"]
        assert answer["model"] == "mine:1"
        scores = {label["label"]: label["score"] for label in item["labels"]}
        assert scores == pytest.approx({o["label"]: o["score"] for o in expected}, abs=1e-4)
        assert item["macs"] == item["dense_macs"]
        assert running.scrape().total("items_total", model="mine", version="1", budget="1") == 1
        assert httpx.get(f"{running.url}/models/mine").json()["chain"] == [1]
        assert httpx.get(running.url).status_code == 200
    with server(store, tmp_path, engines=1, model=str(folder)):
        assert [path.name for path in (store / "mine").iterdir()] == ["1"]


def test_an_unsupported_model_ends_the_start(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    done = subprocess.run(
        [*COMMAND, "--model", tmp_path / "adapter", "--model-store", tmp_path / "store"],
        capture_output=True, text=True, check=False, timeout=100, env=clean_environment(),
    )  # fmt: skip
    assert done.returncode == 1
    assert "merge it into its model first" in done.stderr
    assert "Traceback" not in done.stderr
