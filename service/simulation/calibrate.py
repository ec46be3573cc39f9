"""Ask a server that nobody else asks, and learn what requests cost it outside of passes."""

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
from service.simulation.costs import LEAST, Asked, EngineCost, ServerCosts, fit_server
from service.simulation.engine import SimEngine, SimModel, SimRequest
from service.simulation.texts import Text, measured_texts

FORMS: tuple[tuple[QualityName, int], ...] = (
    ("fast", 1), ("balanced", 1), ("best", 1), ("best", 4), ("balanced", 16), ("balanced", 64),
)  # fmt: skip
"""Quality and texts of the requests, each with short texts and with long ones."""
CALLERS = 16
"""Who ask at once, for what a request costs among others."""
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
    """Measure what requests cost a server outside of its passes.

    One request at a time, so nothing waits for anything, and which passes run is known; then single
    texts from many callers at once. The server's metrics say what its processes took.

    Args:
        url: of the server.
        checkpoint: to ask, of which it serves the same version.
        model: its costs on that server's device.
        texts: to ask; some hundreds of them are.
        seconds: for each form of request.

    Raises:
        DataError: the server does not answer as it should.
    """
    if len(texts) < 2:
        raise DataError("two texts are needed at least")
    words = texts[:: math.ceil(len(texts) / MAX_TEXTS)]
    samples = zip(words, measured_texts(checkpoint, words).texts, strict=True)
    ordered = [Sample(*sample) for sample in samples]
    ordered.sort(key=lambda sample: sample.text.exit_tokens)
    halves = ordered[: len(ordered) // 2], ordered[len(ordered) // 2 :]
    connection = _connection(url)
    try:
        asker = _Asker(connection, checkpoint.label, model, seconds)
        asker.settle()
        forms = [asker.ask(half, level, count) for level, count in FORMS for half in halves]
        crowd = asker.ask_together([_connection(url) for _ in range(CALLERS)], ordered)
    except (OSError, HTTPException) as error:
        raise DataError(f"{url}: {error or type(error).__name__}") from error
    finally:
        connection.close()
    costs = fit_server([form.asked for form in forms])
    ways = [
        form.latency - form.passes - costs.lone(form.asked)
        for form in forms
        if form.asked.texts == 1
    ]
    return replace(costs, way=max(0.0, statistics.median(ways)), among=among(costs, crowd))


def _connection(url: str) -> HTTPConnection:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if host is None or parts.scheme != "http":
        raise DataError(f"{url}: not the address of a server, such as http://127.0.0.1:8000")
    return HTTPConnection(host, port or 80, timeout=60)


def among(costs: ServerCosts, crowd: Asked) -> float:
    """Return what part of a lone request's cost for frontend and hub one of a crowd takes."""
    lone = sum(cost.seconds(1, round(crowd.tokens)) for cost in (costs.frontend, costs.hub))
    return min(1.0, max(LEAST, crowd.frontend + crowd.hub) / max(LEAST, lone))


class Sample(NamedTuple):
    """A text in words, and what it asks of the device."""

    words: str
    text: Text


@dataclass(frozen=True)
class _Form:
    asked: Asked
    passes: float
    latency: float


class _Asker:
    def __init__(
        self, connection: HTTPConnection, model_name: str, model: SimModel, seconds: float
    ) -> None:
        self._connection = connection
        self._name = model_name
        self._model = model
        self._seconds = seconds
        self._idle: dict[str, float] = {}

    def settle(self) -> None:
        """Learn what the server takes while nobody asks."""
        before, began = self._processor(), time.perf_counter()
        time.sleep(self._seconds)
        took = time.perf_counter() - began
        after = self._processor()
        self._idle = {kind: (after[kind] - before[kind]) / took for kind in before}

    def ask(self, samples: Sequence[Sample], level: QualityName, count: int) -> _Form:
        """Ask one form of request for some seconds."""
        drawn = cycle(samples)
        self._request(list(islice(drawn, count)), level)
        before, began = self._processor(), time.perf_counter()
        asked: list[list[Text]] = []
        latencies: list[float] = []
        while time.perf_counter() - began < self._seconds:
            some = list(islice(drawn, count))
            latencies.append(self._request(some, level))
            asked.append([sample.text for sample in some])
        frontend, engine, hub = self._spent(before, time.perf_counter() - began, len(asked))
        ran = [passes_of(self._model, texts, level) for texts in asked]
        passes = statistics.fmean(seconds for _, seconds in ran)
        form = Asked(
            texts=count,
            tokens=statistics.fmean(sum(text.exit_tokens for text in texts) for texts in asked),
            runs=statistics.fmean(runs for runs, _ in ran),
            frontend=frontend,
            engine=engine - passes,
            hub=hub,
        )
        return _Form(form, passes, statistics.fmean(latencies))

    def ask_together(self, callers: Sequence[HTTPConnection], samples: Sequence[Sample]) -> Asked:
        """Let callers ask one text after the other for some seconds; passes are not told apart."""
        before, began = self._processor(), time.perf_counter()

        def call(number: int) -> list[int]:
            drawn, tokens = cycle(samples[number::CALLERS] or samples), []
            with closing(callers[number]) as connection:
                while time.perf_counter() - began < self._seconds:
                    sample = next(drawn)
                    self._request([sample], "fast", connection)
                    tokens.append(sample.text.exit_tokens)
            return tokens

        with ThreadPoolExecutor(CALLERS) as threads:
            tokens = [count for asked in threads.map(call, range(CALLERS)) for count in asked]
        frontend, engine, hub = self._spent(before, time.perf_counter() - began, len(tokens))
        return Asked(1, statistics.fmean(tokens), 0, frontend, engine, hub)

    def _spent(
        self, before: dict[str, float], elapsed: float, requests: int
    ) -> tuple[float, float, float]:
        """Return what a request took of frontend, engine and hub, beyond what they take idle."""
        after = self._processor()
        frontend, engine, hub = (
            (after[kind] - before[kind] - self._idle[kind] * elapsed) / requests
            for kind in ("frontend", "engine", "hub")
        )
        return frontend, engine, hub

    def _request(
        self,
        asked: Sequence[Sample],
        level: QualityName,
        connection: HTTPConnection | None = None,
    ) -> float:
        words = [sample.words for sample in asked]
        given = words if len(words) > 1 else words[0]
        body = {"model": self._name, "quality": level, "input": given}
        began = time.perf_counter()
        self._answer("POST", "/classify", json.dumps(body), connection)
        return time.perf_counter() - began

    def _answer(
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
            raise DataError(f"{path} was answered {response.status}: {content[:200]}")
        return content

    def _processor(self) -> dict[str, float]:
        """Return the seconds of processor time that each kind of process has had."""
        from prometheus_client.parser import text_string_to_metric_families

        content = self._answer("GET", "/metrics")
        taken = dict.fromkeys(PROCESSES.values(), 0.0)
        for family in text_string_to_metric_families(content):
            for sample in family.samples if family.name == _CPU else ():
                kind = PROCESSES.get(sample.labels["process"].partition("-")[0])
                if kind is not None:
                    taken[kind] += sample.value
        if not taken["frontend"] or not taken["engine"]:
            raise DataError("the server's metrics do not tell of its processes")
        return taken


def passes_of(model: SimModel, texts: Sequence[Text], level: QualityName) -> tuple[int, float]:
    """Return how many passes a lone request takes, and their seconds."""
    engine = SimEngine(model, _named(level), EngineCost(), lambda _: None)
    engine.receive(SimRequest(0.0, float("inf"), texts), 0.0)
    runs, seconds = 0, 0.0
    while (took := engine.begin(seconds)) is not None:
        seconds += took
        runs += 1
        engine.finish(seconds)
    return runs, seconds


@cache
def _named(level: QualityName) -> Settings:
    return Settings(quality=level)
