"""The engine's heart: inbox, f_o on arrival, buckets, passes, answers.

One coroutine owns all state. It hands the device one piece of work at a time in a thread of its
own, and what arrives meanwhile is decided and batched next: a batch forms because the device is
busy, never by waiting.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import structlog
import torch

from budgetformer import cascade
from budgetformer.cascade import Work
from budgetformer.compact import PackedPass
from budgetformer.cost_table import CostTable
from budgetformer.errors import CheckpointError, PolicyError
from budgetformer.policy import QualityName
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
    ModelInfo,
    Models,
    Refused,
    ToFront,
    Unload,
)
from service.engine.salvage import salvage
from service.observability.context import RequestContext
from service.observability.passes import PassRun, PassSpans, Rider, Stage
from service.process import return_memory
from service.scheduling.admission import Refusal, admit
from service.scheduling.arrivals import decided_together
from service.scheduling.brownout import BrownOut, BrownOutLimits, levels_down_to
from service.scheduling.buckets import Buckets, Entry, Lane, lane_of
from service.scheduling.drain import Drain
from service.scheduling.price import Outlook, Prices

log = structlog.get_logger()

Reply = Callable[[ToFront], None]
Clock = Callable[[], float]

SETTLE_SECONDS = 1.0


@dataclass(frozen=True)
class EngineOptions:
    """How much may wait, how large a batch may be, and when quality gives way.

    Attributes:
        max_queue_items: items that wait at most.
        model_queue_items: of these, items of one model at most, by its name.
        batch_seconds, batch_items: see `Buckets`.
        quality: level of requests that leave it to the engine, while there is no overload.
        quality_floor: the lowest that overload may make of it.
        brownout_seconds: of queue, beyond which it does.
        max_step: the highest ladder step that it computes, None: any. An item that needs a higher
            one is given back with what it needs, for an engine that does.
    """

    max_queue_items: int = 4096
    batch_seconds: float = 0.05
    batch_items: int = 256
    quality: QualityName = "balanced"
    quality_floor: QualityName = "fast"
    brownout_seconds: float = 0.5
    model_queue_items: Mapping[str, int] = field(default_factory=dict)
    max_step: int | None = None


@dataclass(eq=False)
class _Request:
    id: int
    reply: Reply
    model: LoadedModel
    arrived: float
    deadline: float
    return_heads: bool
    context: RequestContext
    quality: str | float
    outlook: Outlook
    lane: Lane
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
    begin: int = 0
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
        tables: measured costs, by `name:version`.
        shared: folder through which engines hold weights once; None: this one has its own.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        options: EngineOptions,
        device: str = "cpu",
        precision: Precision = "float32",
        tables: Mapping[str, CostTable] | None = None,
        shared: Path | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self.models: dict[tuple[str, int], LoadedModel] = {}
        self.options = options
        self.device = device
        self.precision = precision
        self.tables = tables or {}
        self.shared = shared
        self.prices = Prices()
        self.drain = Drain()
        limits = BrownOutLimits(options.brownout_seconds, options.brownout_seconds / 4)
        levels = levels_down_to(options.quality_floor, options.quality)
        self.brownout = BrownOut(levels, limits)
        self.broadcast: Reply = lambda _: None
        self.spans: PassSpans | None = None
        self.computed_seconds = 0.0
        self._clock = clock
        self._buckets: Buckets[_Slot] = Buckets(
            options.batch_seconds, options.batch_items, self._constant
        )
        self._arrivals: list[_Slot] = []
        self._running: list[_Slot] = []
        self._priced = 0.0
        self._began: float | None = None
        self._requests: dict[tuple[Reply, int], _Request] = {}
        self._open: Counter[str] = Counter()
        self._work_came = asyncio.Event()
        self._compute = ThreadPoolExecutor(1, "device", _use, (device,))
        self._loading = ThreadPoolExecutor(1, "loading", _use, (device,))
        self._background = Background()

    @property
    def infos(self) -> list[ModelInfo]:
        """What is loaded."""
        return [model.info for model in self.models.values()]

    @property
    def queued_seconds(self) -> float:
        """The seconds that all that is here will take, as fast as it drains now."""
        waiting = sum(slot.price for slot in (*self._arrivals, *self._running))
        return self.drain.stretch * (self._buckets.seconds + waiting)

    @property
    def busy_seconds(self) -> float:
        """How long the device has been at its present pass."""
        return 0.0 if self._began is None else self._clock() - self._began

    # Messages of the fronts and the hub

    def receive(self, message: protocol.ToEngine, reply: Reply) -> None:
        """Take one message; `reply` sends messages back to whom it came from."""
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
        level = self.brownout.observe(self.queued_seconds, now)
        return Heartbeat(items, seconds, oldest, in_flight, memory_bytes, level)

    def _classify(self, message: Classify, reply: Reply) -> None:
        model = self.models.get((message.model, message.version))
        if model is None:
            reply(Failed(message.id, f"model {message.model}:{message.version} is not loaded"))
            return
        queued = self.queued_seconds
        counts = [len(item.ids) // protocol.ID_BYTES for item in message.items]
        quality = self._quality(message, model, queued, counts)
        try:
            rule = model.rule(quality, message.heads, message.max_heads)
        except PolicyError as error:
            reply(Failed(message.id, str(error)))
            return
        begins = message.steps or [0] * len(message.items)
        if len(begins) != len(message.items):
            reply(Failed(message.id, "there must be as many steps as items"))
            return
        outlook = Outlook.of(rule).up_to(self.options.max_step)
        prices = self.prices.expected_each(model.key, outlook, counts)
        for place, begin in enumerate(begins):
            if begin:
                prices[place] = self.prices.item(model.key, begin, outlook, counts[place])
        refusal = self._admit(model.checkpoint.name, prices, queued, message.remaining)
        if refusal is not None:
            reply(Refused(message.id, refusal.reason, refusal.retry_after))
            return
        now = self._clock()
        request = _Request(
            message.id,
            reply,
            model,
            now,
            now + message.remaining,
            message.return_heads,
            RequestContext(message.request_id, message.traceparent),
            quality,
            outlook,
            lane_of(len(message.items)),
        )
        for tokens, begin, price in zip(message.items, begins, prices, strict=True):
            ids = protocol.unpack_ids(tokens.ids)
            segments = protocol.unpack_ids(tokens.segments) if tokens.segments else None
            request.slots.append(_Slot(request, Work(ids, segments, rule), price, now, begin))
        request.open = len(request.slots)
        self._open[request.model.checkpoint.name] += request.open
        self._requests[reply, message.id] = request
        self._arrivals += request.slots
        self._work_came.set()

    def _admit(
        self, name: str, prices: list[float], queued: float, remaining: float
    ) -> Refusal | None:
        most = self.options.max_queue_items
        rooms = [(len(self._buckets) + len(self._arrivals) + len(self._running), most)]
        if name in self.options.model_queue_items:
            rooms.append((self._open[name], self.options.model_queue_items[name]))
        refusals = (
            admit(
                items=len(prices),
                queued_items=queued_items,
                max_items=max_items,
                queued_seconds=queued,
                price=sum(prices),
                remaining=remaining,
            )
            for queued_items, max_items in rooms
        )
        return next(filter(None, refusals), None)

    def _constant(self, bucket: Hashable) -> float:
        assert isinstance(bucket, tuple)
        model, step = bucket
        return self.prices.constant(model.key, step)

    def _quality(
        self, message: Classify, model: LoadedModel, queued: float, tokens: Sequence[int]
    ) -> str | float:
        """Return the quality that a request gets: its own, or the level that the load allows."""
        if message.quality != "auto":
            return message.quality
        level = self.brownout.observe(queued, self._clock())
        if message.target is None or not model.checkpoint.calibrated:
            return level
        return self._best_within(message.target - queued, model, tokens)

    def _best_within(self, left: float, model: LoadedModel, tokens: Sequence[int]) -> QualityName:
        """Return the best level at which items are answered within `target` seconds from now."""
        levels: tuple[QualityName, ...] = ("best", "balanced")
        for level in levels:
            outlook = Outlook.of(model.rule(level, None, None))
            passes = sum(self.prices.constant(model.key, step) for step in outlook.steps)
            seconds = self.prices.expected(model.key, outlook, sum(tokens), len(tokens))
            if passes + seconds <= left:
                return level
        return "fast"

    # The loop

    async def run(self) -> None:
        """Serve until cancelled."""
        while True:
            if not self._arrivals and not len(self._buckets):
                self._work_came.clear()
                await self._work_came.wait()
            began, self._priced = self._clock(), 0.0
            self._expire()
            await self._decide_arrivals()
            await self._run_batch()
            await asyncio.sleep(0)  # answers are written, and what has come is read
            self.drain.observe(self._clock() - began, self._priced)

    async def _decide_arrivals(self) -> None:
        count = decided_together(len(slot.work.ids) for slot in self._arrivals)
        self._running, self._arrivals = self._arrivals[:count], self._arrivals[count:]
        by_model: defaultdict[LoadedModel, list[_Slot]] = defaultdict(list)
        for slot in self._running:
            by_model[slot.request.model].append(slot)
        for model, slots in by_model.items():
            seconds = await self._on_device(cascade.arrive, model.network, slots)
            for slot in slots:
                slot.budget_seconds += seconds
                if slot.begin:  # what another engine has tried already is not tried again
                    slot.work.step, slot.work.logits = slot.begin, None
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
        seconds = await self._on_device(cascade.run, model.network, batch)
        tokens = sum(len(slot.work.ids) for slot in batch)
        self.prices.observe(model.key, step, tokens, len(batch), seconds)
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

        def compute() -> tuple[float, float, int | None]:
            started = self._clock()
            room = salvage(lambda some: work(network, [s.work for s in some]), slots, _fail)
            return started, self._clock(), room

        loop = asyncio.get_running_loop()
        self._began = self._clock()
        started, ended, room = await loop.run_in_executor(self._compute, compute)
        self._began = None
        self.computed_seconds += ended - started
        if room is not None:
            self._buckets.batch_items = min(room, self._buckets.batch_items)
            log.warning("memory is short, batches shrink", batch_items=self._buckets.batch_items)
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

    def _settle(self, slot: _Slot) -> None:
        """After a pass: an item is finished, or waits in the bucket of its next step."""
        request, work = slot.request, slot.work
        if request.gone:
            return
        if work.logits is not None and not all(map(math.isfinite, work.logits.tolist())):
            slot.error = "the network's answer is not a finite number"
        self._priced += slot.price
        if not slot.error and not work.done and not self._beyond(work):
            slot.price = self.prices.item(
                request.model.key, work.step, request.outlook, len(work.ids)
            )
            self._priced -= slot.price
            bucket = (request.model, work.step)
            self._buckets.add(
                Entry(slot, bucket, slot.price, request.arrived, request.deadline, request.lane)
            )
            return
        slot.finished = self._clock()
        request.open -= 1
        self._open[request.model.checkpoint.name] -= 1
        if not request.open:
            self._answer(request)

    def _beyond(self, work: Work) -> bool:
        return self.options.max_step is not None and work.step > self.options.max_step

    def _answer(self, request: _Request) -> None:
        del self._requests[request.reply, request.id]
        last = max(request.slots, key=lambda slot: slot.finished)
        waited = last.finished - request.arrived - last.budget_seconds - last.compute_seconds
        items = [_item_answer(slot, request.return_heads) for slot in request.slots]
        request.reply(
            Answer(
                request.id,
                items,
                last.budget_seconds,
                max(waited, 0.0),
                last.compute_seconds,
                request.quality,
            )
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
        self._open[request.model.checkpoint.name] -= request.open
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
                self._loading,
                load_model,
                Path(message.path),
                self.device,
                self.precision,
                self.tables,
                self.shared,
            )
        except CheckpointError as error:
            reply(Failed(message.id, str(error)))
            return
        except Exception as error:  # whatever it is, whoever asked must hear of it
            log.error("a model could not be loaded", path=message.path, exc_info=error)
            reply(Failed(message.id, f"{message.path}: {type(error).__name__}"))
            return
        self.prices.know(model.key, model.costs)
        self.models[model.key] = model
        self.broadcast(Models(self.infos))
        reply(Done(message.id))
        self._background.start(self._return_memory())

    def _unload(self, message: Unload, reply: Reply) -> None:
        # Items already here keep the model that they came for; it is freed with the last of them.
        model = self.models.pop((message.model, message.version), None)
        if model is None:
            reply(Failed(message.id, f"model {message.model}:{message.version} is not loaded"))
        else:
            model.network.forget_shared()
            self.broadcast(Models(self.infos))
            reply(Done(message.id))
            self._background.start(self._return_memory())

    def forget_shared(self) -> None:
        """Leave nothing in the folder that weights are shared through: this engine ends."""
        for model in self.models.values():
            model.network.forget_shared()

    async def _return_memory(self) -> None:
        """Let go of what a change of models has freed, when what it had begun will have ended."""
        await asyncio.sleep(SETTLE_SECONDS)
        await asyncio.get_running_loop().run_in_executor(self._loading, return_memory)


def _use(device: str) -> None:
    """Let what this thread does on a GPU be done on the one that is named."""
    if ":" in device:
        torch.cuda.set_device(device)


def _fail(slot: _Slot, error: Exception) -> None:
    context = slot.request.context
    log.warning(
        "an item failed",
        reason=type(error).__name__,
        request_id=context.request_id,
        trace_id=context.trace_id,
    )
    slot.error = "the item could not be computed"


def _riders(slots: list[_Slot]) -> list[Rider]:
    return [Rider(slot.request.context, slot.waits_since, slot.work.step) for slot in slots]


def _item_answer(slot: _Slot, return_heads: bool) -> ItemAnswer:
    work = slot.work
    if slot.error:
        return ItemAnswer(error=slot.error)
    return ItemAnswer(
        logits=[] if work.logits is None else work.logits.tolist(),
        next_step=work.step if work.logits is None else 0,
        budget=work.step,
        heads=work.heads,
        chosen=[list(heads) for heads in work.chosen] if return_heads else None,
        macs=work.macs,
        dense_macs=work.dense_macs,
    )
