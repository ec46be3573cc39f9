"""Load a running server with several kinds of callers, in scenarios.

pip install -e '.[loadtest]'
locust -f loadtests/locustfile.py --headless -u 16 -r 4 -t 60s -H http://127.0.0.1:8000
LOADTEST_SCENARIO=spike locust -f loadtests/locustfile.py --headless -H http://127.0.0.1:8000

Without LOADTEST_SCENARIO, locust's flags set the number of callers and the duration.
LOADTEST_SHORTER=10 makes a scenario 10 times shorter. To run only some kinds of callers, append
their classes to the command: `Interactive Bulk`. LOADTEST_DATA is a Parquet file of texts,
LOADTEST_MODELS the models that `Mixed` uses, separated by commas. A 429 with Retry-After is counted
separately and is no failure; any other status than 200 is one. Locust waits for answers (closed
loop); benchmark.py measures latency at a fixed rate.
"""

from __future__ import annotations

import json
import os
import random
import socket
import time
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

from locust import FastHttpUser, LoadTestShape, between, constant, task
from texts import texts_of

DATA = os.environ.get("LOADTEST_DATA")
TEXTS = texts_of(Path(DATA) if DATA else None, 4000)
MODELS = os.environ.get("LOADTEST_MODELS", "ag_news").split(",")
SCENARIO = os.environ.get("LOADTEST_SCENARIO") or None
SHORTER = float(os.environ.get("LOADTEST_SHORTER", "1"))
STAGES: dict[str, list[tuple[float, int]]] = {
    "steady": [(60, 16)],
    "ramp": [(15, users) for users in (4, 8, 16, 32, 64, 128)],
    "spike": [(20, 8), (15, 160), (30, 8)],
    "soak": [(3600, 24)],
    "overload-2": [(60, 128)],
    "overload-5": [(60, 320)],
}
"""Duration in seconds and number of callers of each stage, by scenario."""


class Caller(FastHttpUser):
    abstract = True
    wait_time = constant(0)

    def classify(self, name: str, given: Any, **fields: Any) -> None:
        """Send one request; it fails if a text has no answer."""
        with self.client.post(
            "/classify", json={"input": given} | fields, name=name, catch_response=True
        ) as response:
            if response.status_code == 429 and "retry-after" in response.headers:
                response.request_meta["name"] = f"{name}, refused"
                response.success()
            elif response.status_code == 200:
                expected = len(given) if isinstance(given, list) else 1
                if len(response.json()["data"]) != expected:
                    response.failure("answers are missing")


class Interactive(Caller):
    """Single texts and small batches."""

    weight = 8

    @task(8)
    def single(self) -> None:
        self.classify("single", random.choice(TEXTS))

    @task(1)
    def batch(self) -> None:
        self.classify("batch of 16", random.sample(TEXTS, 16))


class Bulk(Caller):
    """Large requests."""

    weight = 1
    wait_time = between(0.5, 1.5)

    @task
    def bulk(self) -> None:
        self.classify("batch of 512", random.sample(TEXTS, 512), timeout_ms=60_000)


class Mixed(Caller):
    """Random models and quality levels."""

    weight = 2

    @task
    def mixed(self) -> None:
        model, quality = random.choice(MODELS), random.choice(["fast", "balanced", "best"])
        self.classify(f"{model}, {quality}", random.choice(TEXTS), model=model, quality=quality)


class BigBodies(Caller):
    """Texts far longer than the model's maximum, which are truncated."""

    weight = 1
    wait_time = between(1, 2)

    @task
    def big(self) -> None:
        self.classify("90,000 characters", (" ".join(TEXTS[:500]))[:90_000])


class Slow(Caller):
    """Clients that send the body in small pieces."""

    weight = 1
    wait_time = between(1, 2)
    PIECES: ClassVar[int] = 20

    @task
    def slow(self) -> None:
        parts = urlsplit(self.host or "")
        body = json.dumps({"input": random.choice(TEXTS)}).encode()
        head = f"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        started, failure, received = time.perf_counter(), None, b""
        try:
            address = (parts.hostname or "localhost", parts.port or 80)
            with socket.create_connection(address, timeout=30) as connection:
                connection.sendall(head.encode())
                size = len(body) // self.PIECES + 1
                for start in range(0, len(body), size):
                    connection.sendall(body[start : start + size])
                    time.sleep(0.05)
                received = connection.recv(65536)
            if received.split(b" ", 2)[1] not in (b"200", b"429"):
                failure = RuntimeError(received[:40].decode("latin-1"))
        except (OSError, IndexError) as error:
            failure = error  # type: ignore[assignment]
        self.environment.events.request.fire(
            request_type="POST", name="sent slowly", response_length=len(received),
            response_time=1000 * (time.perf_counter() - started), exception=failure, context={},
        )  # fmt: skip


class Stages(LoadTestShape):
    """The number of callers of a scenario over time."""

    abstract = SCENARIO is None

    def tick(self) -> tuple[int, float] | None:
        stages = STAGES[SCENARIO or "steady"]
        for end, (_, users) in zip(accumulate(s for s, _ in stages), stages, strict=True):
            if SHORTER * self.get_run_time() < end:
                return users, max(users / 2, 1)
        return None
