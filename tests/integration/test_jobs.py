"""Jobs with real engines: results, interruptions, refusals, keys, sources, the client."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import httpx
import msgspec
import psutil
import pytest
import pytest_asyncio
from fsspec.implementations.memory import MemoryFileSystem
from structlog.testing import capture_logs

from budgetformer.client import AsyncClient, InputError, ServerError
from budgetformer.tables import Row
from service.job_store import JobProgress, JobStore
from service.jobs import runner
from service.keys import Key, digest
from tests.support.serving import ADMIN, Service, error_of, held, job_process, poison, service
from tests.support.stores import PAIRS, TOPICS, labelled_sentences
from tests.support.waiting import until

ROWS: list[Row] = [(f"{text} {i}", None) for i, (text, _) in enumerate(labelled_sentences() * 2)]
KINDS = ("csv", "jsonl", "parquet")
TYPES = {
    "csv": "text/csv",
    "jsonl": "application/x-ndjson",
    "parquet": "application/vnd.apache.parquet",
}
COUNTS = ("budget", "heads", "macs", "dense_macs", "tokens")


def table_bytes(rows: list[Row], kind: str) -> bytes:
    """Return rows as the content of a file."""
    columns = [{"text": a} if b is None else {"text": a, "text_pair": b} for a, b in rows]
    if kind == "jsonl":
        return b"".join(json.dumps(row).encode() + b"\n" for row in columns)
    if kind == "csv":
        file = io.StringIO(newline="")
        table = csv.DictWriter(file, list(columns[0]))
        table.writeheader()
        table.writerows(columns)
        return file.getvalue().encode()
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    parquet.write_table(pa.Table.from_pylist(columns), sink)
    return bytes(sink.getvalue())


def rows_of_result(content: bytes, kind: str) -> list[dict[str, Any]]:
    """Return the rows of a result, with numbers parsed."""
    if kind == "jsonl":
        return [json.loads(line) for line in content.splitlines()]
    if kind == "parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        return list(parquet.read_table(io.BytesIO(content)).to_pylist())
    table = csv.DictReader(io.StringIO(content.decode(), newline=""))
    return [
        row
        | {name: int(row[name]) for name in COUNTS}
        | {name: json.loads(row[name]) for name in ("probs", "steps")}
        | {"error": row["error"] or None}
        for row in table
    ]


async def submit_upload(
    client: httpx.AsyncClient, content: bytes, kind: str = "jsonl", **options: Any
) -> dict[str, Any]:
    """Submit a job and return it."""
    response = await client.post(
        "/jobs", content=content, headers={"content-type": TYPES[kind]}, params=options
    )
    assert response.status_code == 202, response.text
    job = dict(response.json())
    assert response.headers["location"] == f"/jobs/{job['id']}"
    return job


async def show(client: httpx.AsyncClient, job: dict[str, Any]) -> dict[str, Any]:
    response = await client.get(f"/jobs/{job['id']}")
    assert response.status_code == 200, response.text
    return dict(response.json())


async def wait_until_ended(client: httpx.AsyncClient, job: dict[str, Any]) -> dict[str, Any]:
    """Wait until a job has ended, and return it."""
    found: dict[str, Any] = {}

    async def over() -> bool:
        found.update(await show(client, job))
        return found["status"] not in ("queued", "running")

    await until(over, "the end of the job")
    return found


async def head_of_result(client: httpx.AsyncClient, job: dict[str, Any]) -> httpx.Headers:
    response = await client.head(f"/jobs/{job['id']}/result")
    assert (response.status_code, response.content) == (200, b"")
    return response.headers


async def result(client: httpx.AsyncClient, job: dict[str, Any]) -> bytes:
    response = await client.get(f"/jobs/{job['id']}/result")
    assert response.status_code == 200, response.text
    return response.content


@pytest_asyncio.fixture
async def running(model_store: Path, tmp_path: Path) -> AsyncIterator[Service]:
    """Return a service that runs jobs."""
    options: dict[str, Any] = {"models": [TOPICS, PAIRS], "quality_floor": "balanced"}
    async with (
        service(model_store, fronts=2, state_dir=tmp_path / "state", **options) as running,
        job_process(running),
    ):
        yield running


@pytest_asyncio.fixture
async def idle(store: Path, tmp_path: Path) -> AsyncIterator[Service]:
    """Return a service without a job process, on a store that the test may change."""
    async with service(
        store, models=["topics:2"], state_dir=tmp_path / "state", quality_floor="balanced"
    ) as running:
        yield running


class TestResults:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("format", KINDS)
    async def test_results_equal_the_answers_of_classify(
        self, running: Service, kind: str, format: str
    ) -> None:
        client = running.client
        job = await submit_upload(
            client, table_bytes(ROWS, kind), kind, format=format, quality="best"
        )
        assert (job["status"], job["input"], job["format"]) == ("queued", kind, format)
        job = await wait_until_ended(client, job)
        assert (job["status"], job["rows"], job["failed_rows"]) == ("finished", len(ROWS), 0)
        rows = rows_of_result(await result(client, job), format)
        assert [row["text"] for row in rows] == [text for text, _ in ROWS]
        expected = (await running.answer([t for t, _ in ROWS], quality="best"))["data"]
        for row, item in zip(rows, expected, strict=True):
            assert row["label"] == item["label"]
            assert row["probs"] == pytest.approx(item["probs"], rel=1e-4, abs=1e-6)
            assert row["steps"] == item["heads"]["steps"]
            assert (row["heads"], row["macs"]) == (item["heads"]["used"], item["macs"])
            assert (row["tokens"], row["error"]) == (item["tokens"], None)
        assert sum(job["labels"].values()) == len(ROWS)
        assert job["mean_heads"] == pytest.approx(sum(r["heads"] for r in rows) / len(rows))
        assert job["macs_share"] == pytest.approx(
            sum(row["macs"] for row in rows) / sum(row["dense_macs"] for row in rows)
        )
        assert job["read_share"] == 1
        assert job["rows_per_second"] > 0

    async def test_jobs_can_classify_pairs(self, running: Service) -> None:
        rows: list[Row] = [(a, b) for (a, _), (b, _) in zip(ROWS, ROWS[1:], strict=False)]
        job = await submit_upload(running.client, table_bytes(rows, "csv"), "csv", model=PAIRS)
        await wait_until_ended(running.client, job)
        found = rows_of_result(await result(running.client, job), "csv")
        assert [(row["text"], row["text_pair"]) for row in found] == rows
        (item,) = (
            await running.answer([{"text": rows[7][0], "text_pair": rows[7][1]}], model=PAIRS)
        )["data"]
        assert found[7]["label"] == item["label"]

    @pytest.mark.parametrize("how", ["raise", "nan"])
    async def test_a_failed_text_has_an_error_and_others_have_answers(
        self, running: Service, how: str
    ) -> None:
        long = "The otter " + "slept " * 20
        texts = [*(text for text, _ in ROWS[:20]), long, *(text for text, _ in ROWS[20:40])]
        tokens = (await running.item(long, heads=1))["tokens"]
        assert tokens not in {item["tokens"] for item in (await running.answer(texts[:20]))["data"]}
        network = running.core.models[TOPICS, 2].network
        with poison(network, tokens, how):
            content = table_bytes([(text, None) for text in texts], "jsonl")
            job = await submit_upload(running.client, content, heads=1, format="csv")
            job = await wait_until_ended(running.client, job)
        assert (job["status"], job["rows"], job["failed_rows"]) == ("finished", 41, 1)
        table = list(csv.DictReader(io.StringIO((await result(running.client, job)).decode())))
        assert [row["text"] for row in table] == texts
        assert [place for place, row in enumerate(table) if row["error"]] == [20]
        assert table[20]["label"] == ""
        assert all(row["label"] for place, row in enumerate(table) if place != 20)

    async def test_a_too_long_text_has_an_error_and_others_have_answers(
        self, running: Service
    ) -> None:
        most = running.app.state.shared.settings.max_text_characters
        job = await submit_upload(
            running.client, table_bytes([("a fox", None), ("x" * (most + 1), None)], "jsonl")
        )
        await wait_until_ended(running.client, job)
        short, long = rows_of_result(await result(running.client, job), "jsonl")
        assert short["label"]
        assert f"at most {most}" in long["error"]

    async def test_an_unreadable_row_fails_the_job_by_its_number(self, running: Service) -> None:
        content = table_bytes(ROWS[:100], "jsonl") + b'{"text": 7}\n'
        job = await wait_until_ended(running.client, await submit_upload(running.client, content))
        assert job["status"] == "failed"
        assert job["rows"] <= 100
        assert (
            job["error"]
            == "input.jsonl, row 101 (line 101): column 'text' holds an integer, not a string"
        )
        response = await running.client.get(f"/jobs/{job['id']}/result")
        assert "row 101" in error_of(response, 409, "no_result")["message"]


class TestInterruptedJobs:
    @pytest.mark.parametrize("cut", [0, 1, 30, -1])
    async def test_a_job_continues_after_its_last_complete_line(
        self, idle: Service, cut: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(runner, "REPORT_SECONDS", 0.01)
        store = JobStore(idle.app.state.shared.settings.state_dir)
        whole = await submit_upload(idle.client, table_bytes(ROWS, "jsonl"))
        async with job_process(idle):
            await wait_until_ended(idle.client, whole)
        answers = (await result(idle.client, whole)).splitlines(keepends=True)
        job = await submit_upload(idle.client, table_bytes(ROWS, "jsonl"))
        stored = store.get(job["id"])
        assert stored is not None
        head = {
            "model": "topics:2", "quality": "balanced", "heads": None, "precision": "auto",
            "weights": idle.app.state.shared.models.get(None).checkpoint.manifest.files[
                "model.safetensors"
            ].sha256,
        }  # fmt: skip
        part = stored.folder / "result.jsonl.part"
        torn = b"".join(answers[:50]) + answers[50][:cut]
        part.write_bytes(json.dumps(head).encode() + b"\n" + torn)
        async with job_process(idle):
            job = await wait_until_ended(idle.client, job)
        assert job["status"] == "finished", job
        assert (job["rows"], job["labels"]) == (
            len(ROWS),
            (await show(idle.client, whole))["labels"],
        )
        again = rows_of_result(await result(idle.client, job), "jsonl")
        assert [row["text"] for row in again] == [text for text, _ in ROWS]
        assert [row["label"] for row in again] == [json.loads(line)["label"] for line in answers]

    async def test_a_job_with_a_complete_result_is_finished(self, idle: Service) -> None:
        job = await submit_upload(idle.client, table_bytes(ROWS, "jsonl"))
        async with job_process(idle):
            await wait_until_ended(idle.client, job)
        stored = JobStore(idle.app.state.shared.settings.state_dir).get(job["id"])
        assert stored is not None
        progress = stored.progress()
        stored.write_progress(msgspec.structs.replace(progress, status="running", ended=None))
        async with job_process(idle):
            job = await wait_until_ended(idle.client, job)
        assert (job["status"], job["rows"]) == ("finished", len(ROWS))

    async def test_a_job_fails_if_its_model_was_replaced(self, idle: Service) -> None:
        job = await submit_upload(idle.client, table_bytes(ROWS, "jsonl"), model="topics:2")
        loaded = await idle.client.post("/models/topics/load", json={"version": 1}, headers=ADMIN)
        assert loaded.status_code == 200
        async with job_process(idle):
            job = await wait_until_ended(idle.client, job)
        assert job["status"] == "failed"
        assert "topics:2, for which the job was accepted, is not served" in job["error"]
        assert "version 1" in job["error"]

    async def test_a_job_that_ended_its_process_5_times_fails(self, idle: Service) -> None:
        job = await submit_upload(idle.client, table_bytes(ROWS, "jsonl"))
        stored = JobStore(idle.app.state.shared.settings.state_dir).get(job["id"])
        assert stored is not None
        stored.write_progress(JobProgress(status="running", starts=runner.MAX_STARTS))
        async with job_process(idle):
            job = await wait_until_ended(idle.client, job)
        assert job["status"] == "failed"
        assert "5 times without an answer" in job["error"]

    async def test_a_job_is_repeated_until_its_progress_can_be_written(self, idle: Service) -> None:
        job = await submit_upload(idle.client, table_bytes(ROWS[:5], "jsonl"))
        stored = JobStore(idle.app.state.shared.settings.state_dir).get(job["id"])
        assert stored is not None
        blocked = stored.folder / "progress.json"
        blocked.mkdir()
        (blocked / "in the way").touch()

        async def reported() -> bool:
            errors = (await idle.client.get("/health")).json()["errors"]
            return any("IsADirectoryError" in error for error in errors)

        async with job_process(idle):
            await until(reported, "the problem in /health")
            (blocked / "in the way").unlink()
            blocked.rmdir()
            assert (await wait_until_ended(idle.client, job))["status"] == "finished"

        async def solved() -> bool:
            return not await reported()

        await until(solved, "the end of the problem")

    async def test_a_normal_end_of_the_process_is_not_counted_as_a_failed_start(
        self, idle: Service
    ) -> None:
        job = await submit_upload(idle.client, table_bytes(ROWS, "jsonl"), heads=1)
        stored = JobStore(idle.app.state.shared.settings.state_dir).get(job["id"])
        assert stored is not None
        with held(idle.core):
            async with job_process(idle):
                await until(lambda: stored.progress().starts == 1, "the start of the job")
                await until(lambda: idle.in_flight() > 0, "its first texts in the engine")
        assert stored.progress().starts == 0
        assert stored.progress().status == "running"


async def test_jobs_run_in_order_and_deleted_ones_leave_nothing(
    running: Service,
) -> None:
    client = running.client
    with held(running.core), capture_logs() as lines:
        first = await submit_upload(client, table_bytes(ROWS, "jsonl"), heads=1)
        second = await submit_upload(client, table_bytes(ROWS[:3], "jsonl"))
        await until(lambda: running.in_flight() > 0, "the first job in the engine")
        assert (await show(client, first))["status"] == "running"
        assert (await show(client, second))["status"] == "queued"
        listed = (await client.get("/jobs")).json()["data"]
        assert [job["id"] for job in listed] == [second["id"], first["id"]]
        response = await client.delete(f"/jobs/{first['id']}")
        assert (response.status_code, response.json()["status"]) == (200, "cancelled")
        error_of(await client.get(f"/jobs/{first['id']}"), 404, "unknown_job")
        await until(lambda: "job cancelled" in [line["event"] for line in lines], "its end")
        assert [line for line in lines if line["log_level"] == "error"] == []
    assert (await wait_until_ended(client, second))["status"] == "finished"
    response = await client.delete(f"/jobs/{second['id']}")
    assert response.json()["status"] == "finished"
    assert (await client.get("/jobs")).json() == {"object": "list", "data": []}
    assert list((running.app.state.shared.settings.state_dir / "jobs").iterdir()) == []


async def test_every_frontend_serves_every_job(running: Service) -> None:
    (other,) = running.other_clients
    job = await submit_upload(running.client, table_bytes(ROWS[:10], "csv"), "csv")
    assert (await wait_until_ended(other, job))["rows"] == 10
    content = await result(other, job)
    assert content == await result(running.client, job)
    headers = await head_of_result(other, job)
    assert headers["content-length"] == str(len(content))
    assert headers["content-disposition"] == f'attachment; filename="{job["id"]}.csv"'


@pytest.mark.parametrize("headers", [{}, {"range": "bytes=0-33554431"}])
async def test_a_head_request_does_not_read_the_result(
    running: Service, headers: dict[str, str]
) -> None:
    job = await submit_upload(running.client, table_bytes(ROWS[:10], "csv"), "csv")
    await wait_until_ended(running.client, job)
    jobs = running.app.state.shared.settings.state_dir / "jobs"
    os.truncate(jobs / job["id"] / "result.csv", 2**26)
    before = psutil.Process().io_counters().read_chars
    response = await running.client.head(f"/jobs/{job['id']}/result", headers=headers)
    assert psutil.Process().io_counters().read_chars - before < 2**20
    assert (response.status_code, response.content) == (200, b"")
    assert response.headers["content-length"] == str(2**26)


async def test_a_small_result_has_the_same_size_in_a_head_request(running: Service) -> None:
    job = await submit_upload(running.client, table_bytes(ROWS[:30], "csv"), "csv")
    await wait_until_ended(running.client, job)
    sizes = [
        (await running.client.request(method, f"/jobs/{job['id']}/result")).headers[
            "content-length"
        ]
        for method in ("GET", "HEAD")
    ]
    assert sizes[0] == sizes[1]
    assert int(sizes[0]) > 4096, "large enough to be compressed"


async def test_metrics_count_the_rows_of_a_job(running: Service) -> None:
    before = await running.scrape()
    job = await submit_upload(running.client, table_bytes(ROWS, "jsonl"), quality="best")
    await wait_until_ended(running.client, job)
    names = ("job_rows_total", "key_texts_total", "items_total")

    async def counted() -> bool:
        after = await running.scrape()
        return {after.minus(before, name) for name in names} == {len(ROWS)}

    await until(counted, "the counts of the job")
    after = await running.scrape()
    assert after.total("items_total", model=TOPICS) == len(ROWS)
    assert after.total("key_texts_total", key="anonymous") == len(ROWS)
    assert after.minus(before, "stage_duration_seconds_count") == 0
    assert after.total("fronts") == 2
    assert after.total("requests_total", route="/jobs", outcome="ok") == 1


class TestRefusals:
    async def post(self, running: Service, content: bytes = b"text\na\n", **how: Any) -> Any:
        kind = how.pop("kind", "text/csv")
        headers = how.pop("headers", {}) | ({"content-type": kind} if kind else {})
        return await running.client.post("/jobs", content=content, headers=headers, params=how)

    @pytest.mark.parametrize("kind", ["", "text/plain", "application/octet-stream"])
    async def test_other_media_types_are_refused(self, idle: Service, kind: str) -> None:
        error_of(await self.post(idle, kind=kind), 415, "unsupported_media_type")

    async def test_compressed_uploads_are_refused(self, idle: Service) -> None:
        response = await self.post(idle, headers={"content-encoding": "gzip"})
        error_of(response, 415, "unsupported_media_type")

    @pytest.mark.parametrize(
        ("options", "status", "code", "param"),
        [
            ({"model": "nobody"}, 404, "unknown_model", "model"),
            ({"model": "topics:1"}, 404, "unknown_model", "model"),
            ({"quality": "superb"}, 422, "invalid_field", "quality"),
            ({"quality": "101"}, 422, "invalid_field", "quality"),
            ({"quality": "nan"}, 422, "invalid_field", "quality"),
            ({"heads": "99"}, 422, "invalid_field", "heads"),
            ({"heads": "-1"}, 422, "invalid_field", "heads"),
            ({"heads": "many"}, 422, "invalid_field", "heads"),
            ({"format": "xlsx"}, 422, "invalid_field", "format"),
            ({"formta": "csv"}, 422, "unknown_field", "formta"),
        ],
    )
    async def test_invalid_options_are_refused(
        self, idle: Service, options: dict[str, str], status: int, code: str, param: str
    ) -> None:
        error_of(await self.post(idle, **options), status, code, param)
        assert not (idle.app.state.shared.settings.state_dir).exists()

    async def test_empty_files_are_refused(self, idle: Service) -> None:
        error_of(await self.post(idle, b""), 400, "invalid_shape")
        assert list((idle.app.state.shared.settings.state_dir / "jobs").iterdir()) == []

    async def test_too_large_uploads_are_refused(self, model_store: Path, tmp_path: Path) -> None:
        async with service(
            model_store, models=[TOPICS], state_dir=tmp_path, max_job_bytes=1000, max_body_bytes=100
        ) as running:
            error_of(await self.post(running, b"text\n" + b"x" * 1000), 413, "body_too_large")

            async def parts() -> AsyncIterator[bytes]:
                for _ in range(11):
                    yield b"x" * 100

            response = await running.client.post(
                "/jobs", content=parts(), headers={"content-type": "text/csv"}
            )
            error_of(response, 413, "body_too_large")
            assert list((tmp_path / "jobs").iterdir()) == []
            assert (await self.post(running, b"text\n" + b"x" * 990)).status_code == 202

    async def test_the_number_and_size_of_jobs_are_limited(
        self, model_store: Path, tmp_path: Path
    ) -> None:
        async with service(
            model_store, models=[TOPICS], state_dir=tmp_path, max_jobs=2, max_jobs_bytes=3000
        ) as running:
            assert (await self.post(running, b"text\n" + b"x" * 2000)).status_code == 202
            error_of(await self.post(running, b"text\n" + b"x" * 2000), 429, "too_many_jobs")
            assert (await self.post(running)).status_code == 202
            error_of(await self.post(running), 429, "too_many_jobs")

    @pytest.mark.parametrize(
        "job", ["0" * 32, "..%2f" + "0" * 32, "%2e%2e", "jobs", "%00", "0" * 31 + "%0a"]
    )
    @pytest.mark.parametrize("method", ["GET", "DELETE"])
    async def test_unknown_and_invalid_ids_are_refused(
        self, idle: Service, job: str, method: str
    ) -> None:
        await submit_upload(idle.client, b'{"text": "a"}\n')
        url = httpx.URL(f"http://service/jobs/{job}")
        response = await idle.client.request(method, url)
        assert response.status_code in (404, 405)
        error_of(response, response.status_code)
        assert len((await idle.client.get("/jobs")).json()["data"]) == 1

    async def test_a_queued_job_has_no_result(self, idle: Service) -> None:
        job = await submit_upload(idle.client, b'{"text": "a"}\n')
        response = await idle.client.get(f"/jobs/{job['id']}/result")
        assert "queued" in error_of(response, 409, "no_result")["message"]

    async def test_jobs_are_not_supported_on_a_cluster(
        self, model_store: Path, tmp_path: Path
    ) -> None:
        async with service(
            model_store, models=[TOPICS], state_dir=tmp_path, cluster=True
        ) as running:
            message = error_of(await self.post(running), 501, "not_supported")["message"]
            assert "Ray" in message

    async def test_an_unwritable_state_folder_only_prevents_jobs(
        self, model_store: Path, tmp_path: Path
    ) -> None:
        blocked = tmp_path / "file"
        blocked.write_text("this is no folder")
        async with service(model_store, models=[TOPICS], state_dir=blocked / "state") as running:
            message = error_of(await self.post(running), 503, "jobs_unavailable")["message"]
            assert message == "the server cannot store jobs: Not a directory; try again later"

            async def reported() -> bool:
                errors = (await running.client.get("/health")).json()["errors"]
                return errors == [f"{blocked}/state/jobs cannot be written: Not a directory"]

            await until(reported, "the problem in /health")
            assert (await running.client.get("/health")).status_code == 200
            assert (await running.client.get("/jobs")).json()["data"] == []
            await running.item("A choir rehearsed.")
            blocked.unlink()
            assert (await self.post(running)).status_code == 202

            async def forgotten() -> bool:
                return (await running.client.get("/health")).json()["errors"] == []

            await until(forgotten, "the end of the problem")


class TestKeys:
    SECRETS = {"one": "secret-one", "two": "secret-two", "reader": "secret-reader"}

    @pytest_asyncio.fixture
    async def keyed(self, model_store: Path, tmp_path: Path) -> AsyncIterator[Service]:
        scopes = {"one": {"jobs"}, "two": {"jobs", "classify"}, "reader": {"classify"}}
        keys = {
            name: Key.model_validate({"sha256": digest(secret.encode()), "scopes": scopes[name]})
            for name, secret in self.SECRETS.items()
        }
        async with service(model_store, models=[TOPICS], keys=keys, state_dir=tmp_path) as running:
            yield running

    async def ask(self, running: Service, method: str, path: str, name: str, **how: Any) -> Any:
        key = {"x-api-key": self.SECRETS[name]} if name != "admin" else ADMIN
        headers = key | {"content-type": "text/csv"}
        return await running.client.request(method, path, headers=headers, **how)

    async def test_keys_only_see_their_own_jobs_but_admin_sees_all(self, keyed: Service) -> None:
        ids = {}
        for name in ("one", "two", "admin"):
            response = await self.ask(keyed, "POST", "/jobs", name, content=b"text\na\n")
            assert response.status_code == 202
            ids[name] = response.json()["id"]
        for name, seen in (("one", ["one"]), ("two", ["two"]), ("admin", ["admin", "two", "one"])):
            listed = (await self.ask(keyed, "GET", "/jobs", name)).json()["data"]
            assert [job["id"] for job in listed] == [ids[own] for own in seen]
        for method, path in (("GET", ""), ("GET", "/result"), ("DELETE", "")):
            response = await self.ask(keyed, method, f"/jobs/{ids['one']}{path}", "two")
            error_of(response, 404, "unknown_job")
        assert (await self.ask(keyed, "DELETE", f"/jobs/{ids['one']}", "one")).status_code == 200
        assert (await self.ask(keyed, "DELETE", f"/jobs/{ids['two']}", "admin")).status_code == 200

    async def test_jobs_require_the_jobs_scope(self, keyed: Service) -> None:
        response = await self.ask(keyed, "POST", "/jobs", "reader", content=b"text\na\n")
        error_of(response, 403, "missing_scope")
        error_of(await keyed.client.get("/jobs"), 401, "no_key")


class _S3(MemoryFileSystem):
    """An object store in this process: fsspec's own, under the scheme of S3."""

    protocol = "s3"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("s3://").strip("/")


class TestSources:
    @pytest_asyncio.fixture
    async def file_server(self) -> AsyncIterator[tuple[str, dict[str, bytes]]]:
        """Return the address of a file server, and its files by path."""
        files: dict[str, bytes] = {}

        async def serve(reader: Any, writer: Any) -> None:
            path = (await reader.readuntil(b"\r\n\r\n")).split(b" ")[1].decode()
            found = files.get(path.partition("?")[0])
            if path == "/texts/moved.csv":
                writer.write(b"HTTP/1.1 302 Found\r\nLocation: /secret.csv\r\n")
            else:
                writer.write(b"HTTP/1.1 200 OK\r\n" if found else b"HTTP/1.1 404 Not Found\r\n")
            writer.write(b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(found or b""))
            writer.write(found or b"")
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", files

    @pytest.fixture
    def bucket(self) -> Iterator[_S3]:
        """Return an object store, which fsspec opens for URLs that begin with s3://."""
        fsspec.register_implementation("s3", _S3, clobber=True)
        yield _S3()
        _S3.store.clear()

    @pytest_asyncio.fixture
    async def sourced(
        self, model_store: Path, tmp_path: Path, file_server: tuple[str, dict[str, bytes]]
    ) -> AsyncIterator[Service]:
        sources = [f"{file_server[0]}/texts/", "s3://bucket/texts/"]
        async with (
            service(
                model_store, models=[TOPICS], state_dir=tmp_path, job_sources=sources,
                max_job_bytes=100_000,
            ) as running,
            job_process(running),
        ):  # fmt: skip
            yield running

    async def submit(self, running: Service, source: str, **more: Any) -> Any:
        return await running.client.post("/jobs", json={"source": source, **more})

    async def test_a_source_is_read_like_an_upload(
        self, sourced: Service, file_server: tuple[str, dict[str, bytes]]
    ) -> None:
        address, files = file_server
        files["/texts/a.csv"] = table_bytes(ROWS, "csv")
        response = await self.submit(sourced, f"{address}/texts/a.csv?signature=x", format="jsonl")
        assert response.status_code == 202
        job = await wait_until_ended(sourced.client, response.json())
        assert (job["status"], job["source"]) == ("finished", f"{address}/texts/a.csv")
        rows = rows_of_result(await result(sourced.client, job), "jsonl")
        assert [row["text"] for row in rows] == [text for text, _ in ROWS]

    @pytest.mark.parametrize("kind", KINDS)
    async def test_are_read_from_an_object_store(
        self, sourced: Service, bucket: _S3, kind: str
    ) -> None:
        bucket.pipe_file(f"/bucket/texts/day.{kind}", table_bytes(ROWS, kind))
        source = f"s3://bucket/texts/day.{kind}"
        response = await self.submit(sourced, source, format="jsonl")
        assert response.status_code == 202
        job = await wait_until_ended(sourced.client, response.json())
        assert (job["status"], job["source"], job["input"]) == ("finished", source, kind)
        rows = rows_of_result(await result(sourced.client, job), "jsonl")
        assert [row["text"] for row in rows] == [text for text, _ in ROWS]

    @pytest.mark.parametrize(
        ("name", "why"),
        [
            ("missing.csv", "no such file"),
            ("folder.csv", "a folder, not a file"),
            ("large.csv", "larger than 100000 bytes"),
        ],
    )
    async def test_that_an_object_store_lacks_fail_the_job(
        self, sourced: Service, bucket: _S3, name: str, why: str
    ) -> None:
        bucket.pipe_file("/bucket/texts/folder.csv/a.csv", table_bytes(ROWS, "csv"))
        bucket.pipe_file("/bucket/texts/large.csv", b"text\n" + b"x" * 100_000)
        response = await self.submit(sourced, f"s3://bucket/texts/{name}")
        job = await wait_until_ended(sourced.client, response.json())
        assert job["status"] == "failed"
        assert why in job["error"]
        assert f"s3://bucket/texts/{name}" in job["error"]

    async def test_in_other_buckets_are_refused(self, sourced: Service) -> None:
        for source in ("s3://other/texts/a.csv", "s3://bucket/a.csv", "gs://bucket/texts/a.csv"):
            error_of(await self.submit(sourced, source), 422, "source_not_allowed", "source")

    @pytest.mark.parametrize(
        ("name", "why"),
        [("missing.csv", "404"), ("moved.csv", "302"), ("large.csv", "larger than 100000 bytes")],
    )
    async def test_an_unreadable_source_fails_the_job(
        self, sourced: Service, file_server: tuple[str, dict[str, bytes]], name: str, why: str
    ) -> None:
        address, files = file_server
        files["/secret.csv"] = table_bytes(ROWS, "csv")
        files["/texts/large.csv"] = b"text\n" + b"x" * 100_000
        response = await self.submit(sourced, f"{address}/texts/{name}")
        job = await wait_until_ended(sourced.client, response.json())
        assert job["status"] == "failed"
        assert why in job["error"]

    @pytest.mark.parametrize(
        "path",
        ["/secret.csv", "/texts/../secret.csv", "/texts/%2e%2e/secret.csv", "/textsecret.csv"],
    )
    async def test_sources_outside_the_allowed_prefix_are_refused(
        self, sourced: Service, file_server: tuple[str, dict[str, bytes]], path: str
    ) -> None:
        error_of(await self.submit(sourced, file_server[0] + path), 422, None, "source")

    @pytest.mark.parametrize("source", ["/etc/passwd", "file:///etc/hosts.csv", "input.csv"])
    async def test_files_of_the_server_are_refused_as_sources(
        self, sourced: Service, source: str
    ) -> None:
        error_of(await self.submit(sourced, source), 422, "invalid_field", "source")

    async def test_the_address_of_a_source_must_state_its_format(
        self, sourced: Service, file_server: tuple[str, dict[str, bytes]]
    ) -> None:
        response = await self.submit(sourced, f"{file_server[0]}/texts/a.xlsx")
        assert ".parquet" in error_of(response, 422, "invalid_field", "source")["message"]

    async def test_sources_are_refused_unless_configured(self, idle: Service) -> None:
        response = await self.submit(idle, "https://data.example/a.csv")
        error_of(response, 422, "source_not_allowed", "source")


class TestAsyncClient:
    async def test_the_client_submits_follows_and_saves_a_job(
        self, running: Service, tmp_path: Path
    ) -> None:
        file, output = tmp_path / "texts.csv", tmp_path / "answers.jsonl"
        file.write_bytes(table_bytes(ROWS, "csv"))
        client = AsyncClient("http://service", http=running.client)
        job = await client.submit_job(file, format="jsonl", quality="best")
        seen: list[dict[str, Any]] = []
        last = await client.follow_job(job["id"], seen.append)
        assert last["rows"] == len(ROWS)
        assert seen[-1] == last == await client.job(job["id"])
        await client.save_job_result(job["id"], output)
        assert len(output.read_bytes().splitlines()) == len(ROWS)
        assert [one["id"] for one in await client.jobs()] == [job["id"]]
        assert (await client.cancel_job(job["id"]))["status"] == "finished"
        with pytest.raises(ServerError, match="no such job"):
            await client.save_job_result(job["id"], tmp_path / "none.jsonl")
        assert sorted(tmp_path.iterdir()) == [output, tmp_path / "state", file]

    async def test_the_client_refuses_other_files_and_unreachable_sources(
        self, running: Service, tmp_path: Path
    ) -> None:
        client = AsyncClient("http://service", http=running.client)
        with pytest.raises(InputError, match="not a .parquet"):
            await client.submit_job(tmp_path / "texts.xlsx")
        with pytest.raises(InputError, match="No such file"):
            await client.submit_job(tmp_path / "texts.csv")
        with pytest.raises(ServerError, match="job_sources"):
            await client.submit_job("https://data.example/a.csv")
