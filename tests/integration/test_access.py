"""API keys: open routes, scopes, rate limits, rotation, metrics and logs, browsers."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from structlog.testing import capture_logs

from service.keys import POLL_SECONDS, digest, key_line
from tests.support.serving import Service, error_of, held, service
from tests.support.stores import TOPICS
from tests.support.waiting import until
from tests.unit.service.test_keys import key, write

KEYS = {
    "web": key("classify-secret"),
    "ops": key("admin-secret", "admin"),
    "both": key("both-secret", "classify", "admin"),
    "jobs": key("jobs-secret", "jobs"),
}
WEB, OPS, BOTH, FILES = (
    {"Authorization": f"Bearer {name}-secret"} for name in ("classify", "admin", "both", "jobs")
)
OPEN = {
    ("GET", "/"),
    ("GET", "/health"),
    ("GET", "/health/live"),
    ("GET", "/health/ready"),
    ("GET", "/metrics"),
    ("GET", "/ping"),
    ("GET", "/v2/health/live"),
    ("GET", "/v2/health/ready"),
}
ADMIN_ROUTES = {
    ("POST", "/models/{name}/load"),
    ("POST", "/models/{name}/unload"),
    ("POST", "/models/{name}/rollout"),
    ("GET", "/models/{name}/rollout"),
    ("POST", "/models/{name}/promote"),
    ("POST", "/models/{name}/rollback"),
    ("POST", "/settings/reload"),
    ("POST", "/v2/repository/models/{name}/load"),
    ("POST", "/v2/repository/models/{name}/unload"),
}
JOB_ROUTES = {
    ("POST", "/jobs"),
    ("GET", "/jobs"),
    ("GET", "/jobs/{job}"),
    ("GET", "/jobs/{job}/result"),
    ("DELETE", "/jobs/{job}"),
}


@pytest_asyncio.fixture
async def locked(model_store: Path) -> AsyncIterator[Service]:
    async with service(model_store, models=[TOPICS], keys=KEYS, admin_key=None) as running:
        yield running


def routes(running: Service) -> list[tuple[str, str]]:
    paths = running.app.openapi()["paths"]
    return [(method.upper(), path) for path, methods in paths.items() for method in methods]


async def ask_route(
    running: Service, method: str, path: str, headers: dict[str, str] | None = None
) -> httpx.Response:
    """Send a body that every route rejects, so that an accepted key changes nothing."""
    filled = path.format(name="nothing", version="1", job="0" * 32)
    content = b"{" if method == "POST" else None
    return await running.client.request(method, filled, content=content, headers=headers)


async def test_only_the_open_routes_answer_without_a_key(locked: Service) -> None:
    open_routes = set()
    for method, path in routes(locked):
        response = await ask_route(locked, method, path)
        if response.status_code == 401:
            assert response.headers["www-authenticate"] == "Bearer"
            assert "secret" not in response.text
        else:
            open_routes.add((method, path))
    assert open_routes == OPEN


@pytest.mark.parametrize(("headers", "scope"), [(WEB, "classify"), (OPS, "admin"), (FILES, "jobs")])
async def test_a_key_only_opens_the_routes_of_its_scope(
    locked: Service, headers: dict[str, str], scope: str
) -> None:
    closed = set()
    for method, path in routes(locked):
        response = await ask_route(locked, method, path, headers)
        assert response.status_code != 401
        if response.status_code == 403:
            closed.add((method, path))
    opened = {
        "classify": set(routes(locked)) - ADMIN_ROUTES - JOB_ROUTES,
        "admin": ADMIN_ROUTES | JOB_ROUTES,
        "jobs": JOB_ROUTES,
    }
    assert closed == set(routes(locked)) - OPEN - opened[scope]


async def test_a_key_with_both_scopes_opens_everything(locked: Service) -> None:
    for method, path in routes(locked):
        response = await ask_route(locked, method, path, BOTH)
        assert response.status_code not in (401, 403)


@pytest.mark.parametrize(
    "headers",
    [
        WEB,
        {"Authorization": "bearer classify-secret"},
        {"X-API-Key": "classify-secret"},
        {"x-api-key": "classify-secret", "Authorization": "Basic dXNlcjpwYXNz"},
    ],
    ids=json.dumps,
)
async def test_every_way_to_send_a_key(locked: Service, headers: dict[str, str]) -> None:
    response = await locked.client.post("/classify", json={"input": "a"}, headers=headers)
    assert response.status_code == 200


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({}, "no_key"),
        ({"Authorization": "Bearer"}, "no_key"),
        ({"X-API-Key": ""}, "no_key"),
        ({"Authorization": "Basic Y2xhc3NpZnktc2VjcmV0"}, "no_key"),
        ({"Authorization": "Bearer wrong"}, "wrong_key"),
        ({"Authorization": f"Bearer {digest(b'classify-secret')}"}, "wrong_key"),
        ({"X-API-Key": "classify-secret "*2}, "wrong_key"),
        ({"X-API-Key": "x" * 10_000}, "wrong_key"),
    ],
    ids=lambda value: json.dumps(value)[:50],
)  # fmt: skip
async def test_missing_and_wrong_keys_are_refused(
    locked: Service, headers: dict[str, str], code: str
) -> None:
    response = await locked.client.post("/classify", json={"input": "a"}, headers=headers)
    error_of(response, 401, code)


async def test_a_missing_scope_is_named(locked: Service) -> None:
    response = await locked.client.post("/classify", json={"input": "a"}, headers=OPS)
    error = error_of(response, 403, "missing_scope")
    assert "'classify'" in error["message"]
    assert "ops" in error["message"]


async def test_the_key_is_checked_before_the_body_is_read(locked: Service) -> None:
    async def body() -> AsyncIterator[bytes]:
        pytest.fail("it was read")
        yield b""

    error_of(await locked.client.post("/classify", content=body()), 401)


async def test_refusals_have_the_error_format_of_the_route(locked: Service) -> None:
    tei = await locked.client.post("/predict", json={"inputs": "a"})
    assert (tei.status_code, set(tei.json())) == (401, {"error", "error_type"})
    kserve = await locked.client.get("/v2/models/topics", headers=OPS)
    assert (kserve.status_code, set(kserve.json())) == (403, {"error"})
    assert isinstance(kserve.json()["error"], str)


async def test_the_admin_key_of_the_settings_only_has_the_admin_scope(model_store: Path) -> None:
    async with service(model_store, models=[TOPICS], keys={"web": KEYS["web"]}) as running:
        opened = {"Authorization": "Bearer open-sesame"}
        response = await running.client.post("/models/nothing/load", headers=opened)
        error_of(response, 404)
        response = await running.client.post("/classify", json={"input": "a"}, headers=opened)
        error_of(response, 403)


async def test_with_anonymous_access_a_wrong_key_is_treated_as_none(model_store: Path) -> None:
    async with service(
        model_store, models=[TOPICS], keys=KEYS, admin_key=None, allow_anonymous=True
    ) as running:
        for headers in ({}, {"Authorization": "Bearer EMPTY"}, OPS, WEB):
            response = await running.client.post("/classify", json={"input": "a"}, headers=headers)
            assert response.status_code == 200
        for headers in ({}, {"Authorization": "Bearer EMPTY"}):
            error_of(await running.client.post("/models/topics/load", headers=headers), 401)


class TestRates:
    @pytest.mark.parametrize(
        ("path", "body"),
        [
            ("/classify", {"input": ["a"] * 4}),
            ("/tokenize", {"input": ["a"] * 4}),
            ("/predict", {"inputs": [["a"]] * 4}),
            ("/", {"inputs": [["a"]] * 4}),
            ("/invocations", {"input": ["a"] * 4}),
            (
                "/v2/models/topics/infer",
                {
                    "inputs": [
                        {"name": "text", "shape": [4], "datatype": "BYTES", "data": ["a"] * 4}
                    ]
                },
            ),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    async def test_texts_are_counted_on_every_route(
        self, model_store: Path, path: str, body: dict[str, Any]
    ) -> None:
        slow = {"slow": key("s", texts_per_second=0.01, burst=10)}
        headers = {"X-API-Key": "s"}
        async with service(model_store, models=[TOPICS], keys=slow) as running:
            before = await running.scrape()
            for _ in range(2):
                response = await running.client.post(path, json=body, headers=headers)
                assert response.status_code == 200, response.text
            response = await running.client.post(path, json=body, headers=headers)
            assert response.status_code == 429
            assert 0 < int(response.headers["retry-after"]) <= 200
            after = await running.scrape()
            assert after.minus(before, "rejected_total", reason="rate") == 1
            assert after.minus(before, "key_texts_total", key="slow") == 8
            assert after.minus(before, "key_requests_total", key="slow", outcome="ok") == 2
            assert after.minus(before, "key_requests_total", key="slow", outcome="rejected") == 1

    async def test_each_key_has_its_own_rate_limit(self, model_store: Path) -> None:
        keys = {
            "slow": key("s", texts_per_second=0.01, burst=1),
            "free": key("f"),
        }
        async with service(model_store, models=[TOPICS], keys=keys) as running:
            for _ in range(3):
                slow = await running.client.post(
                    "/classify", json={"input": "a"}, headers={"X-API-Key": "s"}
                )
                free = await running.client.post(
                    "/classify", json={"input": "a"}, headers={"X-API-Key": "f"}
                )
                assert free.status_code == 200
            error_of(slow, 429, "rate")

    async def test_max_requests_counts_requests_until_they_end_or_are_cancelled(
        self, model_store: Path
    ) -> None:
        body = {"input": "a", "heads": 1}
        keys = {"two": key("t", max_requests=2)}
        headers = {"X-API-Key": "t"}
        async with service(model_store, models=[TOPICS], keys=keys) as running:

            async def ask() -> httpx.Response:
                return await running.client.post("/classify", json=body, headers=headers)

            with held(running.core):
                running_requests = [asyncio.create_task(ask()) for _ in range(2)]
                await until(lambda: running.in_flight() == 2, "two requests under way")
                error_of(await ask(), 429, "too_many_requests")
            for task in running_requests:
                assert (await task).status_code == 200
            assert (await ask()).status_code == 200
            with held(running.core):
                running_requests = [asyncio.create_task(ask()) for _ in range(2)]
                await until(lambda: running.in_flight() == 2, "two requests under way")
                for task in running_requests:
                    task.cancel()
                await asyncio.gather(*running_requests, return_exceptions=True)
            assert (await ask()).status_code == 200


class TestRotation:
    async def test_keys_are_added_and_removed_while_serving(
        self, model_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("service.keys.POLL_SECONDS", 0.0)
        assert POLL_SECONDS > 0
        file = write(tmp_path / "keys.toml", old=key("old"))
        async with service(model_store, models=[TOPICS], keys_file=file) as running:

            async def status(secret: str) -> int:
                response = await running.client.post(
                    "/classify", json={"input": "a"}, headers={"X-API-Key": secret}
                )
                return response.status_code

            assert [await status(secret) for secret in ("old", "new")] == [200, 401]
            write(file, old=key("old"), new=key("new"))
            assert [await status(secret) for secret in ("old", "new")] == [200, 200]
            write(file, new=key("new"))
            assert [await status(secret) for secret in ("old", "new")] == [401, 200]
            scraped = await running.scrape()
            assert scraped.total("key_texts_total", key="new") == 2
            assert 'key="old"' not in (await running.client.get("/metrics")).text


class TestMetricsAndLogs:
    async def test_denials_are_counted_by_reason(self, locked: Service) -> None:
        before = await locked.scrape()
        for headers in ({}, {"X-API-Key": "wrong"}, {"X-API-Key": "wrong too"}, OPS):
            await locked.client.post("/classify", json={"input": "a"}, headers=headers)
        after = await locked.scrape()
        counted = {
            reason: after.minus(before, "denied_total", reason=reason)
            for reason in ("no_key", "wrong_key", "missing_scope")
        }
        assert counted == {"no_key": 1, "wrong_key": 2, "missing_scope": 1}

    async def test_only_configured_keys_have_series_from_the_start(self, locked: Service) -> None:
        for number in range(20):
            await locked.client.post("/classify", headers={"X-API-Key": f"guess {number}"})
        text = (await locked.client.get("/metrics")).text
        names = set(re.findall(r'budgetformer_key_\w+\{key="([^"]*)"', text))
        assert names == {*KEYS, "anonymous"}
        assert (await locked.scrape()).total("key_texts_total", key="both") == 0

    async def test_the_log_contains_the_name_of_the_key_but_not_the_secret(
        self, model_store: Path
    ) -> None:
        async with service(model_store, models=[TOPICS], keys=KEYS, access_log=1.0) as running:
            with capture_logs() as lines:
                await running.client.post("/classify", json={"input": "a"}, headers=WEB)
                await running.client.post("/classify", json={"input": "a"}, headers=OPS)
                await running.client.post("/classify", headers={"X-API-Key": "guessed-secret"})
        assert [line.get("key") for line in lines] == ["web", "ops", None]
        assert "secret" not in json.dumps(lines)

    async def test_refused_admin_requests_are_always_logged(self, model_store: Path) -> None:
        async with service(model_store, models=[TOPICS], keys=KEYS, access_log=0.0) as running:
            with capture_logs() as lines:
                for path, headers in (
                    ("/models/topics/load", {}),
                    ("/models/topics/unload", {"X-API-Key": "guessed-secret"}),
                    ("/settings/reload", WEB),
                    ("/v2/repository/models/topics/load", WEB),
                    ("/v2/repository/models/nothing/unload", OPS),
                    ("/models/nothing/load", OPS),
                ):
                    await running.client.post(path, headers=headers)
                await running.client.post("/classify", json={"input": "a"})
                await running.client.get("/v2/health/ready")
                await running.client.post("/models/topics/load", headers=OPS)
        requests = [line for line in lines if line["event"] == "request"]
        logged = [line for line in requests if line["log_level"] == "info"]
        assert [(one["route"], one["status"], one.get("key")) for one in logged] == [
            ("/models/{name}/load", 401, None),
            ("/models/{name}/unload", 401, None),
            ("/settings/reload", 403, "web"),
            ("/v2/repository/models/{name}/load", 403, "web"),
            ("/v2/repository/models/{name}/unload", 404, "ops"),
            ("/models/{name}/load", 404, "ops"),
        ]
        assert {one["client"] for one in logged} == {"127.0.0.1"}
        assert "secret" not in json.dumps(lines)


class TestBrowsers:
    @pytest.mark.parametrize(
        ("method", "path", "status"),
        [
            ("GET", "/", 200),
            ("GET", "/health/live", 200),
            ("GET", "/metrics", 200),
            ("GET", "/nowhere", 404),
            ("GET", "/classify", 405),
            ("POST", "/classify", 401),
            ("GET", "/docs", 200),
        ],
    )
    async def test_every_answer_has_the_security_headers(
        self, locked: Service, method: str, path: str, status: int
    ) -> None:
        response = await locked.client.request(method, path)
        assert response.status_code == status
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"
        assert response.headers["x-frame-options"] == "DENY"
        assert "strict-transport-security" not in response.headers

    async def test_answers_over_tls_have_strict_transport_security(self, locked: Service) -> None:
        response = await locked.client.get("https://service/health/live")
        assert response.headers["strict-transport-security"].startswith("max-age=")

    async def test_without_cors_origins_answers_have_no_cors_headers(self, locked: Service) -> None:
        for method in ("GET", "OPTIONS"):
            response = await locked.client.request(
                method,
                "/classify",
                headers={"Origin": "https://a.example", "Access-Control-Request-Method": "POST"},
            )
            assert not [name for name in response.headers if name.startswith("access-control")]

    async def test_only_a_configured_origin_is_allowed(self, model_store: Path) -> None:
        origins = ["https://a.example"]
        async with service(
            model_store, models=[TOPICS], keys=KEYS, cors_origins=origins
        ) as running:
            preflight_headers = {"Access-Control-Request-Method": "POST", "Origin": origins[0]}
            preflight_headers["Access-Control-Request-Headers"] = "authorization,content-type"
            preflight = await running.client.options("/classify", headers=preflight_headers)
            assert preflight.status_code == 200
            assert preflight.headers["access-control-allow-origin"] == origins[0]
            assert "access-control-allow-credentials" not in preflight.headers
            other = await running.client.options(
                "/classify", headers=preflight_headers | {"Origin": "https://b.example"}
            )
            assert "access-control-allow-origin" not in other.headers
            answer = await running.client.post(
                "/classify", json={"input": "a"}, headers=WEB | {"Origin": origins[0]}
            )
            assert answer.headers["access-control-allow-origin"] == origins[0]


async def test_openapi_states_which_routes_require_a_key(locked: Service) -> None:
    document = locked.app.openapi()
    open_routes = {
        (method.upper(), path)
        for path, methods in document["paths"].items()
        for method, route in methods.items()
        if not route.get("security")
    }
    assert open_routes == OPEN
    assert set(document["components"]["securitySchemes"]) == {"bearer", "header"}


def test_a_line_of_the_key_file_holds_no_secret() -> None:
    assert "secret" not in key_line("web", key("classify-secret"))


@pytest.mark.parametrize(
    "name", ["%2e%2e", "..%2f..", "%2fetc", "a%00b", "x" * 300, ".hidden", "%ff", "a%0ab"]
)
@pytest.mark.parametrize("path", ["/models/{}/load", "/v2/repository/models/{}/load"])
async def test_no_model_name_leads_out_of_the_store(
    model_store: Path, tmp_path: Path, path: str, name: str
) -> None:
    store = tmp_path / "outer" / "store"
    store.mkdir(parents=True)
    shutil.copytree(model_store / TOPICS / "1", tmp_path / "outer" / "1")
    async with service(store, engines=0, default_model=None) as running:
        response = await running.client.post(
            path.format(name), headers={"X-API-Key": "open-sesame"}
        )
        assert response.status_code == 404, response.text


async def test_a_link_out_of_the_store_is_not_loaded(model_store: Path, tmp_path: Path) -> None:
    (tmp_path / TOPICS).mkdir()
    (tmp_path / TOPICS / "1").symlink_to(model_store / TOPICS / "1")
    async with service(tmp_path, engines=0, default_model=None) as running:
        response = await running.client.post(
            f"/models/{TOPICS}/load", headers={"X-API-Key": "open-sesame"}
        )
        error_of(response, 422, "broken_checkpoint")
        assert "is a link to a folder outside the store" in response.text
