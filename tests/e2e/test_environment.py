"""The server in a hostile folder and environment, and behind a proxy with a path prefix."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, expect, sync_playwright

from budgetformer.client import Client
from budgetformer.subprocesses import python_command
from tests.support.prefixing import prefixing
from tests.support.processes import COMMAND, Server, clean_environment, server
from tests.support.programs import program
from tests.support.stores import TOPICS, sentences

pytestmark = pytest.mark.timeout(300)

PREFIX = "/text/classifier"
TEXT = sentences("music")[3]
NOT_UTF_8 = os.fsdecode(b"t\xff")
NOWHERE = "http://127.0.0.1:9"
DECOYS = (
    "service", "budgetformer", "json", "asyncio", "uvloop", "torch", "numpy", "tokenizers",
    "structlog", "pydantic", "logging", "sitecustomize", "usercustomize",
)  # fmt: skip
KUBERNETES = {
    "BUDGETFORMER_SERVICE_HOST": "10.0.0.1",
    "BUDGETFORMER_SERVICE_PORT": "8000",
    "BUDGETFORMER_SERVICE_PORT_HTTP": "8000",
    "BUDGETFORMER_PORT": "tcp://10.0.0.1:8000",
    "BUDGETFORMER_PORT_8000_TCP": "tcp://10.0.0.1:8000",
    "BUDGETFORMER_PORT_8000_TCP_PROTO": "tcp",
    "BUDGETFORMER_PORT_8000_TCP_PORT": "8000",
    "BUDGETFORMER_PORT_8000_TCP_ADDR": "10.0.0.1",
    "BUDGETFORMER_METRICS_PORT": "tcp://10.0.0.2:9464",
}
PROXIES = {
    name: NOWHERE
    for scheme in ("http_proxy", "https_proxy", "all_proxy")
    for name in (scheme, scheme.upper())
}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of modules that end the process that imports them."""
    folder = tmp_path_factory.mktemp("hostile")
    for name in DECOYS:
        (folder / f"{name}.py").write_text(f"raise SystemExit('{name} is imported from here')\n")
    for name in ("service", "torch"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("raise SystemExit('imported from here')\n")
    return folder


@pytest.fixture(scope="module")
def running(
    model_store: Path, hostile: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """Return a server in this folder, with the environment variables of other services.

    The names of its folder for temporary files and of a model are not UTF-8.
    """
    temporary, store = hostile / NOT_UTF_8, tmp_path_factory.mktemp("store")
    temporary.mkdir()
    shutil.copytree(model_store / TOPICS, store / TOPICS)
    shutil.copytree(model_store / TOPICS, store / NOT_UTF_8)
    with server(
        store,
        tmp_path_factory.mktemp("log"),
        engines=2,
        environment=KUBERNETES | PROXIES | {"TMPDIR": str(temporary)},
        cwd=hostile,
        root_path=f"{PREFIX}/",
    ) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program("chromium"))
        yield browser
        browser.close()


def logged(running: Server) -> list[dict[str, object]]:
    return [json.loads(line) for line in running.log.read_text().splitlines()]


def test_nothing_is_imported_from_the_working_directory(running: Server) -> None:
    assert httpx.post(f"{running.url}/classify", json={"input": TEXT}).status_code == 200
    assert "from here" not in running.log.read_text()
    assert running.scrape().total("engine_restarts_total") == 0


def test_names_that_are_not_utf_8_are_shown_escaped(running: Server) -> None:
    health = httpx.get(f"{running.url}/health").json()
    assert health["models"] == [f"{TOPICS}:1", f"{TOPICS}:2"] or f"{TOPICS}:2" in health["models"]
    assert health["errors"]
    assert all(r"t\udcff" in error for error in health["errors"])
    assert "Traceback" not in running.log.read_text()


def test_bulk_workers_import_nothing_from_the_working_directory(
    model_store: Path, hostile: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"{TEXT} {n}"}) + "\n" for n in range(1100)))
    done = subprocess.run(
        [
            *COMMAND[:-1], "classify", "--file", rows, "--model", TOPICS, "--workers", "2",
            "--model-store", model_store,
        ],
        cwd=hostile, capture_output=True, text=True, timeout=120, check=False,
        env=clean_environment(),
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 1100


@pytest.mark.parametrize("kind", ["module", "package"])
def test_a_module_that_shadows_the_package_is_one_line(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("service.py" if kind == "module" else "service/__init__.py")
    path.parent.mkdir(exist_ok=True)
    path.write_text("raise SystemExit('imported')\n")
    done = subprocess.run(
        python_command("-m", "budgetformer", "version"),
        env=clean_environment() | {"PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    (line,) = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (1, "")
    assert str(tmp_path / "service") in line


def test_ignored_variables_of_other_services_are_logged_once(running: Server) -> None:
    (line,) = [
        line for line in logged(running) if "of other services ignored" in str(line["event"])
    ]
    assert line["variables"] == sorted(KUBERNETES)
    assert line["level"] == "warning"


def test_health_check_and_client_use_no_proxy(
    running: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = running.url.rpartition(":")[2]
    check = python_command("-m", "service.healthcheck")
    for name in [n for n in os.environ if n.lower() == "no_proxy"]:
        monkeypatch.delenv(name)
    for name, value in PROXIES.items():
        monkeypatch.setenv(name, value)
    for ports, code in (
        ({"BUDGETFORMER_PORT": port}, 0),
        ({"BUDGETFORMER_PORT": "9", "BUDGETFORMER_METRICS_PORT": port}, 0),
        ({"BUDGETFORMER_PORT": port, "BUDGETFORMER_METRICS_PORT": "tcp://10.0.0.1:1"}, 0),
        ({"BUDGETFORMER_PORT": port, "BUDGETFORMER_HOST": "0.0.0.0"}, 0),
        ({"BUDGETFORMER_PORT": "9"}, 1),
    ):
        environment = clean_environment() | ports
        done = subprocess.run(check, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        assert len(done.stderr.splitlines()) == code
    with Client(running.url) as client:
        assert len(client.classify([TEXT, TEXT])) == 2


@pytest.fixture(scope="module", params=[True, False], ids=["stripped", "passed on"])
def outside(request: pytest.FixtureRequest, running: Server) -> Iterator[str]:
    """Return the URL of the server behind a proxy that strips the prefix or passes it on."""
    with prefixing(running.url, PREFIX, strip=request.param) as url:
        yield url


class TestPrefix:
    def test_every_route_answers(self, outside: str) -> None:
        for path in ("", "/", "/docs", "/openapi.json", "/health/ready", "/metrics", "/v1/models"):
            assert httpx.get(f"{outside}{path}").status_code == 200, path
        for path in ("/classify", "/invocations"):
            answer = httpx.post(f"{outside}{path}", json={"input": TEXT})
            assert answer.json()["data"][0]["label"], path
        assert httpx.post(f"{outside}/", json={"inputs": TEXT}).status_code == 200
        with Client(outside) as client:
            assert client.model(TOPICS)["name"] == TOPICS
        assert httpx.get(f"{outside}/nowhere").json()["error"]["code"] == "not_found"
        assert httpx.put(f"{outside}/classify").headers.get("allow", "POST") == "POST"

    def test_the_openapi_document_names_the_prefix(self, outside: str) -> None:
        document = httpx.get(f"{outside}/openapi.json").json()
        assert document["servers"] == [{"url": PREFIX}]

    def test_metrics_count_by_route(self, outside: str, running: Server) -> None:
        before = running.scrape()
        httpx.post(f"{outside}/classify", json={"input": TEXT})
        httpx.get(f"{outside}/models/{TOPICS}")
        after = running.scrape()
        for route in ("/classify", "/models/{name}"):
            assert after.minus(before, "requests_total", route=route, outcome="ok") == 1

    @pytest.mark.parametrize("slash", ["", "/"])
    def test_the_playground_works(self, browser: Browser, outside: str, slash: str) -> None:
        with browser.new_context() as context:
            page, elsewhere = context.new_page(), list[str]()
            page.on("requestfailed", lambda it: elsewhere.append(it.url))
            page.on("response", lambda it: it.ok or elsewhere.append(f"{it.status} {it.url}"))
            page.on("request", lambda it: it.url.startswith(outside) or elsewhere.append(it.url))
            page.goto(f"{outside}{slash}")
            expect(page.locator("#columns .says:not(:empty)").first).to_be_visible(timeout=30_000)
            for link in page.get_by_role("navigation").locator("a").all():
                assert httpx.get(link.evaluate("a => a.href")).status_code == 200
            assert elsewhere == []

    def test_the_documentation_works(self, browser: Browser, outside: str) -> None:
        with browser.new_context() as context:
            page, elsewhere = context.new_page(), list[str]()
            page.on("requestfailed", lambda it: elsewhere.append(it.url))
            page.on("response", lambda it: it.ok or elsewhere.append(f"{it.status} {it.url}"))
            page.on("console", lambda it: it.type == "error" and elsewhere.append(it.text))
            page.on("request", lambda it: it.url.startswith(outside) or elsewhere.append(it.url))
            page.goto(f"{outside}/docs")
            block = page.locator(".opblock", has_text="/health/live").first
            block.click(timeout=30_000)
            block.get_by_role("button", name="Try it out").click()
            block.get_by_role("button", name="Execute").click()
            expect(
                block.locator(".live-responses-table .response .response-col_status").first
            ).to_have_text("200", timeout=30_000)
            assert elsewhere == []
