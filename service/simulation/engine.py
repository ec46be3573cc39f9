"""An engine in virtual time: the scheduler as it is, and costs in place of a network.

What `service.engine.core` does between its messages, without its processes and its tensors:
admission, level, batches, escalation, expiry. Each pass takes what the cost table says. Budgets are
decided in the frontend (`service.simulation.server`), so only texts that need a pass come here.
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
"""Under which the one model of a simulation is priced."""


Outcome = Literal["answered", "refused", "expired"]


@dataclass(frozen=True)
class SimModel:
    """A model: what its passes cost, and which steps texts are expected to run at each level."""

    table: CostTable
    outlooks: Mapping[QualityName, Outlook]

    @classmethod
    def of(cls, checkpoint: Checkpoint, table: CostTable) -> SimModel:
        """Take the outlooks of a calibrated checkpoint."""
        return cls(table, {level: Outlook.of(checkpoint.rule(level)) for level in QUALITY_NAMES})


class SimRequest:
    """A request on its way.

    Attributes:
        arrived, deadline: in seconds, and after which its answer is worthless.
        texts, tokens: what is asked, and its tokens in all, as step 0 reads them.
        level: quality that it gets.
        open: texts that wait for an engine's answer.
        gone: an engine does not hold it any more.
        held: its frontend has let it in.
        frontend, engine: of its server, where it is.
        outcome: empty until it is known.
        sent: texts that its frontend sent to an engine.
        waiting: its texts that wait in the buckets of their engine, as spans of places in `texts`.
    """

    __slots__ = (
        "arrived", "deadline", "engine", "frontend", "gone", "held", "lane", "level", "open",
        "outcome", "sent", "texts", "tokens", "waiting",
    )  # fmt: skip

    def __init__(self, arrived: float, deadline: float, texts: Sequence[Text]) -> None:
        self.arrived = arrived
        self.deadline = deadline
        self.texts = texts
        self.tokens = sum([text.exit_tokens for text in texts])
        self.lane: Lane = lane_of(len(texts))
        self.level: QualityName = DEFAULT_QUALITY
        self.open = 0
        self.gone = False
        self.held = False
        self.sent = 0
        self.frontend = 0
        self.engine = 0
        self.outcome: Outcome | None = None
        self.waiting: set[Span[SimRequest]] = set()


class SimEngine:
    """One engine; whoever holds it begins its passes and tells it when they end.

    `running` and `step` say what runs.

    Args:
        model: the only one that it serves.
        settings: of the server.
        cost: of what it does beside the passes.
        expire: is told of every request that waited past its deadline.
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
        self._named = None if settings.quality == "auto" else cast(QualityName, settings.quality)
        self._most = settings.max_queue_items
        self._cost = cost
        self._expire = expire
        self._here: deque[SimRequest] = deque()
        self.running: list[Span[SimRequest]] = []
        self._held = TotalSeconds()
        """Prices of what runs."""
        self.step = 0
        self._began = self._pass = self._work = 0.0
        self._beside = 0.0
        """What was done meanwhile, and is still to be counted."""

    @property
    def queued_seconds(self) -> float:
        """Seconds that all that is here will take, as fast as it drains now."""
        return self.drain.stretch * (self.buckets.seconds + self._held.seconds)

    def level(self, now: float) -> QualityName:
        """Return the quality level of a request that comes now."""
        return self._named or self.brownout.observe(self.queued_seconds, now)

    def receive(self, request: SimRequest, now: float) -> Refusal | None:
        """Take the texts of a request in that need a pass at its level, or say why not."""
        queued = self.queued_seconds
        outlook = self.model.outlooks[request.level]
        items = [
            (place, steps[0], self.prices.item(_MODEL, steps[0], outlook, text.tokens))
            for place, text in enumerate(request.texts)
            if (steps := text.steps[request.level])
        ]
        self._beside += self._cost.request
        refusal = admit(
            items=len(items),
            queued_items=len(self.buckets) + sum(map(len, self.running)),
            max_items=self._most,
            queued_seconds=queued,
            price=sum([price for _, _, price in items]),
            remaining=request.deadline - now,
        )
        if refusal is None:
            self._here.append(request)
            request.open = len(items)
            self._wait(request, items)
        return refusal

    def begin(self, now: float) -> float | None:
        """Begin the next pass; return its seconds of processor time, None if there is nothing."""
        self._drop_late(now)
        batch = self.buckets.take()
        if not batch:
            return None
        for span in batch:
            span.owner.waiting.discard(span)
            self._held += span.total
        step = batch[0].bucket
        assert isinstance(step, int)
        return self._run(step, batch, now)

    def finish(self, now: float) -> list[SimRequest]:
        """End the pass that runs; return the requests that have all their answers now."""
        batch, self.running = self.running, []
        priced = sum([price for span in batch for price in span.prices])
        for span in batch:
            self._held -= span.total
        if self._work:
            # A pass is priced by the time it takes, slowed by whatever shares its core.
            seconds = (now - self._began) * self._pass / self._work
            tokens, count = _size(batch)
            self.prices.observe(_MODEL, self.step, tokens, count, seconds)
        answered = []
        for span in batch:
            request = span.owner
            outlook = self.model.outlooks[request.level]
            going_on = []
            for place in span.indices:
                text = request.texts[place]
                step = text.step_after(self.step, request.level)
                if step is None:
                    request.open -= 1
                else:
                    price = self.prices.item(_MODEL, step, outlook, text.tokens)
                    priced -= price
                    going_on.append((place, step, price))
            self._wait(request, going_on)
            if not request.open:
                request.gone = True
                answered.append(request)
        self.drain.observe(now - self._began, priced)
        if not len(self.buckets):
            self.brownout.observe(0.0, now)  # a real engine looks once a second, asked or not
        return answered

    def _run(self, step: int, batch: list[Span[SimRequest]], now: float) -> float:
        tokens, count = _size(batch)
        answered = sum(
            [
                span.owner.texts[place].step_after(step, span.owner.level) is None
                for span in batch
                for place in span.indices
            ]
        )
        cost = self._cost
        self.running, self.step, self._began = batch, step, now
        self._pass = self.model.table.batch(step, tokens, count)
        self._work = self._pass + cost.run + cost.text * answered + self._beside
        self._beside = 0.0
        return self._work

    def _wait(self, request: SimRequest, items: Iterable[tuple[int, int, float]]) -> None:
        """Let texts of a request wait, given as place, step and price."""
        by_step: dict[int, tuple[list[int], list[float]]] = {}
        for place, step, price in items:
            indices, prices = by_step.setdefault(step, ([], []))
            indices.append(place)
            prices.append(price)
        for step, (indices, prices) in by_step.items():
            span = Span(
                request, indices, prices, step, request.arrived, request.deadline, request.lane
            )
            request.waiting.add(span)
            self.buckets.add(span)

    def _drop_late(self, now: float) -> None:
        here = self._here
        while here and (here[0].gone or here[0].deadline <= now):
            request = here.popleft()
            if not request.gone:
                self._drop(request)

    def _drop(self, request: SimRequest) -> None:
        request.gone = True
        while request.waiting:
            self.buckets.discard(request.waiting.pop())
        self._expire(request)

    def _constant(self, bucket: Hashable) -> float:
        assert isinstance(bucket, int)
        return self.prices.constant(_MODEL, bucket)


def _size(batch: Sequence[Span[SimRequest]]) -> tuple[int, int]:
    """Return a batch's tokens and texts."""
    tokens = [span.owner.texts[place].tokens for span in batch for place in span.indices]
    return sum(tokens), len(tokens)
