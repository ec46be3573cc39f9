"""Simulation of an engine in virtual time, with the real scheduler and costs instead of a network.

It does what `service.engine.core` does, without processes and tensors: admission, level, batches,
escalation, expiry. A pass takes the time that the cost table predicts. Frontends decide the budgets
(`service.simulation.server`), so only texts that need a pass are sent here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from budgetformer.checkpoint.store import Checkpoint
from budgetformer.cost.table import CostTable
from budgetformer.inference.policy import QUALITY_NAMES, QualityName
from service.scheduling.admission import Refusal, admit
from service.scheduling.brownout import BrownOut, BrownOutLimits, levels_down_to
from service.scheduling.buckets import Buckets, Lane, Span, lane_of
from service.scheduling.drain import Drain
from service.scheduling.price import Outlook, Prices
from service.scheduling.totals import TotalSeconds
from service.settings import DEFAULT_QUALITY, Settings
from service.simulation.costs import EngineCost
from service.simulation.texts import Text

_MODEL = "model"
"""Key of the only model of a simulation in `Prices`."""


Outcome = Literal["answered", "refused", "expired"]


@dataclass(frozen=True)
class SimModel:
    """A model: the cost table of its passes, and the steps that texts should run at each level."""

    table: CostTable
    outlooks: Mapping[QualityName, Outlook]

    @classmethod
    def of(cls, checkpoint: Checkpoint, table: CostTable) -> SimModel:
        """Create the model of a calibrated checkpoint."""
        return cls(table, {level: Outlook.of(checkpoint.rule(level)) for level in QUALITY_NAMES})


class SimRequest:
    """A request.

    Attributes:
        arrived, deadline: times in seconds.
        texts: its texts.
        tokens: number of tokens of all texts, as step 0 reads them.
        lane: lane in which its texts wait.
        level: its quality level.
        open: number of texts without an answer of the engine.
        left_engine: whether the engine has answered or dropped it.
        held: whether the frontend has admitted it.
        frontend, engine: indices of its frontend and engine in the server.
        outcome: outcome; None: not known yet.
        sent: number of texts that the frontend sent to the engine.
        waiting: spans of its texts that wait in the engine.
    """

    __slots__ = (
        "arrived", "deadline", "engine", "frontend", "held", "lane", "left_engine", "level", "open",
        "outcome", "sent", "texts", "tokens", "waiting",
    )  # fmt: skip

    def __init__(self, arrived: float, deadline: float, texts: Sequence[Text]) -> None:
        self.arrived = arrived
        self.deadline = deadline
        self.texts = texts
        self.tokens = sum([text.step_0_tokens for text in texts])
        self.lane: Lane = lane_of(len(texts))
        self.level: QualityName = DEFAULT_QUALITY
        self.open = 0
        self.left_engine = False
        self.held = False
        self.sent = 0
        self.frontend = 0
        self.engine = 0
        self.outcome: Outcome | None = None
        self.waiting: set[Span[SimRequest]] = set()


class SimEngine:
    """One engine; its owner calls `begin` and `finish` for each pass.

    Args:
        model: its only model.
        settings: settings of the server.
        cost: cost of its work outside of passes.
        expire: called with each request whose deadline passed while it waited.

    Attributes:
        running, step: spans and ladder step of the running pass.
    """

    def __init__(
        self,
        model: SimModel,
        settings: Settings,
        cost: EngineCost,
        expire: Callable[[SimRequest], None],
    ) -> None:
        self.model = model
        self.prices = Prices()
        self.prices.set_table(_MODEL, model.table)
        self.drain = Drain()
        seconds = settings.brownout_queue_ms / 1000
        self.brownout = BrownOut(
            levels_down_to(settings.quality_floor), BrownOutLimits(seconds, seconds / 4)
        )
        self.buckets: Buckets[SimRequest] = Buckets(
            settings.batch_milliseconds / 1000, settings.batch_items, self._constant
        )
        auto = settings.quality == "auto"
        self._fixed_level = None if auto else cast(QualityName, settings.quality)
        self._max_items = settings.max_queue_items
        self._cost = cost
        self._expire = expire
        self._requests: deque[SimRequest] = deque()
        self.running: list[Span[SimRequest]] = []
        self._running_price = TotalSeconds()
        self.step = 0
        self._began = self._pass = self._work = 0.0
        self._overhead = 0.0
        """Seconds of work outside of passes since the last pass began."""

    @property
    def queued_seconds(self) -> float:
        """Time until all present items are computed, at the present speed of the queue."""
        return self.drain.stretch * (self.buckets.seconds + self._running_price.seconds)

    def level(self, now: float) -> QualityName:
        """Return the quality level of a request that arrives now."""
        return self._fixed_level or self.brownout.observe(self.queued_seconds, now)

    def receive(self, request: SimRequest, now: float) -> Refusal | None:
        """Queue the texts of a request that need a pass at its level, or return why not."""
        queued = self.queued_seconds
        outlook = self.model.outlooks[request.level]
        items = [
            (index, steps[0], self.prices.item(_MODEL, steps[0], outlook, text.tokens))
            for index, text in enumerate(request.texts)
            if (steps := text.steps[request.level])
        ]
        self._overhead += self._cost.request
        refusal = admit(
            items=len(items),
            queued_items=len(self.buckets) + sum(map(len, self.running)),
            max_items=self._max_items,
            queued_seconds=queued,
            price=sum([price for _, _, price in items]),
            remaining=request.deadline - now,
        )
        if refusal is None:
            self._requests.append(request)
            request.open = len(items)
            self._wait(request, items)
        return refusal

    def begin(self, now: float) -> float | None:
        """Begin the next pass, and return its processor time; None: no text waits."""
        self._drop_late(now)
        batch = self.buckets.take()
        if not batch:
            return None
        for span in batch:
            span.owner.waiting.discard(span)
            self._running_price += span.total
        step = batch[0].bucket
        assert isinstance(step, int)
        return self._run(step, batch, now)

    def finish(self, now: float) -> list[SimRequest]:
        """End the running pass, and return the requests that are now completely answered."""
        batch, self.running = self.running, []
        priced = sum([price for span in batch for price in span.prices])
        for span in batch:
            self._running_price -= span.total
        if self._work:
            # The measured time of a pass includes the slowdown by processes on the same core.
            seconds = (now - self._began) * self._pass / self._work
            tokens, count = _size(batch)
            self.prices.observe(_MODEL, self.step, tokens, count, seconds)
        answered = []
        for span in batch:
            request = span.owner
            outlook = self.model.outlooks[request.level]
            continuing = []
            for index in span.indices:
                text = request.texts[index]
                step = text.step_after(self.step, request.level)
                if step is None:
                    request.open -= 1
                else:
                    price = self.prices.item(_MODEL, step, outlook, text.tokens)
                    priced -= price
                    continuing.append((index, step, price))
            self._wait(request, continuing)
            if not request.open:
                request.left_engine = True
                answered.append(request)
        self.drain.observe(now - self._began, priced)
        if not len(self.buckets):
            self.brownout.observe(0.0, now)  # a real engine observes with each heartbeat
        return answered

    def _run(self, step: int, batch: list[Span[SimRequest]], now: float) -> float:
        tokens, count = _size(batch)
        answered = sum(
            [
                span.owner.texts[index].step_after(step, span.owner.level) is None
                for span in batch
                for index in span.indices
            ]
        )
        cost = self._cost
        self.running, self.step, self._began = batch, step, now
        self._pass = self.model.table.batch(step, tokens, count)
        self._work = self._pass + cost.run + cost.text * answered + self._overhead
        self._overhead = 0.0
        return self._work

    def _wait(self, request: SimRequest, items: Iterable[tuple[int, int, float]]) -> None:
        """Let texts of a request wait, each given by its index, step and price."""
        by_step: dict[int, tuple[list[int], list[float]]] = {}
        for index, step, price in items:
            indices, prices = by_step.setdefault(step, ([], []))
            indices.append(index)
            prices.append(price)
        for step, (indices, prices) in by_step.items():
            span = Span(
                request, indices, prices, step, request.arrived, request.deadline, request.lane
            )
            request.waiting.add(span)
            self.buckets.add(span)

    def _drop_late(self, now: float) -> None:
        requests = self._requests
        while requests and (requests[0].left_engine or requests[0].deadline <= now):
            request = requests.popleft()
            if not request.left_engine:
                self._drop(request)

    def _drop(self, request: SimRequest) -> None:
        request.left_engine = True
        while request.waiting:
            self.buckets.discard(request.waiting.pop())
        self._expire(request)

    def _constant(self, bucket: Hashable) -> float:
        assert isinstance(bucket, int)
        return self.prices.constant(_MODEL, bucket)


def _size(batch: Sequence[Span[SimRequest]]) -> tuple[int, int]:
    """Return the numbers of tokens and texts of a batch."""
    tokens = [span.owner.texts[index].tokens for span in batch for index in span.indices]
    return sum(tokens), len(tokens)
