"""Measure what requests cost an idle server outside of passes."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cache
from http.client import HTTPConnection, HTTPException
from itertools import cycle, islice
from typing import NamedTuple
from urllib.parse import urlsplit

from budgetformer.checkpoint.store import Checkpoint
from budgetformer.errors import DataError
from budgetformer.inference.policy import QualityName
from service.settings import Settings
from service.simulation.costs import LEAST, EngineCost, MeasuredRequests, ServerCosts, fit_server
from service.simulation.engine import SimEngine, SimModel, SimRequest
from service.simulation.texts import Text, measure_texts

FORMS: tuple[tuple[QualityName, int], ...] = (
    ("fast", 1), ("balanced", 1), ("best", 1), ("best", 4), ("balanced", 16), ("balanced", 64),
)  # fmt: skip
"""Quality and number of texts of the requests; each is sent with short and with long texts."""
CALLERS = 16
"""Number of concurrent callers in the measurement under load."""
MAX_TEXTS = 600
PROCESSES = {"frontend": "frontend", "engine": "engine", "supervisor": "hub"}
_CPU = "budgetformer_process_cpu_seconds"


def calibrate(
    url: str,
    checkpoint: Checkpoint,
    model: SimModel,
    texts: Sequence[str],
    seconds: float = 4.0,
) -> ServerCosts:
    """Measure the processor time of requests outside of passes.

    First one request is sent at a time, so that nothing waits and the passes are known. Then many
    callers send single texts at the same time. The processor time is read from the server's
    metrics.

    Args:
        url: URL of the server.
        checkpoint: checkpoint that the server serves.
        model: cost of its passes on the server's device.
        texts: at least two texts to send; at most `MAX_TEXTS` of them are used.
        seconds: duration of the measurement of each form of request.

    Raises:
        DataError: there are too few texts, or the server does not answer as expected.
    """
    if len(texts) < 2:
        raise DataError("at least two texts are required")
    chosen = texts[:: math.ceil(len(texts) / MAX_TEXTS)]
    samples = zip(chosen, measure_texts(checkpoint, chosen).texts, strict=True)
    ordered = [Sample(*sample) for sample in samples]
    ordered.sort(key=lambda sample: sample.text.step_0_tokens)
    halves = ordered[: len(ordered) // 2], ordered[len(ordered) // 2 :]
    connection = _connection(url)
    try:
        client = _MeasuringClient(connection, checkpoint.label, model, seconds)
        client.measure_idle()
        forms = [client.measure(half, level, count) for level, count in FORMS for half in halves]
        crowd = client.measure_load([_connection(url) for _ in range(CALLERS)], ordered)
    except (OSError, HTTPException) as error:
        raise DataError(f"{url}: {error or type(error).__name__}") from error
    finally:
        connection.close()
    costs = fit_server([form.requests for form in forms])
    transfers = [
        form.latency - form.passes - costs.lone(form.requests)
        for form in forms
        if form.requests.texts == 1
    ]
    return replace(costs, way=max(0.0, statistics.median(transfers)), among=among(costs, crowd))


def _connection(url: str) -> HTTPConnection:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if host is None or parts.scheme != "http":
        raise DataError(f"{url}: not the address of a server, such as http://127.0.0.1:8000")
    return HTTPConnection(host, port or 80, timeout=60)


def among(costs: ServerCosts, crowd: MeasuredRequests) -> float:
    """Return the cost of a request under load for frontend and hub, as a share of a lone one's."""
    lone = sum(cost.seconds(1, crowd.tokens) for cost in (costs.frontend, costs.hub))
    return min(1.0, max(LEAST, crowd.frontend + crowd.hub) / max(LEAST, lone))


class Sample(NamedTuple):
    """A text as a string, and its tokens and steps."""

    string: str
    text: Text


@dataclass(frozen=True)
class _Form:
    """Measurement of one form of request: its costs, its passes (s) and its latency (s)."""

    requests: MeasuredRequests
    passes: float
    latency: float


class _MeasuringClient:
    """A client that reads the server's processor time before and after its requests."""

    def __init__(
        self, connection: HTTPConnection, model_name: str, model: SimModel, seconds: float
    ) -> None:
        self._connection = connection
        self._name = model_name
        self._model = model
        self._seconds = seconds
        self._idle: dict[str, float] = {}

    def measure_idle(self) -> None:
        """Measure the processor time per second without requests."""
        before, began = self._processor_seconds(), time.perf_counter()
        time.sleep(self._seconds)
        elapsed = time.perf_counter() - began
        after = self._processor_seconds()
        self._idle = {kind: (after[kind] - before[kind]) / elapsed for kind in before}

    def measure(self, samples: Sequence[Sample], level: QualityName, count: int) -> _Form:
        """Measure one form of request, one request at a time."""
        drawn = cycle(samples)
        self._request(list(islice(drawn, count)), level)
        before, began = self._processor_seconds(), time.perf_counter()
        requests: list[list[Text]] = []
        latencies: list[float] = []
        while time.perf_counter() - began < self._seconds:
            batch = list(islice(drawn, count))
            latencies.append(self._request(batch, level))
            requests.append([sample.text for sample in batch])
        frontend, engine, hub = self._spent(before, time.perf_counter() - began, len(requests))
        ran = [passes_of(self._model, texts, level) for texts in requests]
        passes = statistics.fmean(seconds for _, seconds in ran)
        form = MeasuredRequests(
            texts=count,
            tokens=statistics.fmean(
                sum(text.step_0_tokens for text in texts) for texts in requests
            ),
            runs=statistics.fmean(runs for runs, _ in ran),
            frontend=frontend,
            engine=engine - passes,
            hub=hub,
        )
        return _Form(form, passes, statistics.fmean(latencies))

    def measure_load(
        self, callers: Sequence[HTTPConnection], samples: Sequence[Sample]
    ) -> MeasuredRequests:
        """Measure single texts from concurrent callers; the engine's time includes its passes."""
        before, began = self._processor_seconds(), time.perf_counter()

        def call(number: int) -> list[int]:
            drawn, tokens = cycle(samples[number::CALLERS] or samples), []
            with closing(callers[number]) as connection:
                while time.perf_counter() - began < self._seconds:
                    sample = next(drawn)
                    self._request([sample], "fast", connection)
                    tokens.append(sample.text.step_0_tokens)
            return tokens

        with ThreadPoolExecutor(CALLERS) as threads:
            tokens = [count for sent in threads.map(call, range(CALLERS)) for count in sent]
        frontend, engine, hub = self._spent(before, time.perf_counter() - began, len(tokens))
        return MeasuredRequests(1, statistics.fmean(tokens), 0, frontend, engine, hub)

    def _spent(
        self, before: dict[str, float], elapsed: float, requests: int
    ) -> tuple[float, float, float]:
        """Return the seconds of a request in frontend, engine and hub, without their idle time."""
        after = self._processor_seconds()
        frontend, engine, hub = (
            (after[kind] - before[kind] - self._idle[kind] * elapsed) / requests
            for kind in ("frontend", "engine", "hub")
        )
        return frontend, engine, hub

    def _request(
        self,
        samples: Sequence[Sample],
        level: QualityName,
        connection: HTTPConnection | None = None,
    ) -> float:
        """Send a request, and return its latency."""
        strings = [sample.string for sample in samples]
        given = strings if len(strings) > 1 else strings[0]
        body = {"model": self._name, "quality": level, "input": given}
        began = time.perf_counter()
        self._call("POST", "/classify", json.dumps(body), connection)
        return time.perf_counter() - began

    def _call(
        self,
        method: str,
        path: str,
        body: str | None = None,
        connection: HTTPConnection | None = None,
    ) -> str:
        connection = connection or self._connection
        headers = {"Content-Type": "application/json"} if body else {}
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        content = response.read().decode()
        if response.status != 200:
            raise DataError(f"{path} returned status {response.status}: {content[:200]}")
        return content

    def _processor_seconds(self) -> dict[str, float]:
        """Return the total processor time of each kind of process."""
        from prometheus_client.parser import text_string_to_metric_families

        content = self._call("GET", "/metrics")
        seconds = dict.fromkeys(PROCESSES.values(), 0.0)
        for family in text_string_to_metric_families(content):
            for sample in family.samples if family.name == _CPU else ():
                kind = PROCESSES.get(sample.labels["process"].partition("-")[0])
                if kind is not None:
                    seconds[kind] += sample.value
        if not seconds["frontend"] or not seconds["engine"]:
            raise DataError(f"the server's metrics lack {_CPU} of its frontends or engines")
        return seconds


def passes_of(model: SimModel, texts: Sequence[Text], level: QualityName) -> tuple[int, float]:
    """Return the number of passes of a lone request, and their seconds."""
    engine = SimEngine(model, _settings_with(level), EngineCost(), lambda _: None)
    engine.receive(SimRequest(0.0, float("inf"), texts), 0.0)
    runs, seconds = 0, 0.0
    while (took := engine.begin(seconds)) is not None:
        seconds += took
        runs += 1
        engine.finish(seconds)
    return runs, seconds


@cache
def _settings_with(level: QualityName) -> Settings:
    return Settings(quality=level)
