"""Requests in an engine, and running totals of each model's queue."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from budgetformer.inference.cascade import LAYERWISE, Items
from budgetformer.model.tfidf import Array
from service.engine.loaded_model import LoadedModel
from service.ipc.answers import UNPREDICTED, Answers
from service.ipc.engine_messages import Answer, SentAnswers, ToFrontend
from service.scheduling.buckets import Lane, Span
from service.scheduling.price import Outlook
from service.scheduling.totals import TotalSeconds
from service.telemetry.context import RequestContext

Reply = Callable[[ToFrontend], object]


@dataclass(eq=False)
class Request:
    """An admitted request of B texts, until it is answered.

    Texts are named by their index in the request. Times are on the engine's clock.

    Attributes:
        id: id of the message.
        reply: sends messages to the frontend.
        model: model that answers.
        queue: queue of that model.
        arrived, deadline: when it arrived, and when its answer becomes worthless.
        return_heads: whether the answer names the heads that were computed.
        context: ids of the request, for logs and traces.
        quality: quality level, or accepted accuracy drop in percentage points.
        outlook: ladder steps that its texts are expected to run.
        lane: lane in which its texts wait.
        items: state of its texts.
        begun: first step of each text, [B], if another engine ran the steps before; else None.
        spans: its waiting spans.
        open: number of texts without an answer, waiting or running.
        waiting: number of texts that wait.
        dropped: whether it was cancelled, or its deadline has passed.
        errors: reason why a text failed, by index.
        waits_since: time at which each text arrived or its last pass ended, [B].
        budget_seconds, compute_seconds: time of the passes that each text was in, [B].
        last: index of the text that was finished last, and the time of that.
    """

    id: int
    reply: Reply
    model: LoadedModel
    queue: ModelQueue
    arrived: float
    deadline: float
    return_heads: bool
    context: RequestContext
    quality: str | float
    outlook: Outlook
    lane: Lane
    items: Items
    begun: Array | None = None
    spans: dict[Span[Request], None] = field(default_factory=dict)
    open: int = 0
    waiting: int = 0
    dropped: bool = False
    errors: dict[int, str] = field(default_factory=dict)
    waits_since: list[float] = field(default_factory=list)
    budget_seconds: list[float] = field(default_factory=list)
    compute_seconds: list[float] = field(default_factory=list)
    last: tuple[int, float] = (0, 0.0)

    def __post_init__(self) -> None:
        count = self.open = len(self.items)
        self.waits_since = [self.arrived] * count
        self.budget_seconds, self.compute_seconds = [0.0] * count, [0.0] * count

    def answer(self) -> Answer:
        """Return the answers of all texts."""
        items = self.items
        index, finished = self.last
        budget, compute = self.budget_seconds[index], self.compute_seconds[index]
        unpredicted = items.predicted == LAYERWISE
        answers = Answers(
            items.logits,
            items.step,
            np.where(unpredicted, UNPREDICTED, items.predicted)
            if unpredicted.any()
            else items.predicted,
            items.ran,
            items.total_heads,
            items.macs,
            items.dense_macs,
            np.zeros_like(items.step) if items.done.all() else np.where(items.done, 0, items.step),
            [list(map(list, heads)) for heads in items.selected_heads]
            if self.return_heads
            else None,
            self.errors,
        )
        return Answer(
            self.id,
            SentAnswers.of(answers),
            budget,
            max(finished - self.arrived - budget - compute, 0.0),
            compute,
            self.quality,
        )


@dataclass(eq=False)
class ModelQueue:
    """The requests of one model, and running totals of their texts.

    Attributes:
        requests: requests in the order of their arrival.
        waiting: number of texts that wait for a decision or a pass.
        price: price of the waiting texts.
        open: number of texts without an answer, waiting or running.
    """

    requests: dict[Request, None] = field(default_factory=dict)
    waiting: int = 0
    price: TotalSeconds = field(default_factory=TotalSeconds)
    open: int = 0

    @property
    def oldest(self) -> float | None:
        """Arrival of the oldest request with a waiting text."""
        return next((request.arrived for request in self.requests if request.waiting), None)

    def wait(self, span: Span[Request]) -> None:
        """Count the texts of a span as waiting."""
        span.owner.waiting += len(span)
        self.waiting += len(span)
        self.price += span.total

    def leave(self, span: Span[Request]) -> None:
        """Count the texts of a span as no longer waiting, since they run or were dropped."""
        span.owner.waiting -= len(span)
        self.waiting -= len(span)
        self.price -= span.total
