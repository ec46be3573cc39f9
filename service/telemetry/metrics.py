"""The only place that names a metric.

One process, the hub, owns the registry that /metrics shows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import assert_never

import structlog
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
)

from service.ipc.control_messages import (
    BREAKS,
    DENIALS,
    REASONS,
    ConnectionEnded,
    ItemsAnswered,
    ItemSpent,
    KeysKnown,
    Observation,
    RequestEnded,
    TextsAsked,
)
from service.telemetry.context import RequestContext
from service.telemetry.processes import Family, FamilyCollector, only_this_process

log = structlog.get_logger()

PREFIX = "budgetformer"

DURATIONS = (
    0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075,
    0.1, 0.2, 0.5, 1, 2.5, 5, 10,
)  # fmt: skip
HEADS = (0, 1, 2, 4, 6, 8, 12, 18, 24, 30, 36, 48, 60, 72, 96, 144, 192, 288, 384)
TOKENS = (4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
BATCH_ITEMS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
BATCH_TOKENS = (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
RATIOS = (0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1)

OUTCOMES = ("ok", "partial", "invalid", "rejected", "timeout", "cancelled", "error")
STAGES = ("tokenize", "budget", "queue", "compute", "respond")
SOURCES = ("frontend", "engine")
"""Processes that report to the hub."""
QUALITY_RANK = {"fast": 1, "balanced": 2, "best": 3}


Exemplar = dict[str, str] | None
"""What an observation points to: a trace."""


class Metrics:
    """All metrics of a server, in a registry of their own.

    Looking up a series by its labels costs more than counting in it, so what every request needs
    is looked up once.

    Args:
        family: the processes of the server.
    """

    def __init__(self, family: Family = only_this_process) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series per counter that nobody asks for
        self.registry = CollectorRegistry()
        self.requests = self._counter(
            "requests", "Requests by route and outcome.", "route", "outcome"
        )
        self.request_duration = self._histogram(
            "request_duration_seconds", "From the first byte to the last.", DURATIONS, "route"
        )
        self.request_heads = self._histogram(
            "request_heads",
            "Heads computed for an item, summed over layers.",
            HEADS,
            "model",
            "version",
        )
        self.items = self._counter(
            "items",
            "Items answered, by the ladder step that answered.",
            "model",
            "version",
            "budget",
        )
        self.items_expected = self._counter(
            "items_expected",
            "Items that calibration would have answered at the ladder step.",
            "model",
            "version",
            "budget",
        )
        self.item_tokens = self._histogram(
            "item_tokens", "Tokens of an item.", TOKENS, "model", "version"
        )
        self.stage_duration = self._histogram(
            "stage_duration_seconds", "Time of a request's stages.", DURATIONS, "stage"
        )
        self.macs = self._counter("macs", "Multiply-adds executed.", "model", "version")
        self.dense_macs = self._counter(
            "dense_macs",
            "Multiply-adds that the dense network would have executed.",
            "model",
            "version",
        )
        self.heads_used = self._counter("heads_used", "Heads computed.", "model", "version")
        self.heads = self._counter("heads", "Heads that the dense network has.", "model", "version")
        self.int8_checked = self._counter(
            "int8_states_checked",
            "Inputs of int8 products compared with their calibrated range (a sample).",
            "model",
            "version",
        )
        self.int8_clipped = self._counter(
            "int8_states_clipped",
            "Of the inputs checked, those clipped to their calibrated range.",
            "model",
            "version",
        )
        self.batch_items = self._histogram(
            "batch_items", "Items in a batch.", BATCH_ITEMS, "model", "budget"
        )
        self.batch_tokens = self._histogram(
            "batch_tokens", "Tokens in a batch.", BATCH_TOKENS, "model", "budget"
        )
        self.batch_padding = self._histogram(
            "batch_padding_ratio", "Share of a batch's tokens that is padding.", RATIOS, "model"
        )
        self.batches = self._counter("batches", "Batches computed.", "model", "budget")
        self.queue_items = self._gauge("queue_items", "Items that wait.", "model")
        self.queue_cost = self._gauge("queue_cost_seconds", "Device time of what waits.", "model")
        self.queue_oldest = self._gauge("queue_oldest_age_seconds", "Longest wait by now.", "model")
        self.in_flight = self._gauge("in_flight_items", "Items that are not answered yet.", "model")
        self.rejected = self._counter("rejected", "Requests refused, by reason.", "reason")
        self.denied = self._counter(
            "denied", "Requests of callers who may not, by reason.", "reason"
        )
        self.broken_connections = self._counter(
            "broken_connections", "Connections ended before a request was there.", "reason"
        )
        self.key_requests = self._counter(
            "key_requests", "Requests by the caller's key and outcome.", "key", "outcome"
        )
        self.key_texts = self._counter("key_texts", "Texts asked for, by the caller's key.", "key")
        self.cancelled = self._counter("cancelled", "Requests whose client went away.")
        self.deadline_exceeded = self._counter(
            "deadline_exceeded", "Requests whose deadline passed."
        )
        self.truncated = self._counter("truncated", "Items longer than the model reads.")
        self.engine_restarts = self._counter(
            "engine_restarts", "Engines that came back after dying."
        )
        self.quality_level = self._gauge(
            "quality_level", "Level in force: 1 fast, 2 balanced, 3 best, 0 a number.", "model"
        )
        self.quality_configured = self._gauge(
            "quality_level_configured", "Level in force when there is no overload.", "model"
        )
        self.dropped_reports = self._counter(
            "dropped_reports", "Reports for these metrics dropped while the hub did not read.",
            "source",
        )  # fmt: skip
        self.fronts = self._gauge("fronts", "Fronts that serve.")
        self.model_info = self._gauge(
            "model_info", "Models served.",
            "model", "version", "labels", "layers", "heads", "device", "dtype",
        )  # fmt: skip
        self.build_info = self._gauge("build_info", "This program.", "version", "commit", "torch")
        self.model_load = self._gauge("model_load_seconds", "Time to load.", "model", "version")
        self.model_memory = self._gauge(
            "model_memory_bytes", "Size of the weights.", "model", "version"
        )
        self.device_memory = self._gauge("device_memory_bytes", "Memory of an engine.", "engine")
        self.device_busy = self._counter(
            "device_busy_seconds", "Time that an engine's device spent on passes.", "engine"
        )
        self.heartbeat_age = self._gauge(
            "engine_heartbeat_age_seconds",
            "Time since an engine was last heard, or since it is waited for.",
            "engine",
        )
        self.registry.register(FamilyCollector(PREFIX, family))
        self._stages = {stage: self.stage_duration.labels(stage) for stage in STAGES}
        self._models: dict[tuple[str, str], ModelSeries] = {}
        self._batches: dict[tuple[str, int], BatchSeries] = {}
        self._requests: dict[tuple[str, str], Counter] = {}
        self._durations: dict[str, Histogram] = {}
        self._keys: set[str] = set()
        self._failed_kinds: set[str] = set()
        for source in SOURCES:
            self.dropped_reports.labels(source)
        for counter, reasons in (
            (self.rejected, REASONS),
            (self.denied, DENIALS),
            (self.broken_connections, BREAKS),
        ):
            for reason in reasons:
                counter.labels(reason)

    def know_routes(self, routes: Iterable[str]) -> None:
        """Let every route's series read 0 from the start."""
        for route in routes:
            self.request_duration.labels(route)
            for outcome in OUTCOMES:
                self.requests.labels(route, outcome)

    def know_keys(self, names: Collection[str]) -> None:
        """Let the series of every key read 0 from the start, and drop those of keys that are gone.

        So they stay as few as the keys are.
        """
        for name in names:
            self.key_texts.labels(name)
            for outcome in OUTCOMES:
                self.key_requests.labels(name, outcome)
        for gone in self._keys.difference(names):
            for counter in (self.key_texts, self.key_requests):
                counter.remove_by_labels({"key": gone})
        self._keys = set(names)

    def know_engines(self, count: int) -> None:
        """Let every engine's series read 0 from the start."""
        for index in map(str, range(count)):
            self.device_busy.labels(index)
            self.device_memory.labels(index)
            self.heartbeat_age.labels(index)

    def know_model(self, model: str, version: str, budgets: Iterable[int]) -> None:
        """Let every series of a model read 0 from the start."""
        known = self._models.setdefault((model, version), ModelSeries(self, model, version))
        for gauge in (self.queue_items, self.queue_cost, self.queue_oldest, self.in_flight):
            gauge.labels(model)
        for budget in budgets:
            known.know(budget)
            self.batch(model, budget)

    def forget_model(self, model: str, version: str) -> None:
        """Remove the series of a model version; what is still told of it is not counted."""
        self._models.pop((model, version), None)
        for metric in (
            self.request_heads, self.items, self.items_expected, self.item_tokens,
            self.macs, self.dense_macs, self.heads_used, self.heads,
            self.int8_checked, self.int8_clipped,
        ):  # fmt: skip
            metric.remove_by_labels({"model": model, "version": version})

    def forget_name(self, model: str) -> None:
        """Remove the series that all versions of a model share."""
        self._batches = {key: batch for key, batch in self._batches.items() if key[0] != model}
        for metric in (
            self.queue_items, self.queue_cost, self.queue_oldest, self.in_flight,
            self.batches, self.batch_items, self.batch_tokens, self.batch_padding,
        ):  # fmt: skip
            metric.remove_by_labels({"model": model})

    def knows(self, model: str) -> bool:
        """Return whether some version of a model has series."""
        return any(name == model for name, _ in self._models)

    def model(self, model: str, version: str) -> ModelSeries | None:
        """Return the series of a model version; None: it is not known, or not any more."""
        return self._models.get((model, version))

    def batch(self, model: str, budget: int) -> BatchSeries | None:
        """Return the series of a known model's batches at one ladder step."""
        key = model, budget
        if key not in self._batches and self.knows(model):
            self._batches[key] = BatchSeries(self, model, budget)
        return self._batches.get(key)

    def take(self, observations: Iterable[Observation]) -> None:
        """Count what a front has seen; one that cannot be counted is logged and left out."""
        for seen in observations:
            try:
                self._count(seen)
            except Exception as error:  # whatever it is, the others count
                kind = type(seen).__name__
                if kind not in self._failed_kinds:
                    self._failed_kinds.add(kind)
                    log.error("observation not counted", observation=kind, exc_info=error)

    def _count(self, seen: Observation) -> None:
        match seen:
            case RequestEnded():
                self._request_ended(seen)
            case ItemsAnswered():
                self._items_answered(seen)
            case TextsAsked():
                if seen.caller in self._keys:
                    self.key_texts.labels(seen.caller).inc(seen.texts)
            case KeysKnown():
                self.know_keys(seen.names)
            case ConnectionEnded():
                self.broken_connections.labels(seen.reason).inc()
            case _:
                assert_never(seen)

    def _request_ended(self, seen: RequestEnded) -> None:
        exemplar = _exemplar(seen.traceparent)
        key = seen.route, seen.outcome
        counter = self._requests.get(key)
        if counter is None:
            counter = self._requests[key] = self.requests.labels(*key)
            self._durations[seen.route] = self.request_duration.labels(seen.route)
        counter.inc()
        self._durations[seen.route].observe(seen.seconds, exemplar)
        if seen.outcome == "cancelled":
            self.cancelled.inc()
        elif seen.outcome == "timeout":
            self.deadline_exceeded.inc()
        elif seen.refusal:
            self.rejected.labels(seen.refusal).inc()
        if seen.denial:
            self.denied.labels(seen.denial).inc()
        if seen.caller in self._keys:
            self.key_requests.labels(seen.caller, seen.outcome).inc()

    def _items_answered(self, seen: ItemsAnswered) -> None:
        exemplar = _exemplar(seen.traceparent)
        for stage, seconds in seen.stages.items():
            self._stages[stage].observe(seconds, exemplar)
        self.truncated.inc(seen.truncated)
        series = self.model(seen.model, str(seen.version))
        if series is not None:
            series.count(seen.items, seen.heads_of_one, seen.expected, exemplar)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, namespace=PREFIX, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, labels, namespace=PREFIX, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Iterable[float], *labels: str) -> Histogram:
        return Histogram(
            name, text, labels, namespace=PREFIX, buckets=tuple(buckets), registry=self.registry
        )


def _exemplar(traceparent: str) -> Exemplar:
    return RequestContext(traceparent=traceparent).exemplar


class ModelSeries:
    """The series of one model version."""

    def __init__(self, metrics: Metrics, model: str, version: str) -> None:
        key = model, version
        self._metrics, self._key = metrics, key
        self._heads = metrics.request_heads.labels(*key)
        self._tokens = metrics.item_tokens.labels(*key)
        self._macs = metrics.macs.labels(*key)
        self._dense_macs = metrics.dense_macs.labels(*key)
        self._heads_used = metrics.heads_used.labels(*key)
        self._heads_total = metrics.heads.labels(*key)
        self._checked = metrics.int8_checked.labels(*key)
        self._clipped = metrics.int8_clipped.labels(*key)
        self._items: dict[int, Counter] = {}
        self._expected: dict[int, Counter] = {}

    def know(self, budget: int) -> None:
        """Let the series of a ladder step read 0 until it is used."""
        self._items[budget] = self._metrics.items.labels(*self._key, budget)
        self._expected[budget] = self._metrics.items_expected.labels(*self._key, budget)

    def count(
        self,
        items: Sequence[ItemSpent],
        heads_of_one: int,
        expected: Mapping[int, float] | None = None,
        exemplar: Exemplar = None,
    ) -> None:
        """Count the answered items of a request; see `ItemsAnswered`."""
        counted: dict[int, float] = {}
        for item in items:
            self._heads.observe(item.heads, exemplar)
            self._tokens.observe(item.tokens)
            counted[item.budget] = counted.get(item.budget, 0) + 1
        for budget, count in counted.items():
            if budget not in self._items:
                self.know(budget)
            self._items[budget].inc(count)
        shares = counted if expected is None else expected
        scale = 1 if expected is None else len(items)
        for budget, share in shares.items():
            if budget not in self._expected:
                self.know(budget)
            self._expected[budget].inc(share * scale)
        self._heads_used.inc(sum(item.heads for item in items))
        self._heads_total.inc(len(items) * heads_of_one)
        self._macs.inc(sum(item.macs for item in items))
        self._dense_macs.inc(sum(item.dense_macs for item in items))

    def count_states(self, checked: int, clipped: int) -> None:
        """Count the int8 inputs that were checked, and those that were clipped."""
        self._checked.inc(checked)
        self._clipped.inc(clipped)


class BatchSeries:
    """The series of a model's batches at one ladder step."""

    def __init__(self, metrics: Metrics, model: str, budget: int) -> None:
        self._batches = metrics.batches.labels(model, budget)
        self._items = metrics.batch_items.labels(model, budget)
        self._tokens = metrics.batch_tokens.labels(model, budget)
        self._padding = metrics.batch_padding.labels(model)

    def count(self, items: int, tokens: int, padding: float) -> None:
        """Count a batch that ran."""
        self._batches.inc()
        self._items.observe(items)
        self._tokens.observe(tokens)
        self._padding.observe(padding)
