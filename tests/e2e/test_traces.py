"""Traces of a real server, exported to a collector over OTLP/HTTP."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.support.processes import COMMAND, clean_environment, free_port, server

pytestmark = pytest.mark.timeout(300)

TRACE = bytes.fromhex("0af7651916cd43dd8448eb211c80319c")
TRACEPARENT = f"00-{TRACE.hex()}-b7ad6b7169203331-01"


class Collector:
    """Keeps all received spans with the names of their processes."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, Any]] = []
        self.url = ""

    def take(self, body: bytes) -> None:
        """Keep the spans of one export."""
        for group in ExportTraceServiceRequest.FromString(body).resource_spans:
            named = {a.key: a.value.string_value for a in group.resource.attributes}
            assert named["service.name"] == "shop-classifier"
            process = named["budgetformer.process"]
            self.spans += [(process, span) for part in group.scope_spans for span in part.spans]


@contextmanager
def collecting() -> Iterator[Collector]:
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:  # noqa: N802
            assert self.path == "/v1/traces"
            collector.take(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Stay silent."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        collector.url = f"http://127.0.0.1:{listening.server_port}"
        serving = threading.Thread(target=listening.serve_forever)
        serving.start()
        try:
            yield collector
        finally:
            listening.shutdown()
            serving.join()


def test_a_trace_has_the_spans_of_all_processes_until_the_end(
    model_store: Path, tmp_path: Path
) -> None:
    with collecting() as collector:
        environment = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
            "OTEL_SERVICE_NAME": "shop-classifier",
        }
        with server(
            model_store, tmp_path, engines=1, environment=environment, default_model="topics"
        ) as running:
            headers = {"traceparent": TRACEPARENT}
            body = {"input": ["otter xyzzy"], "heads": 2}
            answer = httpx.post(f"{running.url}/classify", json=body, headers=headers, timeout=30)
            assert answer.status_code == 200
            assert running.terminate() == 0
        spans = [(process, span) for process, span in collector.spans if span.trace_id == TRACE]
        assert {(process, span.name) for process, span in spans} == {
            ("frontend-0", "POST /classify"),
            ("frontend-0", "tokenize"),
            ("engine-0", "queue"),
            ("frontend-0", "budget"),
            ("engine-0", "compute"),
        }
        (request,) = [span for _, span in spans if span.name == "POST /classify"]
        assert {span.parent_span_id for _, span in spans} == {
            request.span_id,
            bytes.fromhex("b7ad6b7169203331"),
        }
        batches = [span for _, span in collector.spans if span.name == "compute batch"]
        assert [link.span_id for batch in batches for link in batch.links] == [request.span_id]
        assert b"xyzzy" not in b"".join(span.SerializeToString() for _, span in collector.spans)


def test_a_missing_collector_affects_neither_answers_nor_shutdown(
    model_store: Path, tmp_path: Path
) -> None:
    unreachable = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{free_port()}"}
    with server(
        model_store, tmp_path, engines=1, environment=unreachable, default_model="topics"
    ) as running:
        for _ in range(5):
            answer = httpx.post(f"{running.url}/classify", json={"input": "otter"}, timeout=30)
            assert answer.status_code == 200
        started = time.monotonic()
        assert running.terminate() == 0
    assert time.monotonic() - started < 15


def test_an_unknown_exporter_is_one_line(model_store: Path) -> None:
    done = subprocess.run(
        [*COMMAND, "--port=0", f"--model-store={model_store}"],
        capture_output=True, text=True, timeout=60, check=False,
        env=clean_environment() | {"OTEL_TRACES_EXPORTER": "zipkin"},
    )  # fmt: skip
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "zipkin" in line
    assert "otlp" in line
