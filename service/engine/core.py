"""The engine's heart: inbox, f_o on arrival, buckets, passes, answers.

One coroutine owns all state. It hands the device one piece of work at a time in a thread of its
own, and what arrives meanwhile is decided and batched next: a batch forms because the device is
busy, never by waiting.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from budgetformer import cascade
from budgetformer.cascade import Work
from budgetformer.compact import PackedPass
from budgetformer.cost import dense_macs
from budgetformer.errors import CheckpointError, PolicyError
from budgetformer.precision import Precision
from service.background import Background
from service.engine import protocol
from service.engine.models import LoadedModel, load_model
from service.engine.protocol import (
    Answer,
    BatchRan,
    Cancel,
    Classify,
    Done,
    Expired,
    Failed,
    Heartbeat,
    ItemAnswer,
    Load,
    Refused,
    ToFront,
    Unload,
)
from service.observability.context import RequestContext
from service.observability.traces import PassRun, PassSpans, Rider, Stage
from service.scheduling.admission import Refusal, admit
from service.scheduling.buckets import Buckets, Entry
from service.scheduling.price import PriceList

log = structlog.get_logger()

Reply = Callable[[ToFront], None]
Clock = Callable[[], float]

ARRIVAL_TOKENS = 8192
"""Most tokens whose budgets are decided in one go.

So that a huge request does not hold up the device.
"""


@dataclass(frozen=True)
class EngineOptions:
    """How much may wait, and how large a batch may be."""

    max_queue_items: int = 4096
    batch_seconds: float = 0.05
    batch_items: int = 256


@dataclass(eq=False)
class _Request:
    id: int
    reply: Reply
    model: LoadedModel
    arrived: float
    deadline: float
    return_heads: bool
    context: RequestContext
    slots: list[_Slot] = field(default_factory=list)
    open: int = 0
    gone: bool = False


@dataclass(eq=False)
class _Slot:
    """One item of a request."""

    request: _Request
    work: Work
    price: float
    waits_since: float
    budget_seconds: float = 0.0
    compute_seconds: float = 0.0
    finished: float = 0.0
    error: str = ""


class EngineCore:
    """Serve requests on one device.

    Args:
        options: limits.
        device: where `Load` puts further models.
        precision: of their passes.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        options: EngineOptions,
        device: str = "cpu",
        precision: Precision = "float32",
        clock: Clock = time.monotonic,
    ) -> None:
        self.models: dict[tuple[str, int], LoadedModel] = {}
        self.options = options
        self.device = device
        self.precision = precision
        self.prices = PriceList()
        self.broadcast: Reply = lambda _: None
        self.spans: PassSpans | None = None
        self._clock = clock
        self._buckets: Buckets[_Slot] = Buckets(options.batch_seconds, options.batch_items)
        self._arrivals: list[_Slot] = []
        self._running: list[_Slot] = []
        self._requests: dict[tuple[Reply, int], _Request] = {}
        self._work_came = asyncio.Event()
        self._compute = ThreadPoolExecutor(1, thread_name_prefix="device")
        self._loading = ThreadPoolExecutor(1, thread_name_prefix="loading")
        self._background = Background()

    # Messages of the fronts

    def receive(self, message: protocol.ToEngine, reply: Reply) -> None:
        """Take one message of a front; `reply` sends messages back to it."""
        match message:
            case Classify():
                self._classify(message, reply)
            case Cancel():
                self._drop(self._requests.get((reply, message.id)))
            case Load():
                self._background.start(self._load(message, reply))
            case Unload():
                self._unload(message, reply)

    def forget(self, reply: Reply) -> None:
        """Drop everything that a front asked for, which is gone."""
        for request in [r for (owner, _), r in self._requests.items() if owner == reply]:
            self._drop(request)

    def heartbeat(self, memory_bytes: int) -> Heartbeat:
        """Describe the queue."""
        now = self._clock()
        names = {name for name, _ in self.models}
        items: dict[str, int] = dict.fromkeys(names, 0)
        seconds = dict.fromkeys(names, 0.0)
        oldest = dict.fromkeys(names, 0.0)
        in_flight = dict.fromkeys(names, 0)
        running = set(self._running)
        for request in self._requests.values():
            name = request.model.checkpoint.name
            waiting = [s for s in request.slots if not s.finished and s not in running]
            items[name] = items.get(name, 0) + len(waiting)
            seconds[name] = seconds.get(name, 0.0) + sum(s.price for s in waiting)
            in_flight[name] = in_flight.get(name, 0) + request.open
            if waiting:
                oldest[name] = max(oldest.get(name, 0.0), now - request.arrived)
        return Heartbeat(items, seconds, oldest, in_flight, memory_bytes)

    def _classify(self, message: Classify, reply: Reply) -> None:
        model = self.models.get((message.model, message.version))
        if model is None:
            reply(Failed(message.id, f"model {message.model}:{message.version} is not loaded"))
            return
        try:
            rule = model.rule(message.quality, message.heads, message.max_heads)
        except PolicyError as error:
            reply(Failed(message.id, str(error)))
            return
        share = model.expected_share(rule)
        now = self._clock()
        request = _Request(
            message.id,
            reply,
            model,
            now,
            now + message.remaining,
            message.return_heads,
            RequestContext(message.request_id, message.traceparent),
        )
        for tokens in message.items:
            ids = protocol.unpack_ids(tokens.ids)
            segments = protocol.unpack_ids(tokens.segments) if tokens.segments else None
            dense = dense_macs(model.network.sizes, len(ids))
            price = self.prices.seconds(int(share * dense))
            request.slots.append(_Slot(request, Work(ids, segments, rule), price, now))
        refusal = self._admit(request, message.remaining)
        if refusal is not None:
            reply(Refused(message.id, refusal.reason, refusal.retry_after))
            return
        request.open = len(request.slots)
        self._requests[reply, message.id] = request
        self._arrivals += request.slots
        self._work_came.set()

    def _admit(self, request: _Request, remaining: float) -> Refusal | None:
        waiting = [*self._arrivals, *self._running]
        return admit(
            items=len(request.slots),
            queued_items=len(self._buckets) + len(waiting),
            max_items=self.options.max_queue_items,
            queued_seconds=self._buckets.seconds + sum(slot.price for slot in waiting),
            price=sum(slot.price for slot in request.slots),
            remaining=remaining,
        )

    # The loop

    async def run(self) -> None:
        """Serve until cancelled."""
        while True:
            if not self._arrivals and not len(self._buckets):
                self._work_came.clear()
                await self._work_came.wait()
            self._expire()
            await self._decide_arrivals()
            await self._run_batch()

    async def _decide_arrivals(self) -> None:
        tokens = count = 0
        for slot in self._arrivals:
            tokens += len(slot.work.ids)
            if count and tokens > ARRIVAL_TOKENS:
                break
            count += 1
        self._running, self._arrivals = self._arrivals[:count], self._arrivals[count:]
        by_model: defaultdict[LoadedModel, list[_Slot]] = defaultdict(list)
        for slot in self._running:
            by_model[slot.request.model].append(slot)
        for model, slots in by_model.items():
            seconds = await self._on_device(cascade.arrive, model.network, slots)
            for slot in slots:
                slot.budget_seconds += seconds
                self._settle(slot)
            exits = [slot for slot in slots if slot.work.done and not slot.error]
            if exits:
                self._report(model, 0, exits, seconds)
        self._running = []

    async def _run_batch(self) -> None:
        batch = [entry.item for entry in self._buckets.take()]
        if not batch:
            return
        self._running = batch
        model, step = batch[0].request.model, batch[0].work.step
        before = sum(slot.work.macs for slot in batch)
        seconds = await self._on_device(cascade.run, model.network, batch)
        self.prices.observe(max(1, sum(slot.work.macs for slot in batch) - before), seconds)
        self._report(model, step, batch, seconds)
        self._running = []
        for slot in batch:
            slot.compute_seconds += seconds
            self._settle(slot)

    async def _on_device(
        self,
        work: Callable[[PackedPass, Sequence[Work]], None],
        network: PackedPass,
        slots: list[_Slot],
    ) -> float:
        step = slots[0].work.step

        def compute() -> tuple[float, float]:
            started = self._clock()
            try:
                work(network, [slot.work for slot in slots])
            except Exception as error:  # one poisoned item must not take its batch with it
                log.warning("a batch failed, trying its items alone", reason=type(error).__name__)
                for slot in slots:
                    self._alone(work, network, slot)
            return started, self._clock()

        loop = asyncio.get_running_loop()
        started, ended = await loop.run_in_executor(self._compute, compute)
        if self.spans is not None:
            stage: Stage = "budget" if work is cascade.arrive else "compute"
            name, version = slots[0].request.model.key
            tokens = sum(len(slot.work.ids) for slot in slots)
            self.spans.ran(
                PassRun(stage, f"{name}:{version}", step, tokens, _riders(slots), started, ended)
            )
        for slot in slots:
            slot.waits_since = ended
        return ended - started

    @staticmethod
    def _alone(
        work: Callable[[PackedPass, Sequence[Work]], None], network: PackedPass, slot: _Slot
    ) -> None:
        try:
            work(network, [slot.work])
        except Exception as error:  # whatever it is, it is this item's own failure
            log.warning(
                "an item failed",
                reason=type(error).__name__,
                request_id=slot.request.context.request_id,
                trace_id=slot.request.context.trace_id,
            )
            slot.error = "the item could not be computed"

    def _settle(self, slot: _Slot) -> None:
        """After a pass: an item is finished, or waits in the bucket of its next step."""
        request, work = slot.request, slot.work
        if request.gone:
            return
        if work.logits is not None and not all(map(math.isfinite, work.logits.tolist())):
            slot.error = "the network's answer is not a finite number"
        if not slot.error and not work.done:
            ahead = self._macs_of(slot)
            slot.price = self.prices.seconds(ahead)
            self._buckets.add(
                Entry(
                    slot, (request.model, work.step), slot.price, request.arrived, request.deadline
                )
            )
            return
        slot.finished = self._clock()
        request.open -= 1
        if not request.open:
            self._answer(request)

    def _macs_of(self, slot: _Slot) -> int:
        model, work = slot.request.model, slot.work
        if work.step == cascade.LAYERWISE:
            return work.dense_macs
        sizes, plan = model.network.sizes, model.checkpoint.ladder[work.step - 1]
        return work.dense_macs * sum(plan) // (sizes.heads * sizes.layers)

    def _answer(self, request: _Request) -> None:
        del self._requests[request.reply, request.id]
        last = max(request.slots, key=lambda slot: slot.finished)
        waited = last.finished - request.arrived - last.budget_seconds - last.compute_seconds
        items = [_item_answer(slot, request.return_heads) for slot in request.slots]
        request.reply(
            Answer(request.id, items, last.budget_seconds, max(waited, 0.0), last.compute_seconds)
        )

    def _expire(self) -> None:
        now = self._clock()
        for request in [r for r in self._requests.values() if r.deadline <= now]:
            self._drop(request)
            request.reply(Expired(request.id))

    def _drop(self, request: _Request | None) -> None:
        if request is None:
            return
        request.gone = True
        del self._requests[request.reply, request.id]
        self._arrivals = [slot for slot in self._arrivals if slot.request is not request]
        self._buckets.remove(lambda entry: entry.item.request is request)

    def _report(self, model: LoadedModel, step: int, slots: list[_Slot], seconds: float) -> None:
        tokens = sum(len(slot.work.ids) for slot in slots)
        name, version = model.key
        budget = max(slot.work.step for slot in slots) if step == cascade.LAYERWISE else step
        self.broadcast(BatchRan(name, version, budget, len(slots), tokens, 0.0, seconds))

    # Models

    async def _load(self, message: Load, reply: Reply) -> None:
        loop = asyncio.get_running_loop()
        try:
            model = await loop.run_in_executor(
                self._loading, load_model, Path(message.path), self.device, self.precision
            )
        except CheckpointError as error:
            reply(Failed(message.id, str(error)))
            return
        self.models[model.key] = model
        reply(Done(message.id, model.info))

    def _unload(self, message: Unload, reply: Reply) -> None:
        # Items already here keep the model that they came for; it is freed with the last of them.
        if self.models.pop((message.model, message.version), None) is None:
            reply(Failed(message.id, f"model {message.model}:{message.version} is not loaded"))
        else:
            reply(Done(message.id))


def _riders(slots: list[_Slot]) -> list[Rider]:
    return [Rider(slot.request.context, slot.waits_since, slot.work.step) for slot in slots]


def _item_answer(slot: _Slot, return_heads: bool) -> ItemAnswer:
    work = slot.work
    if slot.error or work.logits is None:
        return ItemAnswer(error=slot.error or "the item could not be computed")
    return ItemAnswer(
        logits=work.logits.tolist(),
        budget=work.step,
        heads=work.heads,
        chosen=[list(heads) for heads in work.chosen] if return_heads else None,
        macs=work.macs,
        dense_macs=work.dense_macs,
    )
