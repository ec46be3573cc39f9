"""The stack of docker-compose.yml: the service, monitoring, privileges, restarts and shutdown.

The files in COMPOSE_FILE (by default docker-compose.yml) are started under a project name and ports
of this run, so a stack that already runs is not affected.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.dashboards import BOARDS, queries, read_board

pytestmark = pytest.mark.compose

T = TypeVar("T")

log = logging.getLogger("stack")
logging.getLogger("httpx").setLevel(logging.WARNING)

ROOT = Path(__file__).parents[3]
TEXTS = [
    "The striker scored twice in the final.",
    "Shares of the chip maker fell after a weak forecast.",
    "Astronomers measured the spin of a distant black hole.",
    "Ministers from both countries met to discuss the border.",
    "",
]


ADMIN_KEY = "a key for this test"
PORTS = (
    "BUDGETFORMER_PORT", "PROMETHEUS_PORT", "GRAFANA_PORT", "ALERTMANAGER_PORT", "JAEGER_PORT",
)  # fmt: skip


@dataclass(frozen=True)
class Stack:
    """A running stack, with clients of its services and its Compose commands."""

    environment: dict[str, str]
    service: httpx.Client
    prometheus: httpx.Client

    def compose(self, *arguments: str, check: bool = True) -> str:
        """Run a command of Docker Compose, and return its output."""
        return run("docker", "compose", *arguments, environment=self.environment, check=check)

    def inspect(self, name: str) -> dict[str, Any]:
        """Return Docker's description of the only container of a service."""
        container = self.compose("ps", "--all", "--quiet", name).strip()
        output = run("docker", "inspect", container, environment=self.environment)
        (description,) = json.loads(output)
        return dict(description)

    def client(self, port: str) -> httpx.Client:
        """Return a client for the service whose port is in the variable `port`."""
        return httpx.Client(base_url=f"http://127.0.0.1:{self.environment[port]}", timeout=30)

    def need_image(self, name: str) -> None:
        """Skip the test if the image of a service is not on this machine."""
        config = json.loads(self.compose("--profile", "*", "config", "--format", "json"))
        image = config["services"][name]["image"]
        if not run("docker", "images", "--quiet", image, environment=self.environment).strip():
            pytest.skip(f"needs the image {image}, which is not on this machine")

    def metrics(self) -> dict[str, float]:
        """Return every metric of /metrics, summed over its labels."""
        totals: dict[str, float] = {}
        answer = self.service.get("/metrics").raise_for_status()
        for family in text_string_to_metric_families(answer.text):
            for sample in family.samples:
                totals[sample.name] = totals.get(sample.name, 0) + sample.value
        return totals

    def query(self, expression: str) -> float | None:
        """Return the value of an expression for one number, or None without a result."""
        answer = self.prometheus.get("/api/v1/query", params={"query": expression})
        result = answer.raise_for_status().json()["data"]["result"]
        return float(result[0]["value"][1]) if result else None

    def classify(self, **body: object) -> dict[str, Any]:
        """Classify texts through the published port."""
        answer = self.service.post("/classify", json=body)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())


def run(*command: str, environment: dict[str, str], check: bool = True) -> str:
    finished = subprocess.run(
        command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if check and finished.returncode:
        pytest.fail(f"{' '.join(command)}: {finished.stdout[-2000:]}{finished.stderr[-4000:]}")
    return finished.stdout


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def eventually(read: Callable[[], T], expected: Callable[[T], bool], seconds: float = 60) -> T:
    """Read a value every half second until it is as expected; return the last value."""
    end = time.monotonic() + seconds
    while not expected(value := read()) and time.monotonic() < end:
        time.sleep(0.5)
    return value


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    key = tmp_path_factory.mktemp("secrets", numbered=True) / "admin_key"
    key.write_text(f"{ADMIN_KEY}\n")
    environment = os.environ | {port: str(free_port()) for port in PORTS}
    environment |= {"COMPOSE_PROJECT_NAME": f"budgetformer-test-{os.getpid()}"}
    environment |= {"LOADTEST_TIME": "15s", "BUDGETFORMER_ADMIN_KEY_FILE": str(key)}
    with (
        httpx.Client(
            base_url=f"http://127.0.0.1:{environment['BUDGETFORMER_PORT']}", timeout=30
        ) as service,
        httpx.Client(
            base_url=f"http://127.0.0.1:{environment['PROMETHEUS_PORT']}", timeout=30
        ) as prometheus,
    ):
        stack = Stack(environment, service, prometheus)
        try:
            stack.compose("build")
            started = stack.compose(
                "up", "--detach", "--wait", "--wait-timeout", "240", check=False
            )
            states = stack.compose("ps", "--all", "--format", "{{.Service}} {{.Status}}")
            if not states or "unhealthy" in states or "Exited" in states:
                logs = stack.compose("logs", "--no-color", "--tail", "50")
                pytest.fail(f"the stack did not come up: {started}\n{states}\n{logs}")
            yield stack
        finally:
            stack.compose("--profile", "*", "down", "--volumes", "--remove-orphans", check=False)


def test_the_published_port_answers(stack: Stack) -> None:
    answer = stack.classify(input=TEXTS[:1])
    (item,) = answer["data"]
    assert answer["object"] == "list"
    assert item["index"] == 0
    assert item["label"] == "Sports"
    assert item["score"] == pytest.approx(max(item["probs"]))
    assert sum(item["probs"]) == pytest.approx(1, abs=1e-3)
    assert len(item["probs"]) == item["num_classes"]
    assert 0 <= item["heads"]["used"] <= item["heads"]["total"]
    assert 0 < item["macs"] <= item["dense_macs"]
    assert answer["usage"]["heads_used"] == item["heads"]["used"]


def test_the_image_has_the_playground(stack: Stack) -> None:
    for path in ("/", "/playground/main.js", "/playground/style.css", "/playground/recent"):
        assert stack.service.get(path).status_code == 200, path


def test_metrics_add_up_to_the_answers(stack: Stack) -> None:
    before = stack.metrics()
    answers = [stack.classify(input=TEXTS), stack.classify(input=TEXTS[:2], quality="best")]
    after = stack.metrics()

    def grown(name: str) -> float:
        return after[f"budgetformer_{name}"] - before[f"budgetformer_{name}"]

    items = [item for answer in answers for item in answer["data"]]
    assert grown("items_total") == len(items) == len(TEXTS) + 2
    assert grown("requests_total") >= len(answers)
    assert grown("heads_used_total") == sum(item["heads"]["used"] for item in items)
    assert grown("heads_total") == sum(item["heads"]["total"] for item in items)
    assert grown("macs_total") == pytest.approx(sum(item["macs"] for item in items), rel=1e-6)
    assert grown("dense_macs_total") == pytest.approx(sum(item["dense_macs"] for item in items))
    assert grown("item_tokens_sum") == sum(item["tokens"] for item in items)


def test_prometheus_scrapes_the_metrics(stack: Stack) -> None:
    stack.classify(input=TEXTS)
    answered = stack.metrics()["budgetformer_items_total"]
    scraped = eventually(
        lambda: stack.query("sum(budgetformer_items_total)"), lambda value: value == answered
    )
    assert scraped == answered
    assert stack.query('up{job="budgetformer"}') == 1
    assert stack.query("sum(budgetformer_engine_restarts_total)") == 0


def test_prometheus_loads_and_evaluates_the_rules(stack: Stack) -> None:
    def rules() -> list[dict[str, Any]]:
        groups = stack.prometheus.get("/api/v1/rules").raise_for_status().json()["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]

    seen = eventually(rules, lambda found: all(rule["health"] == "ok" for rule in found))
    assert {rule["name"] for rule in seen} >= {
        "BudgetFormerDown",
        "budgetformer:macs_saved:ratio5m",
    }
    assert [rule["name"] for rule in seen if rule["health"] != "ok"] == []
    assert [rule["name"] for rule in seen if rule.get("state") == "firing"] == []
    stack.compose(
        *(
            "exec",
            "-T",
            "prometheus",
            "promtool",
            "check",
            "config",
            "/etc/prometheus/prometheus.yml",
        )
    )


def test_the_load_profile_sends_requests_that_prometheus_counts(stack: Stack) -> None:
    before = stack.metrics()
    stack.compose("--profile", "load", "build", "loadtest")
    printed = stack.compose("--profile", "load", "run", "--rm", "--no-TTY", "loadtest")
    after = stack.metrics()
    texts = after["budgetformer_items_total"] - before["budgetformer_items_total"]
    assert texts > 0, printed
    scraped = eventually(
        lambda: stack.query("sum(budgetformer_items_total)"),
        lambda value: value == after["budgetformer_items_total"],
    )
    assert scraped == after["budgetformer_items_total"]
    rate = stack.query('sum(rate(budgetformer_requests_total{route="/classify",outcome="ok"}[1m]))')
    saved = stack.query(
        "1 - sum(increase(budgetformer_macs_total[1m]))"
        " / sum(increase(budgetformer_dense_macs_total[1m]))"
    )
    assert rate is not None
    assert rate > 0
    assert saved is not None
    assert 0 < saved < 1
    failed = 'sum(budgetformer_requests_total{route="/classify",outcome="error"})'
    assert stack.query(failed) == 0
    log.info(
        "%.0f texts, %.1f requests a second, %.1f %% of the work saved", texts, rate, 100 * saved
    )


def test_every_dashboard_panel_has_data(stack: Stack) -> None:
    for quality in ("fast", "balanced", "best"):
        stack.classify(input=TEXTS, quality=quality)
    asked = {query: query.filled("1m", "30m") for query in queries()}

    def unanswered() -> list[str]:
        return [str(query) for query, text in asked.items() if stack.query(text) is None]

    assert eventually(unanswered, lambda names: not names, 90) == []
    for query, text in asked.items():
        log.info("%s: %s", query, stack.query(text))


def test_alertmanager_is_found_and_routes_by_severity(stack: Stack) -> None:
    stack.need_image("alertmanager")
    stack.compose("--profile", "alerts", "up", "--detach", "--wait", "--no-build", "alertmanager")

    def known() -> list[str]:
        answer = stack.prometheus.get("/api/v1/alertmanagers").raise_for_status()
        return [found["url"] for found in answer.json()["data"]["activeAlertmanagers"]]

    # Prometheus resolves names every half minute.
    assert len(eventually(known, bool, 90)) == 1
    severities = {"page": "critical", "ticket": "warning"}
    with stack.client("ALERTMANAGER_PORT") as alertmanager:
        labels = [
            {"alertname": f"Test{name}", "job": "test", "severity": severity}
            for name, severity in severities.items()
        ]
        posted = alertmanager.post("/api/v2/alerts", json=[{"labels": one} for one in labels])
        assert posted.status_code == 200, posted.text
        heard = alertmanager.get("/api/v2/alerts", params={"filter": 'job="test"'}).json()
    routed = {alert["receivers"][0]["name"]: alert["labels"]["severity"] for alert in heard}
    assert routed == severities


def test_jaeger_receives_traces(stack: Stack) -> None:
    stack.need_image("jaeger")
    traced = Stack(
        stack.environment | {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://jaeger:4318"},
        stack.service,
        stack.prometheus,
    )
    traced.compose("--profile", "traces", "up", "--detach", "--wait", "--no-build")
    traced.classify(input=TEXTS)
    with stack.client("JAEGER_PORT") as jaeger:
        names = eventually(
            lambda: jaeger.get("/api/services").raise_for_status().json()["data"] or [], bool
        )
    assert "budgetformer" in names


def test_grafana_has_the_dashboards(stack: Stack) -> None:
    if "grafana" not in stack.compose("ps", "--services").split():
        pytest.skip("this stack has no Grafana")
    with stack.client("GRAFANA_PORT") as grafana:
        for name in BOARDS:
            answer = grafana.get(f"/api/dashboards/uid/budgetformer-{name}").raise_for_status()
            assert answer.json()["dashboard"]["title"] == read_board(name)["title"]


def test_the_container_has_few_privileges_and_limits(stack: Stack) -> None:
    inside = ("exec", "-T", "service")
    assert stack.compose(*inside, "id", "-u").strip() == "10001"
    written = stack.compose(
        *inside, "sh", "-c", "touch /opt/venv/x /models/x 2>&1; echo", check=False
    )
    assert written.count("Read-only file system") == 2
    found = stack.inspect("service")
    limits = found["HostConfig"]
    assert limits["CapDrop"] == ["ALL"]
    assert limits["Privileged"] is False
    assert limits["ReadonlyRootfs"] is True
    assert limits["SecurityOpt"] == ["no-new-privileges:true"]
    assert limits["Memory"] == 4 * 2**30
    assert limits["PidsLimit"] == 512
    assert found["State"]["Health"]["Status"] == "healthy"
    for published in found["NetworkSettings"]["Ports"].values():
        assert {place["HostIp"] for place in published or []} <= {"127.0.0.1"}


def test_the_admin_key_is_read_from_its_file(stack: Stack) -> None:
    environment = stack.inspect("service")["Config"]["Env"]
    assert [entry for entry in environment if ADMIN_KEY in entry] == []
    for key, status in (("wrong", 401), (ADMIN_KEY, 404)):
        headers = {"authorization": f"Bearer {key}"}
        answer = stack.service.post("/models/nothing/load", headers=headers)
        assert answer.status_code == status, answer.text


def test_the_gpu_override_requests_all_gpus(stack: Stack) -> None:
    files = ("-f", "docker-compose.yml", "-f", "docker/compose.gpu.yml")
    service = json.loads(stack.compose(*files, "config", "--format", "json"))["services"]["service"]
    assert service["build"]["target"] == "cuda"
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    assert device["count"] == -1  # all
    assert service["read_only"] is True
    # Compiled kernels must be loadable, which /tmp does not allow.
    (kept,) = (v for v in service["volumes"] if v["target"] == "/kernels")
    assert (kept["type"], service["environment"]["TRITON_CACHE_DIR"]) == ("volume", "/kernels")


def test_the_container_has_no_setuid_files_and_few_writable_folders(stack: Stack) -> None:
    """Checked as the user of the service, which has no capabilities."""
    inside = ("exec", "-T", "service", "python", "-c")
    look = (
        "import json, os, stat\n"
        "rights, writable = [], []\n"
        "for top, folders, files in os.walk('/'):\n"
        "    folders[:] = [f for f in folders if os.path.join(top, f) not in ('/proc', '/sys')]\n"
        "    for path in [top, *(os.path.join(top, f) for f in files)]:\n"
        "        try: mode = os.lstat(path).st_mode\n"
        "        except OSError: continue\n"
        "        if stat.S_ISREG(mode) and mode & 0o6000: rights.append(path)\n"
        "        plain = stat.S_ISREG(mode) or stat.S_ISDIR(mode)\n"
        "        if plain and os.access(path, os.W_OK): writable.append(path)\n"
        "status = dict(l.split(':', 1) for l in open('/proc/self/status'))\n"
        "print(json.dumps([rights, writable, status['CapEff'].strip(), status['CapBnd'].strip(),"
        " status['NoNewPrivs'].strip(), os.getuid(), os.getgid()]))\n"
    )
    seen = json.loads(stack.compose(*inside, look))
    rights, writable, effective, bounding, no_new, user, group = seen
    assert rights == []
    assert [path for path in writable if not path.startswith(("/tmp", "/dev", "/state"))] == []
    assert (int(effective, 16), int(bounding, 16), no_new) == (0, 0, "1")
    assert user == group == 10001


def test_engines_share_one_copy_of_the_weights(stack: Stack) -> None:
    listed = "for p in /proc/[0-9]*; do grep -H memfd: $p/maps 2>/dev/null; done; true"
    shown = stack.compose("exec", "-T", "service", "sh", "-c", listed)
    holders: dict[str, set[str]] = {}
    for line in shown.splitlines():
        process, _, mapping = line.partition(":")
        if "memfd:key-usage" not in mapping:  # the file in which frontends count usage of keys
            holders.setdefault(mapping.split()[4], set()).add(process)
    engines = len(stack.service.get("/health").json()["engines"])
    assert bool(holders) == (engines > 1)
    assert all(len(found) == engines for found in holders.values())


def test_no_secret_is_in_the_environment_or_arguments(stack: Stack) -> None:
    inside = ("exec", "-T", "service", "sh", "-c")
    seen = stack.compose(*inside, "cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline | tr '\\0' '\\n'")
    assert "BUDGETFORMER_ADMIN_KEY=" not in seen
    assert "bf_" not in seen
    refused = stack.service.post("/models/ag_news/load")
    assert refused.status_code == 401


def test_a_killed_container_is_restarted_and_prometheus_notices(stack: Stack) -> None:
    started = 'changes(budgetformer_process_start_time_seconds{job="budgetformer"}[10m])'
    process = int(stack.inspect("service")["State"]["Pid"])
    try:
        os.kill(process, signal.SIGKILL)  # like a crash; `docker kill` would prevent the restart
    except PermissionError:
        pytest.skip("may not kill a container's process from here")
    assert eventually(lambda: stack.inspect("service")["RestartCount"], bool) == 1
    assert eventually(lambda: _is_ready(stack), bool, 120)
    assert stack.classify(input=TEXTS)["data"][0]["label"] == "Sports"
    assert eventually(lambda: stack.query(started), lambda seen: bool(seen)) == 1


def _is_ready(stack: Stack) -> bool:
    try:
        return stack.service.get("/health/ready").status_code == 200
    except httpx.TransportError:
        return False


def _in_flight(stack: Stack) -> int:
    engines = stack.service.get("/health").json()["engines"]
    return sum(int(engine["in_flight_items"]) for engine in engines)


def test_running_requests_are_answered_before_a_stop(stack: Stack) -> None:
    texts = TEXTS[:4] * 128
    body = {"input": texts, "heads": 12, "timeout_ms": 60_000}
    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(stack.service.post, "/classify", json=body, timeout=90)
        eventually(lambda: sent.done() or _in_flight(stack) > 0, bool)
        stack.compose("stop", "service")
        answer = sent.result()
    assert answer.status_code == 200
    assert len(answer.json()["data"]) == len(texts)
    stack.compose("up", "--detach", "--wait", "--wait-timeout", "120", "--no-build", "service")


def test_the_service_stops_cleanly_and_starts_again(stack: Stack) -> None:
    stack.compose("stop", "service")
    state = stack.inspect("service")["State"]
    assert state["ExitCode"] == 0, stack.compose("logs", "--no-color", "--tail", "30", "service")
    assert not state["OOMKilled"]
    stack.compose("up", "--detach", "--wait", "--wait-timeout", "120", "--no-build", "service")
    assert stack.classify(input=TEXTS)["data"][0]["label"] == "Sports"
