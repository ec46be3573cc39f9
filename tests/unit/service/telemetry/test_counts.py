"""The differences that frontends report add up to the counts of every text and request."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.samples import Sample

from service.telemetry.context import RequestContext, serving
from service.telemetry.counts import (
    BREAKS,
    DENIALS,
    DURATIONS,
    HEADS,
    OUTCOMES,
    REASONS,
    STAGES,
    TOKENS,
    Counts,
    Difference,
)
from service.telemetry.metrics import Metrics
from tests.support.counted import Spent, columns, count_texts

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True, database=None)
KEYS = ["", "one", "two"]
VERSIONS = [("topics", 1), ("topics", 2), ("tags", 1)]


class Request(NamedTuple):
    """A request with its outcome."""

    served: tuple[str, int]
    texts: list[Spent]
    expected: dict[int, float] | None
    stages: dict[str, float]
    truncated: int
    route: str
    outcome: str
    seconds: float
    refusal: str
    denial: str
    caller: str
    trace: int
    failed: int


seconds = st.sampled_from(DURATIONS) | st.floats(0, 20)
budgets = st.integers(0, 3)
macs = st.integers(0, 2**40)
requests = st.builds(
    Request,
    st.sampled_from(VERSIONS),
    st.lists(
        st.builds(Spent, budgets, st.integers(0, 400), st.integers(0, 600), macs, macs), max_size=6
    ),
    st.none() | st.dictionaries(budgets, st.floats(0, 1), max_size=3),
    st.dictionaries(st.sampled_from(STAGES), seconds),
    st.integers(0, 6),
    st.sampled_from(["/classify", "other"]),
    st.sampled_from(OUTCOMES),
    seconds,
    st.sampled_from(["", *REASONS]),
    st.sampled_from(["", *DENIALS]),
    st.sampled_from(KEYS),
    st.integers(0, 3),
    st.integers(0, 2),
)


def context(trace: int) -> RequestContext:
    """Return the context of a request in a trace: none for 0, a recorded one if odd."""
    return RequestContext("r", f"00-{trace:032x}-{1:016x}-0{trace % 2}" if trace else "")


def count(counts: Counts, request: Request) -> None:
    """Count a request like the frontend does."""
    name, version = request.served
    with serving(context(request.trace)):
        count_texts(
            counts,
            *request.texts,
            model=name,
            version=version,
            expected=request.expected,
            stages=request.stages,
            truncated=request.truncated,
        )
        counts.request_ended(
            request.route,
            request.outcome,
            request.seconds,
            refusal=request.refusal,
            denial=request.denial,
            caller=request.caller,
            served=request.served,
        )
        counts.items_failed(name, version, request.failed)
    if request.caller:
        counts.texts_asked(request.caller, len(request.texts))
    counts.connection_ended(BREAKS[request.trace])


class DirectCounts:
    """The same metrics with prometheus_client alone, incremented for every text and request."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        of_model = ("model", "version")
        self.counters = {
            name: self.make(Counter, name, labels)
            for name, labels in {
                "requests": ("route", "outcome"),
                "model_requests": (*of_model, "outcome"),
                "model_items_failed": of_model,
                "items": (*of_model, "budget"),
                "items_expected": (*of_model, "budget"),
                **dict.fromkeys(("macs", "dense_macs", "heads_used", "heads"), of_model),
                **dict.fromkeys(("truncated", "cancelled", "deadline_exceeded"), ()),
                **dict.fromkeys(("rejected", "denied", "broken_connections"), ("reason",)),
                "key_requests": ("key", "outcome"),
                "key_texts": ("key",),
            }.items()
        }
        self.histograms = {
            name: self.make(Histogram, name, labels, buckets=bounds)
            for name, bounds, labels in (
                ("request_duration_seconds", DURATIONS, ("route",)),
                ("model_request_duration_seconds", DURATIONS, of_model),
                ("stage_duration_seconds", DURATIONS, ("stage",)),
                ("request_heads", HEADS, of_model),
                ("item_tokens", TOKENS, of_model),
            )
        }

    def make(self, kind: Callable[..., Any], name: str, labels: Iterable[str], **more: Any) -> Any:
        return kind(name, ".", labels, namespace="budgetformer", registry=self.registry, **more)

    def grow(self, name: str, *labels: str, by: float = 1) -> None:
        counter = self.counters[name]
        (counter.labels(*labels) if labels else counter).inc(by)

    def count(self, request: Request) -> None:
        exemplar = context(request.trace).exemplar
        key = request.served[0], str(request.served[1])
        for text in request.texts:
            self.histograms["request_heads"].labels(*key).observe(text.heads, exemplar)
            self.histograms["item_tokens"].labels(*key).observe(text.tokens)
            self.grow("items", *key, str(text.budget))
            if request.expected is None:
                self.grow("items_expected", *key, str(text.budget))
            for step, share in (request.expected or {}).items():
                self.grow("items_expected", *key, str(step), by=share)
            self.grow("macs", *key, by=text.macs)
            self.grow("dense_macs", *key, by=text.dense_macs)
            self.grow("heads_used", *key, by=text.heads)
            self.grow("heads", *key, by=8)
        for stage, lasted in request.stages.items():
            self.histograms["stage_duration_seconds"].labels(stage).observe(lasted, exemplar)
        self.grow("truncated", by=request.truncated)
        duration = self.histograms["request_duration_seconds"].labels(request.route)
        duration.observe(request.seconds, exemplar)
        self.grow("requests", request.route, request.outcome)
        duration = self.histograms["model_request_duration_seconds"].labels(*key)
        duration.observe(request.seconds, exemplar)
        self.grow("model_requests", *key, request.outcome)
        self.grow("model_items_failed", *key, by=request.failed)
        if request.outcome == "cancelled":
            self.grow("cancelled")
        elif request.outcome == "timeout":
            self.grow("deadline_exceeded")
        elif request.refusal:
            self.grow("rejected", request.refusal)
        if request.denial:
            self.grow("denied", request.denial)
        if request.caller:
            self.grow("key_requests", request.caller, request.outcome)
            self.grow("key_texts", request.caller, by=len(request.texts))
        self.grow("broken_connections", BREAKS[request.trace])


def new_metrics() -> Metrics:
    """Return metrics with the routes, keys and models of the requests."""
    metrics = Metrics()
    metrics.register_routes(["/classify", "other"])
    metrics.register_keys(KEYS[1:])
    for name, version in VERSIONS:
        metrics.register_model(name, str(version), range(4))
    return metrics


def samples(registry: CollectorRegistry) -> dict[tuple[str, tuple[tuple[str, str], ...]], Sample]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample
        for family in registry.collect()
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def received(difference: Difference) -> Difference:
    """Return a difference after it was encoded and decoded."""
    return msgspec.msgpack.decode(msgspec.msgpack.encode(difference), type=Difference)


@PROPERTY
@given(st.lists(st.tuples(requests, st.integers(0, 1), st.booleans()), max_size=12))
def test_differences_of_frontends_add_up_to_the_direct_counts(
    happened: list[tuple[Request, int, bool]],
) -> None:
    metrics, direct = new_metrics(), DirectCounts()
    frontends = [Counts(), Counts()]
    for request, frontend, report in happened:
        count(frontends[frontend], request)
        direct.count(request)
        if report:
            metrics.add(received(frontends[frontend].take()))
    for counts in frontends:
        metrics.add(received(counts.take()))
        assert counts.take() == Difference({}, {})
    shown, reference = samples(metrics.registry), samples(direct.registry)
    for series, sample in reference.items():
        assert shown[series].value == pytest.approx(sample.value, rel=1e-12, abs=1e-12), series
    counted = {name.rsplit("_", 1)[0] for name, _ in reference}
    for series in shown.keys() - reference.keys():
        assert series[0].rsplit("_", 1)[0] not in counted or not shown[series].value, series


@PROPERTY
@given(st.lists(st.tuples(requests, st.booleans()), max_size=12))
def test_exemplars_name_the_newest_trace(
    happened: list[tuple[Request, bool]],
) -> None:
    metrics, direct, counts = new_metrics(), DirectCounts(), Counts()
    for request, report in happened:
        count(counts, request)
        direct.count(request)
        if report:
            metrics.add(received(counts.take()))
    metrics.add(received(counts.take()))
    shown = samples(metrics.registry)
    for series, sample in samples(direct.registry).items():
        named = shown[series].exemplar
        assert (named and named[:2]) == (sample.exemplar and sample.exemplar[:2]), series


@PROPERTY
@given(requests)
def test_columns_may_be_arrays(request: Request) -> None:
    lists = columns(request.texts)
    arrays = {name: np.array(column, np.int64) for name, column in lists.items()}
    differences = []
    for columns_of in (lists, arrays):
        counts = Counts()
        counts.classified(
            *request.served,
            **columns_of,
            heads_of_one=8,
            expected=request.expected,
            stages=request.stages,
            truncated=request.truncated,
        )
        differences.append(received(counts.take()))
    assert differences[0] == differences[1]


def test_sums_of_arrays_do_not_overflow() -> None:
    counts = Counts()
    ones = np.ones(4, np.int32)
    many = np.full(4, 2**31 - 1, np.int32)
    counts.classified(
        "topics", 1, budgets=ones, heads=ones, tokens=ones, macs=many, dense_macs=many,
        heads_of_one=8, expected=None, stages={}, truncated=0,
    )  # fmt: skip
    assert counts.take().counters["macs", "topics", "1"] == 4 * (2**31 - 1)


def test_differences_do_not_grow_with_the_number_of_requests() -> None:
    def difference_bytes(rounds: int) -> int:
        counts = Counts()
        for number in range(rounds):
            with serving(context(2 * number + 1)):
                texts = [Spent(step, 3 * step, 40 * step, 5, 6) for step in range(number % 4)]
                count_texts(counts, *texts, stages=dict.fromkeys(STAGES, 10.0 ** (number % 5 - 4)))
                counts.request_ended("/classify", OUTCOMES[number % 7], 10.0 ** (number % 5 - 4))
        difference = counts.take()
        assert len(difference.counters) + len(difference.histograms) < 30
        return len(msgspec.msgpack.encode(difference))

    # Only the numbers may have more digits.
    assert difference_bytes(20_000) < difference_bytes(200) + 200
