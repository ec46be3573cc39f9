"""The only place that names a metric.

One process, the front, owns the registry that /metrics shows.
"""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
)

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
REASONS = ("queue_full", "deadline", "draining", "too_large", "rate")
QUALITY_RANK = {"fast": 1, "balanced": 2, "best": 3}


class Metrics:
    """All metrics of one front, in a registry of their own."""

    def __init__(self) -> None:
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
        self.cancelled = self._counter("cancelled", "Requests whose client went away.")
        self.deadline_exceeded = self._counter(
            "deadline_exceeded", "Requests whose deadline passed."
        )
        self.truncated = self._counter("truncated", "Items longer than the model reads.")
        self.engine_restarts = self._counter(
            "engine_restarts", "Engines that came back after dying."
        )
        self.quality_level = self._gauge(
            "quality_level", "Level in force: 1 fast, 2 balanced, 3 best.", "model"
        )
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
        self.heartbeat_age = self._gauge(
            "engine_heartbeat_age_seconds", "Time since an engine was last heard.", "engine"
        )
        for stage in STAGES:
            self.stage_duration.labels(stage)
        for reason in REASONS:
            self.rejected.labels(reason)

    def know_routes(self, routes: Iterable[str]) -> None:
        """Let every route's series read 0 from the start."""
        for route in routes:
            self.request_duration.labels(route)
            for outcome in OUTCOMES:
                self.requests.labels(route, outcome)

    def know_model(self, model: str, version: str, budgets: Iterable[int]) -> None:
        """Let every series of a model read 0 from the start."""
        for metric in (self.request_heads, self.item_tokens, self.macs, self.dense_macs):
            metric.labels(model, version)
        for metric in (self.heads_used, self.heads):
            metric.labels(model, version)
        for gauge in (self.queue_items, self.queue_cost, self.queue_oldest, self.in_flight):
            gauge.labels(model)
        self.batch_padding.labels(model)
        for budget in budgets:
            self.items.labels(model, version, budget)
            for metric in (self.batch_items, self.batch_tokens, self.batches):
                metric.labels(model, budget)

    def retire_model(self, model: str, version: str) -> None:
        """Drop what says that a model version is served; its counters stay."""
        for gauge in (self.model_info, self.model_load, self.model_memory):
            gauge.remove_by_labels({"model": model, "version": version})

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, namespace=PREFIX, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, labels, namespace=PREFIX, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Iterable[float], *labels: str) -> Histogram:
        return Histogram(
            name, text, labels, namespace=PREFIX, buckets=tuple(buckets), registry=self.registry
        )
