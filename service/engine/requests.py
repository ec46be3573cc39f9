"""Requests that an engine holds, and the running totals of each model's queue."""

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
    """A request, from its admission to its answer.

    Attributes:
        id: of the message that asked.
        reply: sends messages back to whom it came from.
        model: that it asks.
        queue: of that model.
        arrived, deadline: on the engine's clock.
        return_heads: whether the answer names the heads that were computed.
        context: whose request it is.
        quality: level, or points given up.
        outlook: the steps that its texts are expected to run.
        lane: where its texts wait.
        items: its texts.
        begun: steps at which texts begin that another engine has begun, [B]; None: there is none.
        spans: those of its texts that wait.
        open: texts without an answer: those that wait, and those that run.
        waiting: of these, texts that wait.
        gone: whether it was cancelled, or is too late.
        errors: by place, why a text failed.
        waits_since: when each text arrived or its last pass ended.
        budget_seconds, compute_seconds: of the passes that each text was in.
        last: the text that was finished last, and when.
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
    gone: bool = False
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
        """Return the answers of all its texts."""
        items = self.items
        place, finished = self.last
        budget, compute = self.budget_seconds[place], self.compute_seconds[place]
        unknown = items.predicted == LAYERWISE
        answers = Answers(
            items.logits,
            items.step,
            np.where(unknown, UNPREDICTED, items.predicted) if unknown.any() else items.predicted,
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
        requests: in the order of their arrival.
        waiting: texts that wait, to be decided or in a bucket.
        price: of the texts that wait.
        open: texts without an answer: those that wait, and those that run.
    """

    requests: dict[Request, None] = field(default_factory=dict)
    waiting: int = 0
    price: TotalSeconds = field(default_factory=TotalSeconds)
    open: int = 0

    @property
    def oldest(self) -> float | None:
        """Arrival of the oldest request with a text that waits; those before it run."""
        return next((request.arrived for request in self.requests if request.waiting), None)

    def wait(self, span: Span[Request]) -> None:
        """Count the texts of a span as waiting."""
        span.owner.waiting += len(span)
        self.waiting += len(span)
        self.price += span.total

    def leave(self, span: Span[Request]) -> None:
        """Count the texts of a span as no longer waiting: they run, or the request is dropped."""
        span.owner.waiting -= len(span)
        self.waiting -= len(span)
        self.price -= span.total
