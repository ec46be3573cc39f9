"""An engine in virtual time: the scheduler as it is, and costs in place of a network.

What `service.engine.core` does between its messages, without its processes and its tensors:
admission, level, arrivals, batches, escalation, expiry. Each pass takes what the cost table says.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Literal, cast

from budgetformer.checkpoint.store import Checkpoint
from budgetformer.cost.table import CostTable
from budgetformer.inference.policy import QUALITY_NAMES, QualityName
from service.scheduling.admission import Refusal, admit
from service.scheduling.arrivals import decided_together
from service.scheduling.brownout import BrownOut, BrownOutLimits, levels_down_to
from service.scheduling.buckets import Buckets, Entry, Lane, lane_of
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
        open: texts without an answer.
        gone: an engine does not hold it any more.
        held: its front has let it in.
        front, engine: of its server, where it is.
        outcome: empty until it is known.
        slots: the texts in their engine.
    """

    __slots__ = (
        "arrived", "deadline", "engine", "front", "gone", "held", "lane", "level", "open",
        "outcome", "slots", "texts", "tokens",
    )  # fmt: skip

    def __init__(self, arrived: float, deadline: float, texts: Sequence[Text]) -> None:
        self.arrived = arrived
        self.deadline = deadline
        self.texts = texts
        self.tokens = sum([text.exit_tokens for text in texts])
        self.lane: Lane = lane_of(len(texts))
        self.level: QualityName = DEFAULT_QUALITY
        self.open = len(texts)
        self.gone = False
        self.held = False
        self.front = 0
        self.engine = 0
        self.outcome: Outcome | None = None
        self.slots: list[_Slot] = []


class _Slot:
    """One text of a request that an engine holds."""

    __slots__ = ("entry", "price", "request", "runs", "steps", "text")

    def __init__(self, request: SimRequest, text: Text, price: float) -> None:
        self.request = request
        self.text = text
        self.price = price
        self.steps = text.steps[request.level]
        self.runs = 0
        self.entry: Entry[_Slot] | None = None


class SimEngine:
    """One engine; whoever holds it begins its passes and tells it when they end.

    `running` and `step` say what runs: 0 is the decision on arrival.

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
        self.prices.know(_MODEL, model.table)
        self.drain = Drain()
        seconds = settings.brownout_queue_ms / 1000
        self.brownout = BrownOut(
            levels_down_to(settings.quality_floor), BrownOutLimits(seconds, seconds / 4)
        )
        self.buckets: Buckets[_Slot] = Buckets(
            settings.batch_milliseconds / 1000, settings.batch_items, self._constant
        )
        self._named = None if settings.quality == "auto" else cast(QualityName, settings.quality)
        self._most = settings.max_queue_items
        self._cost = cost
        self._expire = expire
        self._here: deque[SimRequest] = deque()
        self._arrivals: OrderedDict[_Slot, None] = OrderedDict()
        self.running: list[_Slot] = []
        self._held = TotalSeconds()
        """Prices of the arrivals and of what runs."""
        self.step = 0
        self._began = self._pass = self._work = 0.0
        self._beside = 0.0
        """What was done meanwhile, and is still to be counted."""
        self._batch_next = False

    @property
    def queued_seconds(self) -> float:
        """Seconds that all that is here will take, as fast as it drains now."""
        return self.drain.stretch * (self.buckets.seconds + self._held.seconds)

    def receive(self, request: SimRequest, now: float) -> Refusal | None:
        """Take a request in, or say why not."""
        queued = self.queued_seconds
        request.level = self._named or self.brownout.observe(queued, now)
        outlook = self.model.outlooks[request.level]
        tokens = [text.tokens for text in request.texts]
        exit_tokens = [text.exit_tokens for text in request.texts]
        prices = self.prices.expected_each(_MODEL, outlook, tokens, exit_tokens)
        price = sum(prices)
        self._beside += self._cost.request
        refusal = admit(
            items=len(prices),
            queued_items=len(self.buckets) + len(self._arrivals) + len(self.running),
            max_items=self._most,
            queued_seconds=queued,
            price=price,
            remaining=request.deadline - now,
        )
        if refusal is None:
            self._here.append(request)
            request.slots = list(map(_Slot, repeat(request), request.texts, prices))
            self._arrivals.update(dict.fromkeys(request.slots))
            for one in prices:
                self._held.add(one)
        return refusal

    def begin(self, now: float) -> float | None:
        """Begin the next pass; return its seconds of processor time, None if there is nothing.

        As the engine does, it decides the budgets of what has come before each batch.
        """
        while self._arrivals or len(self.buckets):
            self._batch_next = not self._batch_next
            if self._batch_next:
                self._drop_late(now)
                if self._arrivals:
                    count = decided_together(slot.text.exit_tokens for slot in self._arrivals)
                    came = [self._arrivals.popitem(last=False)[0] for _ in range(count)]
                    return self._run(0, came, now)
            elif batch := [entry.item for entry in self.buckets.take()]:
                for slot in batch:
                    slot.entry = None
                    self._held.add(slot.price)
                return self._run(batch[0].steps[batch[0].runs], batch, now)
        self._batch_next = False
        return None

    def finish(self, now: float) -> list[SimRequest]:
        """End the pass that runs; return the requests that have all their answers now."""
        batch, self.running = self.running, []
        priced = sum([slot.price for slot in batch])
        for slot in batch:
            self._held.subtract(slot.price)
        if self.step and self._work:
            # A pass is priced by the time it takes, slowed by whatever shares its core.
            seconds = (now - self._began) * self._pass / self._work
            tokens = sum([slot.text.tokens for slot in batch])
            self.prices.observe(_MODEL, self.step, tokens, len(batch), seconds)
        ran = 1 if self.step else 0
        answered = []
        for slot in batch:
            request = slot.request
            slot.runs += ran
            if slot.runs < len(slot.steps):
                self._wait(slot)
                priced -= slot.price
                continue
            request.open -= 1
            if not request.open:
                request.gone = True
                answered.append(request)
        self.drain.observe(now - self._began, priced)
        if not self._arrivals and not len(self.buckets):
            self.brownout.observe(0.0, now)  # a real engine looks once a second, asked or not
        return answered

    def _run(self, step: int, batch: list[_Slot], now: float) -> float:
        tokens = sum([slot.text.tokens if step else slot.text.exit_tokens for slot in batch])
        ran = 1 if step else 0
        answered = sum([slot.runs + ran >= len(slot.steps) for slot in batch])
        cost = self._cost
        self.running, self.step, self._began = batch, step, now
        self._pass = self.model.table.batch(step, tokens, len(batch))
        self._work = self._pass + cost.run + cost.text * answered + self._beside
        self._beside = 0.0
        return self._work

    def _wait(self, slot: _Slot) -> None:
        """Let a text wait in the bucket of its next step."""
        request, step = slot.request, slot.steps[slot.runs]
        outlook = self.model.outlooks[request.level]
        slot.price = self.prices.item(_MODEL, step, outlook, slot.text.tokens)
        slot.entry = Entry(slot, step, slot.price, request.arrived, request.deadline, request.lane)
        self.buckets.add(slot.entry)

    def _drop_late(self, now: float) -> None:
        here = self._here
        while here and (here[0].gone or here[0].deadline <= now):
            request = here.popleft()
            if not request.gone:
                self._drop(request)

    def _drop(self, request: SimRequest) -> None:
        request.gone = True
        for slot in request.slots:
            if slot in self._arrivals:
                del self._arrivals[slot]
                self._held.subtract(slot.price)
            elif slot.entry is not None:
                self.buckets.discard(slot.entry)
        self._expire(request)

    def _constant(self, bucket: Hashable) -> float:
        assert isinstance(bucket, int)
        return self.prices.constant(_MODEL, bucket)
