"""Health, metrics, the playground, OpenAPI, logs."""

from __future__ import annotations

import asyncio
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs

import budgetformer
from service.http import health
from service.ipc import hub_client
from service.ipc.connection import listening
from service.settings import Settings
from tests.support.exposition import Exposition
from tests.support.serving import (
    ADMIN,
    ADMIN_KEY,
    Service,
    application,
    engine,
    error_of,
    held,
    hub,
    poison,
    service,
)
from tests.support.stalled_hub import StalledHub
from tests.support.stores import HEADS, LAYERS, PAIRS, TAGS, TOPICS, labelled_sentences, sentences
from tests.support.waiting import until

TEXTS = [text for text, _ in labelled_sentences()][:24]
TEXT = TEXTS[0]


class TestHealth:
    pytestmark = pytest.mark.asyncio(loop_scope="session")

    @pytest.mark.parametrize("path", ["/health/live", "/health/ready", "/health"])
    async def test_all_probes_are_ok(self, shared: Service, path: str) -> None:
        response = await shared.client.get(path)
        assert response.status_code == 200
        assert response.json()["status"] == "ok"

    async def test_health_lists_models_and_engines(self, shared: Service) -> None:
        body = (await shared.client.get("/health")).json()
        assert "topics:2" in body["models"]
        assert body["errors"] == []
        (engine,) = body["engines"]
        assert engine["alive"] is True
        assert engine["heartbeat_age_seconds"] >= 0

    async def test_components_are_ok(self, shared: Service) -> None:
        def beating() -> bool:
            reported = shared.app.state.shared.hub.heartbeat
            return reported is not None and reported.frontends == 1

        await until(beating, "the hub's word of its frontends")
        components = (await shared.client.get("/health")).json()["components"]
        assert {name: one["status"] for name, one in components.items()} == dict.fromkeys(
            ("hub", "supervisor", "engines", "frontends"), "ok"
        )
        assert 0 <= components["hub"]["last_word_age_seconds"] < 5
        assert components["supervisor"]["tasks"] == dict.fromkeys(
            ("hub-recent", "hub-beat", "hub-rollouts"), "ok"
        )
        assert components["engines"]["alive"] == components["engines"]["configured"] == 1
        assert components["frontends"]["connected"] == components["frontends"]["configured"] == 1


async def test_a_failing_task_degrades_the_supervisor_until_it_runs(
    fresh: Service,
) -> None:
    async def tasks_are(status: str, reported: str) -> None:
        async def shown() -> bool:
            answer = await fresh.client.get("/health")
            assert answer.status_code == 200
            supervisor = answer.json()["components"]["supervisor"]
            told_now = supervisor["tasks"].get("hub-recent")
            return (supervisor["status"], told_now) == (status, reported)

        await until(shown, f"{status}: {reported}")

    fresh.hub.report_problem("hub-recent", "hub-recent: OSError: no room")
    await tasks_are("degraded", "hub-recent: OSError: no room")
    fresh.hub.report_problem("hub-recent", None)
    await tasks_are("ok", "ok")


async def test_without_engines_and_with_a_silent_hub_components_are_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "SILENCE_LIMIT", 0.3)
    given = Settings(model_store=tmp_path, admin_key=ADMIN_KEY)
    nobody = tmp_path / "engine.sock"
    with tempfile.TemporaryDirectory(prefix="bf-") as folder:
        socket = Path(folder) / "hub.sock"
        async with (
            listening(socket, StalledHub().came),
            application(given, [nobody], socket) as app,
        ):
            await until(lambda: app.state.shared.hub.silent_seconds > 0.3, "silence")
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://s") as client:
                answer = await client.get("/health")
    assert answer.status_code == 503
    components = answer.json()["components"]
    assert components["hub"]["last_word_age_seconds"] > 0.3
    assert {name: one["status"] for name, one in components.items()} == {
        "hub": "down", "supervisor": "unknown", "engines": "down", "frontends": "unknown",
    }  # fmt: skip


async def test_ready_when_all_waits_for_every_engine_at_the_start(model_store: Path) -> None:
    given = Settings(
        model_store=model_store, models=[TOPICS, PAIRS], admin_key=ADMIN_KEY, ready_when="all"
    )
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bf-")))
        first, second, meeting = (folder / name for name in ("0", "1", "hub"))
        await stack.enter_async_context(engine(first))
        await stack.enter_async_context(hub(given, [first, second], meeting))
        app = await stack.enter_async_context(application(given, [first, second], meeting))
        state = app.state.shared
        await until(lambda: len(state.engines.models) == 2, "both models in one engine")
        assert health.why_not_ready(state) == "an engine is still loading models"
        async with engine(second):
            await until(lambda: health.why_not_ready(state) is None, "both engines")
        await until(lambda: len(state.engines.alive) == 1, "the end of the second engine")
        assert health.why_not_ready(state) is None, "one engine serves all models"


@pytest.mark.parametrize(("ready_when", "ready"), [("any", True), ("all", False)])
async def test_ready_when_all_requires_every_model(
    store: Path, ready_when: str, ready: bool
) -> None:
    weights = store / PAIRS / "1" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    options = {"default_model": TOPICS, "ready_when": ready_when}
    async with service(store, wait=False, **options) as running:

        async def reported() -> bool:
            return str(weights) in str((await running.client.get("/health")).json()["errors"])

        await until(reported, "word of the broken model")

        def equipped() -> bool:
            reported = running.app.state.shared.hub.heartbeat
            return reported is not None and reported.equipped

        await until(equipped, "word of the engines")
        assert await running.ready() is ready
        if not ready:
            error = error_of(await running.client.get("/health/ready"), 503, "not_ready")
            assert str(weights) in error["message"]


class TestPages:
    pytestmark = pytest.mark.asyncio(loop_scope="session")

    async def test_the_playground_and_its_files_are_served_securely(self, shared: Service) -> None:
        page = await shared.client.get("/")
        named = re.findall(r'"(playground/[^"]+)"', page.text)
        assert {name.rpartition(".")[2] for name in named} == {"css", "js", "svg"}
        module = (await shared.client.get("/playground/main.js")).text
        named += [f"playground/{name}" for name in re.findall(r'from "\./(.+?)"', module)]
        assert len(named) > 5
        kinds = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
        for file in ("", *named):
            response = await shared.client.get(f"/{file}")
            assert response.status_code == 200, file
            kind = kinds.get(file.rpartition(".")[2], "text/html")
            assert response.headers["content-type"].startswith(kind)
            assert "default-src 'none'" in response.headers["content-security-policy"]
            assert "unsafe" not in response.headers["content-security-policy"]
            assert response.headers["x-content-type-options"] == "nosniff"
            assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", response.text), file
            tag = {"if-none-match": response.headers["etag"]}
            again = await shared.client.get(f"/{file}", headers=tag)
            assert (again.status_code, again.content) == (304, b"")

    @pytest.mark.parametrize("name", ["nothing.js", "..%2Fplayground.py", "%2Fetc%2Fpasswd"])
    async def test_the_playground_serves_no_other_files(self, shared: Service, name: str) -> None:
        error_of(await shared.client.get(f"/playground/{name}"), 404)

    async def test_the_playground_gets_recent_figures_of_a_model(self, shared: Service) -> None:
        reported = (await shared.client.get("/playground/recent")).json()
        assert reported["model"] == "topics"
        other = await shared.client.get("/playground/recent", params={"model": "tags:1"})
        assert other.json()["model"] == "tags"
        unknown = await shared.client.get("/playground/recent", params={"model": "no"})
        error_of(unknown, 404, param="model")

    @pytest.mark.parametrize("path", ["/", "/docs"])
    async def test_pages_do_not_refer_to_other_origins(self, shared: Service, path: str) -> None:
        page = await shared.client.get(path)
        policy = dict(
            part.strip().split(" ", 1)
            for part in page.headers["content-security-policy"].split(";")
            if " " in part.strip()
        )
        sources = {source for value in policy.values() for source in value.split()}
        assert sources <= {"'none'", "'self'", "data:", "'unsafe-inline'", "'script'"}
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == policy["connect-src"] == "'self'"
        links = re.findall(r'(?:href|src|action)="([^"]*)"', page.text)
        assert len(links) > 3
        for link in links:
            assert not re.match(r"[a-z]+:|/", link), link
        for link in {link for link in links if link.startswith("playground/")}:
            file = await shared.client.get(f"/{link}")
            assert file.status_code == 200
            if link.endswith(".css"):
                used = re.findall(r"""url\(["']?([^"')]{0,40})|@import\s+(\S+)""", file.text)
                assert all(one.startswith("data:") for one, imported in used if not imported)
                assert not any(imported for _, imported in used)
            elif "swagger" not in link:  # its code contains URLs, which the policy blocks
                assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", file.text)

    async def test_makefile_notice_and_bundle_name_the_same_swagger_ui(self) -> None:
        root = Path(__file__).parents[2]
        wanted = re.search(r"SWAGGER_UI \?= (\S+)", (root / "Makefile").read_text())
        assert wanted is not None
        assert f"swagger-ui-dist {wanted[1]}" in (root / "NOTICE").read_text()
        shipped = (root / "service/http/page/swagger-ui-bundle.js").read_text()
        assert f'"{wanted[1]}"' in shipped


@pytest.fixture(scope="module")
def documented() -> list[tuple[str, str]]:
    return [
        ("post", "/classify"),
        ("get", "/"),
        ("get", "/health/live"),
        ("get", "/health/ready"),
        ("get", "/health"),
        ("get", "/metrics"),
        ("get", "/v1/models"),
        ("get", "/models/{name}"),
        ("post", "/models/{name}/load"),
        ("post", "/models/{name}/unload"),
        ("post", "/tokenize"),
        ("post", "/"),
        ("post", "/predict"),
        ("get", "/ping"),
        ("post", "/invocations"),
        ("get", "/v2"),
        ("get", "/v2/health/live"),
        ("get", "/v2/health/ready"),
        ("get", "/v2/models/{name}"),
        ("get", "/v2/models/{name}/ready"),
        ("get", "/v2/models/{name}/config"),
        ("post", "/v2/models/{name}/infer"),
        ("get", "/v2/models/{name}/versions/{version}"),
        ("post", "/v2/models/{name}/versions/{version}/infer"),
        ("post", "/v2/repository/index"),
        ("post", "/v2/repository/models/{name}/load"),
        ("post", "/v2/repository/models/{name}/unload"),
    ]


FOREIGN_FIELDS = (
    "raw_scores", "user", "request_id", "priority", "add_special_tokens", "truncate_prompt_tokens",
)  # fmt: skip
"""Fields that clients of vLLM and Infinity send to /classify."""


class TestOpenApi:
    pytestmark = pytest.mark.asyncio(loop_scope="session")

    async def schema(self, shared: Service) -> Any:
        response = await shared.client.get("/openapi.json")
        assert response.status_code == 200
        return response.json()

    async def test_every_route_is_described(
        self, shared: Service, documented: list[tuple[str, str]]
    ) -> None:
        paths = (await self.schema(shared))["paths"]
        for method, path in documented:
            assert paths[path][method]["summary"]

    async def test_the_document_has_the_version_of_the_package(self, shared: Service) -> None:
        assert (await self.schema(shared))["info"]["version"] == budgetformer.__version__

    @pytest.mark.parametrize("name", ["ClassifyRequest", "TokenizeRequest"])
    async def test_requests_have_an_example(self, shared: Service, name: str) -> None:
        described = (await self.schema(shared))["components"]["schemas"][name]
        assert described["examples"][0]["input"]
        assert described["additionalProperties"] is False

    async def test_the_examples_are_answered(self, shared: Service) -> None:
        schemas = (await self.schema(shared))["components"]["schemas"]
        for name, path in (("ClassifyRequest", "/classify"), ("TokenizeRequest", "/tokenize")):
            for example in schemas[name]["examples"]:
                assert (await shared.client.post(path, json=example)).status_code == 200

    async def test_every_field_of_classify_is_described(self, shared: Service) -> None:
        described = (await self.schema(shared))["components"]["schemas"]["ClassifyRequest"]
        assert set(described["properties"]) == {
            "input", "model", "top_k", "threshold", "use_activation", "truncate", "quality",
            "target_ms", "max_heads", "heads", "timeout_ms", "return_heads",
            *FOREIGN_FIELDS,
        }  # fmt: skip
        for field in described["properties"].values():
            assert field["description"]

    @pytest.mark.parametrize("status", [200, 400, 404, 413, 415, 422, 429, 503, 504])
    async def test_every_status_of_classify_is_described(
        self, shared: Service, status: int
    ) -> None:
        described = (await self.schema(shared))["paths"]["/classify"]["post"]["responses"]
        assert str(status) in described

    async def test_every_reference_can_be_resolved(self, shared: Service) -> None:
        schema = await self.schema(shared)
        text = json.dumps(schema)
        for part in text.split('"$ref": "#/components/schemas/')[1:]:
            assert part.partition('"')[0] in schema["components"]["schemas"]

    async def test_every_request_body_has_an_example(
        self, shared: Service, documented: list[tuple[str, str]]
    ) -> None:
        schema = await self.schema(shared)
        for method, path in documented:
            operation = schema["paths"][path][method]
            if method == "post" and path != "/models/{name}/unload":
                assert "requestBody" in operation, path
                assert "example" in json.dumps(_resolved(operation["requestBody"], schema)), path


def _resolved(part: Any, schema: Any) -> Any:
    """Replace references by their targets, one level deep."""
    if isinstance(part, dict):
        if "$ref" in part:
            return schema["components"]["schemas"][part["$ref"].rpartition("/")[2]]
        return {key: _resolved(value, schema) for key, value in part.items()}
    return [_resolved(value, schema) for value in part] if isinstance(part, list) else part


class TestMetrics:
    pytestmark = pytest.mark.asyncio(loop_scope="session")

    async def test_metrics_are_prometheus_text(self, shared: Service) -> None:
        response = await shared.client.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain")
        assert Exposition(response.text).select("requests_total")

    async def test_clients_that_accept_openmetrics_get_it(self, shared: Service) -> None:
        headers = {"Accept": "application/openmetrics-text; version=1.0.0"}
        response = await shared.client.get("/metrics", headers=headers)
        assert response.headers["content-type"].startswith("application/openmetrics-text")
        assert response.text.endswith("# EOF\n")

    @pytest.mark.parametrize(
        "name",
        [
            "requests_total", "request_duration_seconds_count", "request_heads_count",
            "items_total", "item_tokens_count", "stage_duration_seconds_count", "macs_total",
            "dense_macs_total", "heads_used_total", "heads_total", "batch_items_count",
            "batch_tokens_count", "batch_padding_ratio_count", "batches_total", "queue_items",
            "queue_cost_seconds", "queue_oldest_age_seconds", "in_flight_items",
            "rejected_total", "cancelled_total", "deadline_exceeded_total", "truncated_total",
            "engine_restarts_total", "quality_level", "model_info", "build_info",
            "model_load_seconds", "model_memory_bytes", "device_memory_bytes",
            "engine_heartbeat_age_seconds",
        ],
    )  # fmt: skip
    async def test_every_metric_has_series(self, shared: Service, name: str) -> None:
        async def shown() -> bool:
            return bool((await shared.scrape()).select(name))

        await until(shown, name)

    async def test_metrics_describe_models_and_the_build(self, shared: Service) -> None:
        shown = await shared.scrape()
        (info,) = shown.select("model_info", model=TAGS)
        assert info.value == 1
        assert info.labels["version"] == "1"
        assert info.labels["layers"] == str(LAYERS)
        assert info.labels["heads"] == str(HEADS)
        assert info.labels["device"] == "cpu"
        (build,) = shown.select("build_info")
        assert build.labels["version"] == budgetformer.__version__
        assert build.labels["torch"]

    async def test_labels_of_routes_are_templates(self, shared: Service) -> None:
        for path in ("/models/topics", "/models/nothing", "/nowhere/1", "/nowhere/2", "/docs"):
            await shared.client.get(path)
        await shared.client.get("/classify")
        routes = {s.labels["route"] for s in (await shared.scrape()).select("requests_total")}
        assert "/models/{name}" in routes
        assert not [route for route in routes if "nothing" in route or "nowhere" in route]


async def test_metrics_are_0_before_the_first_request(fresh: Service) -> None:
    shown = await fresh.scrape()
    for name in ("requests_total", "items_total", "batches_total", "stage_duration_seconds_count"):
        wanted = {"route": "/classify"} if name == "requests_total" else {}
        assert shown.total(name, **wanted) == 0
    assert {s.labels["budget"] for s in shown.select("items_total", model=TOPICS)} == set("01234")
    assert shown.total("quality_level", model=TOPICS) == 2


async def test_metrics_equal_the_sums_of_the_answers(fresh: Service) -> None:
    before = await fresh.scrape()
    requests: list[dict[str, Any]] = [
        {"input": TEXTS},
        {"input": TEXTS[:5], "quality": "best"},
        {"input": TEXTS[3], "quality": "fast"},
        {"input": "otter " * 100, "heads": 3},
        {"input": ["", TEXTS[0]], "quality": 1.5},
        {"input": TEXTS, "quality": "best", "max_heads": 2},
    ]
    bodies = await asyncio.gather(*(fresh.answer(r.pop("input"), **r) for r in requests))
    await fresh.ask([])
    await fresh.ask(TEXT, model="nothing")
    items = [item for body in bodies for item in body["data"]]

    shown = await fresh.scrape()
    budgets: dict[str, float] = {}
    for item in items:
        budget = str(item["heads"]["budget"])
        budgets[budget] = budgets.get(budget, 0) + 1
    assert len(budgets) >= 4
    assert shown.by("budget", "items_total", model=TOPICS, version=2) == budgets
    sums = {
        "heads_used_total": sum(item["heads"]["used"] for item in items),
        "heads_total": sum(item["heads"]["total"] for item in items),
        "macs_total": sum(item["macs"] for item in items),
        "dense_macs_total": sum(item["dense_macs"] for item in items),
        "request_heads_sum": sum(item["heads"]["used"] for item in items),
        "request_heads_count": len(items),
        "item_tokens_sum": sum(item["tokens"] for item in items),
        "item_tokens_count": len(items),
    }
    for name, value in sums.items():
        assert shown.minus(before, name, model=TOPICS, version=2) == value, name
    assert shown.total("truncated_total") == 1
    assert shown.by("outcome", "requests_total", route="/classify") == {"ok": 6, "invalid": 2}
    assert shown.total("request_duration_seconds_count", route="/classify") == 8
    for stage in ("tokenize", "budget", "queue", "compute", "respond"):
        assert shown.total("stage_duration_seconds_count", stage=stage) == 6

    async def batches_counted() -> bool:
        shown = await fresh.scrape()
        return all(
            shown.total("batch_items_sum", budget=budget) >= count
            for budget, count in budgets.items()
            if budget != "0"
        )

    await until(batches_counted, "the report of the last batch")
    shown = await fresh.scrape()
    # Step 0 answers in the frontend, text by text.
    assert shown.total("batches_total", budget=0) == 0
    for budget in "1234":
        ran = shown.total("batches_total", budget=budget)
        assert ran == shown.total("batch_items_count", budget=budget)
        assert shown.total("batch_items_sum", budget=budget) >= ran
    assert shown.total("in_flight_items", model=TOPICS) >= 0


async def test_requests_are_counted_by_model_and_outcome(fresh: Service) -> None:
    tensor = {"name": "text", "shape": [1], "datatype": "BYTES", "data": [TEXT]}
    bodies_by_path = {
        "/classify": {"input": TEXT},
        "/predict": {"inputs": TEXT},
        "/": {"inputs": TEXT},
        "/invocations": {"input": TEXT},
        f"/v2/models/{TOPICS}/infer": {"inputs": [tensor]},
    }
    for path, body in bodies_by_path.items():
        assert (await fresh.client.post(path, json=body)).status_code == 200
    error_of(await fresh.ask(TEXT, heads=10_000), 422)
    bad, good = "otter fox", sentences("music")[0]
    tokens = (await fresh.item(bad))["tokens"]
    assert (await fresh.item(good))["tokens"] != tokens
    with poison(fresh.core.models[TOPICS, 2].network, tokens, "raise"):
        await fresh.ask([bad, good, bad], heads=HEADS)
        await fresh.ask(bad, heads=HEADS)
    # None of these requests is for a served model.
    error_of(await fresh.ask(TEXT, model="nothing"), 404)
    error_of(await fresh.ask(TEXT, model=f"{TOPICS}:7"), 404)
    await fresh.client.post("/tokenize", json={"input": TEXT})
    await fresh.client.get(f"/models/{TOPICS}")

    shown = await fresh.scrape()
    counted = {"ok": 7, "invalid": 1, "partial": 1, "error": 1}
    by_outcome = shown.by("outcome", "model_requests_total", model=TOPICS, version=2)
    assert {outcome: count for outcome, count in by_outcome.items() if count} == counted
    assert shown.total("model_requests_total") == 10
    durations = "model_request_duration_seconds_count"
    assert shown.total(durations, model=TOPICS, version=2) == shown.total(durations) == 10
    assert shown.total("model_items_failed_total", model=TOPICS, version=2) == 3


async def test_two_engines_share_the_requests(model_store: Path) -> None:
    async with service(model_store, engines=2, models=["topics"]) as pair:
        first, second = pair.cores

        async def both() -> bool:
            engines = (await pair.client.get("/health")).json()["engines"]
            return all(engine["models"] for engine in engines)

        await until(both, "the model in both engines")
        with held(first), held(second):
            tasks = [asyncio.create_task(pair.ask(text, heads=1)) for text in TEXTS[:4]]
            await until(lambda: pair.in_flight() == 4, "arrival at the engines")
            in_flight = [sum(c.heartbeat(0).in_flight.values()) for c in pair.cores]
            assert in_flight == [2, 2]
        assert {(await task).status_code for task in tasks} == {200}
        assert (await pair.scrape()).total("items_total") == 4


async def test_no_log_line_contains_a_text(fresh: Service) -> None:
    secret = "xyzzy"
    bad = f"{secret} {secret} " * 3
    tokens = (await fresh.item(bad))["tokens"]
    with capture_logs() as lines:
        await fresh.ask(f"{secret} otter")
        await fresh.ask([secret, {"text": secret, "text_pair": secret}], quality="best")
        await fresh.ask([secret, 5])
        await fresh.ask(secret, topk=secret)
        await fresh.ask(secret, model=secret)
        await fresh.ask(f"{secret} " * 100, truncate=False)
        await fresh.client.post("/classify", content=b'{"input": "xyzzy')
        await fresh.client.post("/tokenize", json={"input": secret})
        with poison(fresh.core.models["topics", 2].network, tokens, "raise"):
            await fresh.ask([bad, sentences("music")[0]], heads=HEADS)
    assert lines
    assert any(line["event"] == "item failed" for line in lines)
    assert secret not in json.dumps(lines, default=str)


def request_lines(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [line for line in lines if line["event"] == "request" and line["route"] == "/classify"]


@pytest.mark.parametrize(("share", "level"), [(0.0, "debug"), (1.0, "info")])
async def test_access_log_sets_the_level_of_request_lines(
    model_store: Path, share: float, level: str
) -> None:
    async with service(model_store, models=["topics"], access_log=share) as some:
        with capture_logs() as lines:
            await some.ask(TEXT)
            await some.ask(TEXT, model="nothing")
    logged = request_lines(lines)
    assert [line["outcome"] for line in logged] == ["ok", "invalid"]
    assert {line["log_level"] for line in logged} == {level}


async def test_failed_requests_are_always_logged(fresh: Service) -> None:
    with capture_logs() as lines, poison(fresh.core.models["topics", 2].network, 4, "raise"):
        answer = await fresh.ask("otter fox", heads=HEADS)
        await fresh.client.get("/health/ready")
    (line,) = request_lines(lines)
    assert answer.status_code == 500, answer.text
    assert line["log_level"] == "info"
    assert line["status"] == 500


@pytest.mark.asyncio(loop_scope="session")
@pytest.mark.parametrize(
    ("accept", "openmetrics"),
    [
        ("text/plain; version=abc", False),
        ("text/plain;version=1e999", False),
        ("application/openmetrics-text; version=abc", False),
        ("application/openmetrics-text; version=2.0.0", False),
        ("application/openmetrics-text; version=0.0.1", False),
        ("application/openmetrics-text", True),
        ("Application/OpenMetrics-Text ; Version=1.0.0", True),
        ('application/openmetrics-text; version="1.0.0"; charset=utf-8', True),
        ("application/openmetrics-text;version=1.0.0;q=0.5, text/plain;version=0.0.4;q=0.3", True),
        ("application/openmetrics-text;q=0.2,text/plain;q=0.3", False),
        ("application/openmetrics-text;q=0", False),
        ("application/openmetrics-text;q=nan", False),
        ("application/json", False),
        (",,;;==,/;q", False),
        ("*/*", False),
        ("", False),
        ("x" * 8000, False),
    ],
)
async def test_the_accept_header_selects_the_format_of_metrics(
    shared: Service, accept: str, openmetrics: bool
) -> None:
    response = await shared.client.get("/metrics", headers={"Accept": accept})
    assert response.status_code == 200
    kind = "application/openmetrics-text; version=1.0.0" if openmetrics else "text/plain; version="
    assert response.headers["content-type"].startswith(kind)
    assert response.text.endswith("# EOF\n") == openmetrics


async def test_a_failed_scrape_does_not_affect_later_requests(
    model_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with service(model_store, models=["topics"]) as running:
        watch = running.hub.watch
        with monkeypatch.context() as patch, capture_logs() as lines:
            patch.setattr(watch, "refresh", lambda _: [][0])
            for _ in range(3):
                error = error_of(await running.client.get("/metrics"), 500)
                assert "IndexError" in error["message"]
            changing = running.client.post("/models/topics/load", headers=ADMIN)
            assert (await changing).status_code == 200, "another reply was lost"
        assert (await running.client.get("/metrics")).status_code == 200
        failures = [line for line in lines if line["event"] == "message handling failed"]
        assert [line["message"] for line in failures] == ["Scrape"]


@pytest.mark.parametrize(("slow", "limit"), [(False, "SILENCE_LIMIT"), (True, "QUERY_SECONDS")])
async def test_a_scrape_does_not_wait_for_a_stopped_or_slow_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: bool, limit: str
) -> None:
    monkeypatch.setattr(hub_client, limit, 0.5)
    hub = StalledHub(slow)
    if slow:
        hub.reads.set()
    given = Settings(model_store=tmp_path, admin_key=ADMIN_KEY)
    with tempfile.TemporaryDirectory(prefix="bf-") as folder:
        socket = Path(folder) / "hub.sock"
        async with listening(socket, hub.came), application(given, [], socket) as app:
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
                error_of(await client.get("/metrics"), 503, "hub_down")
                hub.slow = False
                hub.reads.set()
                await until(lambda: app.state.shared.hub.silent_seconds < 0.5, "the hub")
                assert (await client.get("/metrics")).text == "series"


async def test_values_sent_by_callers_create_no_series(fresh: Service) -> None:
    await fresh.ask(TEXT)

    async def series() -> set[tuple[str, frozenset[tuple[str, str]]]]:
        shown = (await fresh.scrape()).samples
        return {(sample.name, frozenset(sample.labels.items())) for sample in shown}

    before = await series()
    for number in range(5):
        odd = f"odd{number}"
        headers = {"X-API-Key": odd, "X-Request-Id": odd, "traceparent": f"00-{number:032x}-1-01"}
        await fresh.client.get(f"/{odd}", headers=headers)
        await fresh.client.request(odd.upper(), "/classify", headers=headers)
        await fresh.client.get(f"/models/{odd}", headers=headers)
        await fresh.client.post(f"/models/{odd}/load", headers=headers)
        await fresh.ask(TEXT, model=odd)
        await fresh.ask(TEXT, quality=odd)
    assert await series() == before
