"""All metrics of a server; only this module names them.

One process, the hub, owns the registry that /metrics shows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

import structlog
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    disable_created_metrics,
)
from prometheus_client.metrics_core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar
from prometheus_client.utils import floatToGoString

from service.job_store import STORED
from service.telemetry.counts import (
    BREAKS,
    DENIALS,
    DURATIONS,
    HEADS,
    OUTCOMES,
    REASONS,
    SHADOW_OUTCOMES,
    SIDES,
    STAGES,
    TOKENS,
    Difference,
    Observations,
    Series,
)
from service.telemetry.processes import Family, FamilyCollector, only_this_process

log = structlog.get_logger()

PREFIX = "budgetformer"

BATCH_ITEMS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
BATCH_TOKENS = (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
RATIOS = (0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1)

SOURCES = ("frontend", "engine")
"""Kinds of processes that report to the hub."""
ENDS = ("promoted", "rolled_back", "stopped")
"""Outcomes of roll-outs."""
VERSION = ("model", "version")
"""Labels that name a model version."""
QUALITY_RANK = {"fast": 1, "balanced": 2, "best": 3}


class Metrics:
    """All metrics of a server, in their own registry.

    Args:
        family: returns the processes of the server.
    """

    def __init__(self, family: Family = only_this_process) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # halves the number of series
        self.registry = CollectorRegistry()
        self._counted: dict[str, tuple[Counter | Histogram, tuple[str, ...]]] = {}
        """Counters and histograms by name, each with the names of its labels."""
        self.requests = self._counter(
            "requests", "Requests by route and outcome.", "route", "outcome"
        )
        self.request_duration = self._histogram(
            "request_duration_seconds",
            "Time from the first byte of a request to the last byte of its response.",
            DURATIONS,
            "route",
        )
        self.model_requests = self._counter(
            "model_requests",
            "Requests to classify, by model version and outcome.",
            *VERSION,
            "outcome",
        )
        self.model_request_duration = self._histogram(
            "model_request_duration_seconds",
            "Time from the first byte to the last of requests to classify, by model version.",
            DURATIONS,
            *VERSION,
        )
        self.model_items_failed = self._counter(
            "model_items_failed", "Items that a model version failed to answer.", *VERSION
        )
        self.cache_hits = self._counter(
            "cache_hits", "Items answered from the answer cache.", *VERSION
        )
        self.cache_misses = self._counter(
            "cache_misses", "Items that were not in the answer cache.", *VERSION
        )
        self.cache_bytes = self._gauge("cache_bytes", "Size of the frontends' answer caches.")
        self.rollout_weight = self._gauge(
            "rollout_weight", "Share of the requests that a candidate answers.", *VERSION
        )
        self.rollout_shadow = self._gauge(
            "rollout_shadow", "Share of the other requests that a candidate computes too.", *VERSION
        )
        self.rollouts_ended = self._counter(
            "rollouts_ended", "Roll-outs that ended, by outcome.", "model", "outcome"
        )
        self.shadow_items = self._counter(
            "shadow_items",
            "Items that a candidate computed beside the served version.",
            *VERSION,
            "outcome",
        )
        sides = (*VERSION, "side")
        self.shadow_seconds = self._counter(
            "shadow_seconds", "Time of passes for items that both versions computed.", *sides
        )
        self.shadow_macs = self._counter(
            "shadow_macs", "Multiply-adds for items that both versions computed.", *sides
        )
        self.shadow_heads = self._counter(
            "shadow_heads", "Heads computed for items that both versions computed.", *sides
        )
        self.request_heads = self._histogram(
            "request_heads", "Heads computed for an item, summed over layers.", HEADS, *VERSION
        )
        self.items = self._counter(
            "items", "Items answered, by the ladder step that answered.", *VERSION, "budget"
        )
        self.items_expected = self._counter(
            "items_expected",
            "Items that calibration would have answered at the ladder step.",
            *VERSION,
            "budget",
        )
        self.item_tokens = self._histogram("item_tokens", "Tokens of an item.", TOKENS, *VERSION)
        self.stage_duration = self._histogram(
            "stage_duration_seconds", "Time of each stage of a request.", DURATIONS, "stage"
        )
        self.macs = self._counter("macs", "Multiply-adds executed.", *VERSION)
        self.dense_macs = self._counter(
            "dense_macs", "Multiply-adds that the dense network would have executed.", *VERSION
        )
        self.heads_used = self._counter("heads_used", "Heads computed.", *VERSION)
        self.heads = self._counter("heads", "Heads that the dense network has.", *VERSION)
        self.int8_checked = self._counter(
            "int8_states_checked",
            "Inputs of int8 products compared with their calibrated range (a sample).",
            *VERSION,
        )
        self.int8_clipped = self._counter(
            "int8_states_clipped",
            "Of the inputs checked, those clipped to their calibrated range.",
            *VERSION,
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
        self.queue_items = self._gauge("queue_items", "Waiting items.", "model")
        self.queue_cost = self._gauge(
            "queue_cost_seconds", "Expected device time of the waiting items.", "model"
        )
        self.queue_oldest = self._gauge(
            "queue_oldest_age_seconds", "Age of the oldest waiting request.", "model"
        )
        self.in_flight = self._gauge("in_flight_items", "Items that are not answered yet.", "model")
        self.rejected = self._counter("rejected", "Requests refused, by reason.", "reason")
        self.denied = self._counter(
            "denied", "Requests that were not authorized, by reason.", "reason"
        )
        self.broken_connections = self._counter(
            "broken_connections", "Connections closed before a request was received.", "reason"
        )
        self.key_requests = self._counter(
            "key_requests", "Requests by the caller's key and outcome.", "key", "outcome"
        )
        self.key_texts = self._counter("key_texts", "Texts asked for, by the caller's key.", "key")
        self.jobs = self._gauge("jobs", "Stored jobs, by status.", "status")
        self.job_rows = self._counter("job_rows", "Rows of jobs answered.")
        self.cancelled = self._counter("cancelled", "Requests whose client disconnected.")
        self.deadline_exceeded = self._counter(
            "deadline_exceeded", "Requests whose deadline passed."
        )
        self.truncated = self._counter("truncated", "Items longer than the model reads.")
        self.engine_restarts = self._counter(
            "engine_restarts", "Restarts of engines that had died."
        )
        self.quality_level = self._gauge(
            "quality_level",
            "Quality level in force: 1 fast, 2 balanced, 3 best, 0 an accuracy drop.",
            "model",
        )
        self.quality_configured = self._gauge(
            "quality_level_configured", "Quality level without overload.", "model"
        )
        self.dropped_reports = self._counter(
            "dropped_reports",
            "Reports of counts that were dropped since the hub did not read.",
            "source",
        )
        self.fronts = self._gauge("fronts", "Frontends that serve.")
        self.model_info = self._gauge(
            "model_info", "Models served.", *VERSION, "labels", "layers", "heads", "device", "dtype"
        )
        self.build_info = self._gauge(
            "build_info", "Version of this program and of torch.", "version", "commit", "torch"
        )
        self.model_load = self._gauge("model_load_seconds", "Time to load a model.", *VERSION)
        self.model_memory = self._gauge("model_memory_bytes", "Size of the weights.", *VERSION)
        self.device_memory = self._gauge(
            "device_memory_bytes", "Device memory that an engine uses.", "engine"
        )
        self.device_busy = self._counter(
            "device_busy_seconds", "Time that an engine's device spent on passes.", "engine"
        )
        self.heartbeat_age = self._gauge(
            "engine_heartbeat_age_seconds",
            "Time since the last message of an engine, or since the start if there was none.",
            "engine",
        )
        self.registry.register(FamilyCollector(PREFIX, family))
        self._models: set[tuple[str, str]] = set()
        self._batches: dict[tuple[str, int], BatchSeries] = {}
        self._keys: set[str] = set()
        self._failed: set[str] = set()
        for status in STORED:
            self.jobs.labels(status)
        for stage in STAGES:
            self.stage_duration.labels(stage)
        for source in SOURCES:
            self.dropped_reports.labels(source)
        for counter, reasons in (
            (self.rejected, REASONS),
            (self.denied, DENIALS),
            (self.broken_connections, BREAKS),
        ):
            for reason in reasons:
                counter.labels(reason)

    def register_routes(self, routes: Iterable[str]) -> None:
        """Create the series of all routes, so that they begin at 0."""
        for route in routes:
            self.request_duration.labels(route)
            for outcome in OUTCOMES:
                self.requests.labels(route, outcome)

    def register_keys(self, names: Collection[str]) -> None:
        """Create the series of all keys, so that they begin at 0; remove those of other keys."""
        for name in names:
            self.key_texts.labels(name)
            for outcome in OUTCOMES:
                self.key_requests.labels(name, outcome)
        for removed in self._keys.difference(names):
            for counter in (self.key_texts, self.key_requests):
                counter.remove_by_labels({"key": removed})
        self._keys = set(names)

    def register_engines(self, count: int) -> None:
        """Create the series of all engines, so that they begin at 0."""
        for index in map(str, range(count)):
            self.device_busy.labels(index)
            self.device_memory.labels(index)
            self.heartbeat_age.labels(index)

    def register_model(self, model: str, version: str, budgets: Iterable[int]) -> None:
        """Create the series of a model version, so that they begin at 0."""
        self._models.add((model, version))
        for metric, labels in self._counted.values():
            if labels == VERSION:
                metric.labels(model, version)
        for outcome in OUTCOMES:
            self.model_requests.labels(model, version, outcome)
        for gauge in (self.queue_items, self.queue_cost, self.queue_oldest, self.in_flight):
            gauge.labels(model)
        for budget in budgets:
            for counter in (self.items, self.items_expected):
                counter.labels(model, version, budget)
            self.batch(model, budget)

    def show_rollout(self, model: str, candidate: tuple[str, float, float] | None) -> None:
        """Show the candidate of a model: version, weight and shadow share; None: there is none."""
        for outcome in ENDS:
            self.rollouts_ended.labels(model, outcome)
        for gauge in (self.rollout_weight, self.rollout_shadow):
            gauge.remove_by_labels({"model": model})
        if candidate is None:
            return
        version, weight, shadow = candidate
        self.rollout_weight.labels(model, version).set(weight)
        self.rollout_shadow.labels(model, version).set(shadow)
        for outcome in SHADOW_OUTCOMES:
            self.shadow_items.labels(model, version, outcome)
        for side in SIDES:
            for counter in (self.shadow_seconds, self.shadow_macs, self.shadow_heads):
                counter.labels(model, version, side)

    def forget_model(self, model: str, version: str) -> None:
        """Remove the series of a model version; later reports on it are not counted."""
        self._models.discard((model, version))
        for metric, labels in self._counted.values():
            if labels[:2] == VERSION:
                metric.remove_by_labels({"model": model, "version": version})

    def forget_model_name(self, model: str) -> None:
        """Remove the series that all versions of a model share."""
        self._batches = {key: batch for key, batch in self._batches.items() if key[0] != model}
        for metric in (
            self.queue_items, self.queue_cost, self.queue_oldest, self.in_flight,
            self.batches, self.batch_items, self.batch_tokens, self.batch_padding,
            self.rollouts_ended,
        ):  # fmt: skip
            metric.remove_by_labels({"model": model})

    def has_model(self, model: str) -> bool:
        """Return whether any version of a model has series."""
        return any(name == model for name, _ in self._models)

    def batch(self, model: str, budget: int) -> BatchSeries | None:
        """Return the series of a model's batches at one ladder step; None: unknown model."""
        key = model, budget
        if key not in self._batches and self.has_model(model):
            self._batches[key] = BatchSeries(self, model, budget)
        return self._batches.get(key)

    def count_states(self, model: str, version: str, checked: int, clipped: int) -> None:
        """Count the checked inputs of int8 products, and the clipped ones among them."""
        if (model, version) in self._models:
            self.int8_checked.labels(model, version).inc(checked)
            self.int8_clipped.labels(model, version).inc(clipped)

    def add(self, difference: Difference) -> None:
        """Add the counts of a frontend; log series that cannot be added, and skip them."""
        for series, grown in (difference.counters | difference.histograms).items():
            try:
                self._add(series, grown)
            except Exception as error:  # the other series must still be counted
                name = series[0] if series else ""
                if name not in self._failed:
                    self._failed.add(name)
                    log.error("counts not recorded", metric=name, exc_info=error)

    def _add(self, series: Series, grown: float | Observations) -> None:
        name, *labels = series
        metric, names = self._counted[name]
        if self._is_unknown(names, labels):
            return
        if isinstance(grown, Observations):
            assert isinstance(metric, Histogram)
            metric.labels(*labels).add(grown)
        else:
            assert isinstance(metric, Counter)
            (metric.labels(*labels) if labels else metric).inc(grown)

    def _is_unknown(self, names: tuple[str, ...], values: Sequence[str]) -> bool:
        """Return whether the labels name an unknown model version or key."""
        if names[:2] == VERSION:
            return tuple(values[:2]) not in self._models
        return names[:1] == ("key",) and values[0] not in self._keys

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        counter = Counter(name, text, labels, namespace=PREFIX, registry=self.registry)
        self._counted[name] = counter, labels
        return counter

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, labels, namespace=PREFIX, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
        histogram = Histogram(f"{PREFIX}_{name}", text, buckets, labels)
        self.registry.register(histogram)
        self._counted[name] = histogram, labels
        return histogram


class Histogram(Collector):
    """A histogram to which many observations can be added at once, unlike prometheus_client's.

    Args:
        name: full name of the metric.
        text: help text.
        bounds: upper bounds of the buckets.
        labels: names of the labels.
    """

    def __init__(self, name: str, text: str, bounds: Sequence[float], labels: Sequence[str]):
        self._name, self._text = name, text
        self._bounds, self._labels = bounds, labels
        self._series: dict[Series, Observations] = {}

    def labels(self, *values: object) -> Observations:
        """Return the observations of one series, which is created if it is new."""
        return self._series.setdefault(tuple(map(str, values)), Observations())

    def remove_by_labels(self, labels: dict[str, str]) -> None:
        """Remove the series that have all of these labels."""
        wanted = labels.items()
        self._series = {
            values: observed
            for values, observed in self._series.items()
            if not wanted <= dict(zip(self._labels, values, strict=True)).items()
        }

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """Yield the metric with all series."""
        family = HistogramMetricFamily(self._name, self._text, labels=self._labels)
        names = [*map(floatToGoString, self._bounds), "+Inf"]
        for values, observed in self._series.items():
            exemplars = {at: (Exemplar(*seen),) for at, seen in observed.exemplars.items()}
            counts = zip(names, observed.cumulative(self._bounds), strict=True)
            buckets = [(*pair, *exemplars.get(at, ())) for at, pair in enumerate(counts)]
            family.add_metric(values, buckets, observed.sum)
        yield family


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
        self._items.observe(BATCH_ITEMS, items)
        self._tokens.observe(BATCH_TOKENS, tokens)
        self._padding.observe(RATIOS, padding)
