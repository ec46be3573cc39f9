"""The engine's heart: inbox, f_o on arrival, buckets, passes, answers.

One coroutine owns all state. It hands the device one piece of work at a time in a thread of its
own, and what arrives meanwhile is decided and batched next: a batch forms because the device is
busy, never by waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import structlog
import torch
from torch import Tensor

from budgetformer.cost.table import CostTable
from budgetformer.errors import CheckpointError, PolicyError
from budgetformer.inference import cascade
from budgetformer.inference.cascade import Work
from budgetformer.inference.packed import PackedPass
from budgetformer.inference.policy import BudgetRule, QualityName
from budgetformer.inference.precision import Precision
from service.background import Background, DetachedThreads, StillRunningError
from service.engine.device import DeviceLostError, check_device, probe_device
from service.engine.loaded_model import LoadedModel, load_model
from service.engine.salvage import salvage
from service.ipc import engine_messages as protocol
from service.ipc.engine_messages import (
    Answer,
    BatchRan,
    Cancel,
    Classify,
    Decisions,
    Done,
    Expired,
    Failed,
    Heartbeat,
    ItemAnswer,
    ItemTokens,
    LevelChanged,
    Load,
    ModelInfo,
    Models,
    Refused,
    ToFront,
    Unload,
)
from service.ipc.frames import FrameError
from service.process import return_memory
from service.scheduling.admission import Refusal, admit
from service.scheduling.arrivals import decided_together
from service.scheduling.batch_limit import BatchLimit
from service.scheduling.brownout import BrownOut, BrownOutLimits, levels_down_to
from service.scheduling.buckets import Buckets, Lane, Span, lane_of
from service.scheduling.drain import Drain
from service.scheduling.heap import Heap
from service.scheduling.price import Outlook, Prices
from service.scheduling.totals import TotalSeconds
from service.telemetry.context import RequestContext
from service.telemetry.pass_spans import PassRun, PassSpans, Rider, Stage

log = structlog.get_logger()

Reply = Callable[[ToFront], object]
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
class _ModelQueue:
    """The requests of one model, and running totals of their items.

    Attributes:
        requests: in the order of their arrival.
        waiting: items that wait, on arrival or in a bucket.
        price: of the items that wait.
        open: items without an answer: those that wait, and those that run.
    """

    requests: dict[_Request, None] = field(default_factory=dict)
    waiting: int = 0
    price: TotalSeconds = field(default_factory=TotalSeconds)
    open: int = 0

    @property
    def oldest(self) -> float | None:
        """Arrival of the oldest request with an item that waits; those before it run."""
        return next((request.arrived for request in self.requests if request.waiting), None)

    def wait(self, slot: _Slot) -> None:
        """Count an item as waiting."""
        slot.request.waiting += 1
        self.waiting += 1
        self.price.add(slot.price)

    def leave(self, slot: _Slot) -> None:
        """Count an item as no longer waiting: it runs, or its request was dropped."""
        slot.request.waiting -= 1
        self.waiting -= 1
        self.price.subtract(slot.price)


@dataclass(eq=False)
class _Request:
    id: int
    reply: Reply
    model: LoadedModel
    queue: _ModelQueue
    arrived: float
    deadline: float
    return_heads: bool
    context: RequestContext
    quality: str | float
    outlook: Outlook
    lane: Lane
    slots: list[_Slot] = field(default_factory=list)
    open: int = 0
    waiting: int = 0
    gone: bool = False


@dataclass(eq=False)
class _Slot:
    """One item of a request."""

    request: _Request
    work: Work
    price: float
    waits_since: float
    begin: int = 0
    entry: Span[_Slot] | None = None
    """Its place in a bucket, while it waits there."""
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
        probe: raises if the device computes nothing any more; asked after a pass has failed. None:
            run a small operation on it.
    """

    def __init__(
        self,
        options: EngineOptions,
        device: str = "cpu",
        precision: Precision = "float32",
        tables: Mapping[str, CostTable] | None = None,
        shared: Path | None = None,
        clock: Clock = time.monotonic,
        probe: Callable[[], None] | None = None,
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
        self._batch_limit = BatchLimit(options.batch_items)
        self._check = partial(check_device, probe or partial(probe_device, device))
        self._device_lost: DeviceLostError | None = None
        self._arrivals: OrderedDict[_Slot, None] = OrderedDict()
        self._running = 0
        self._outside = TotalSeconds()
        """Price of the arrivals and of what runs; the buckets know their own."""
        self._priced = 0.0
        self._began: float | None = None
        self._requests: dict[tuple[Reply, int], _Request] = {}
        self._deadlines: Heap[_Request] = Heap()
        self._queues: dict[str, _ModelQueue] = {}
        self._work_came = asyncio.Event()
        self._compute = ThreadPoolExecutor(1, "device", _use, (device,))
        self._loading = asyncio.Lock()
        self._loads: dict[tuple[Reply, int], asyncio.Task[None]] = {}
        self._threads = DetachedThreads()
        self._background = Background()

    @property
    def infos(self) -> list[ModelInfo]:
        """What is loaded."""
        return [model.info for model in self.models.values()]

    @property
    def queued_seconds(self) -> float:
        """The seconds that all that is here will take, as fast as it drains now."""
        return self.drain.stretch * (self._buckets.seconds + self._outside.seconds)

    @property
    def batch_items(self) -> int:
        """Most items in a batch now: the configured number, or what memory has room for."""
        return self._batch_limit.items

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
                load = self._loads.get((reply, message.id))
                if load is not None:
                    load.cancel()
            case Load():
                key = reply, message.id
                self._loads[key] = load = self._background.start(self._load(message, reply))
                load.add_done_callback(lambda _: self._loads.pop(key, None))
            case Unload():
                self._unload(message, reply)

    def forget(self, reply: Reply) -> None:
        """Drop everything that a front asked for, which is gone."""
        for request in [r for (owner, _), r in self._requests.items() if owner == reply]:
            self._drop(request)

    def heartbeat(self, memory_bytes: int) -> Heartbeat:
        """Describe the queue."""
        now = self._clock()
        none = _ModelQueue()
        queues = {name: self._queues.get(name, none) for name, _ in self.models} | self._queues
        items = {name: queue.waiting for name, queue in queues.items()}
        seconds = {name: queue.price.seconds for name, queue in queues.items()}
        arrived = {name: queue.oldest for name, queue in queues.items()}
        oldest = {name: 0.0 if at is None else now - at for name, at in arrived.items()}
        in_flight = {name: queue.open for name, queue in queues.items()}
        level = self._level(self.queued_seconds)
        return Heartbeat(items, seconds, oldest, in_flight, memory_bytes, level)

    def _classify(self, message: Classify, reply: Reply) -> None:
        model = self.models.get((message.model, message.version))
        if model is None:
            reply(Failed(message.id, f"model {message.model}:{message.version} is not loaded"))
            return
        queued = self.queued_seconds
        level = self._level(queued)
        counts = [item.tokens for item in message.items]
        exit_counts = [item.exit_tokens for item in message.items]
        try:
            quality = message.quality
            if quality == "auto":
                quality = self._best_within(message, level, queued, model)
            rule = model.rule(quality, message.heads, message.max_heads)
        except PolicyError as error:
            reply(Failed(message.id, str(error)))
            return
        decisions = message.decisions
        begins = (decisions.steps if decisions else message.steps) or [0] * len(message.items)
        try:
            decided = None if decisions is None else _unpack(decisions, model.network)
        except FrameError as error:
            reply(Failed(message.id, str(error)))
            return
        if len(begins) != len(message.items) or (decisions and not all(begins)):
            reply(Failed(message.id, "there must be as many steps as items"))
            return
        outlook = Outlook.of(rule).up_to(self.options.max_step)
        prices = self.prices.expected_each(model.key, outlook, counts, exit_counts)
        for place, begin in enumerate(begins):
            if begin:
                prices[place] = self.prices.item(model.key, begin, outlook, counts[place])
        refusal = self._admit(model.checkpoint.name, prices, queued, message.remaining)
        if refusal is not None:
            reply(Refused(message.id, refusal.reason, refusal.retry_after))
            return
        now = self._clock()
        queue = self._queues.setdefault(model.checkpoint.name, _ModelQueue())
        request = _Request(
            message.id,
            reply,
            model,
            queue,
            now,
            now + message.remaining,
            message.return_heads,
            RequestContext(message.request_id, message.traceparent),
            quality,
            outlook,
            lane_of(len(message.items)),
        )
        for tokens, begin, price in zip(message.items, begins, prices, strict=True):
            request.slots.append(_Slot(request, _work(tokens, rule), price, now, begin))
        request.open = len(request.slots)
        queue.open += request.open
        queue.requests[request] = None
        self._requests[reply, message.id] = request
        self._deadlines.push(request.deadline, request)
        if decided is None:
            for slot in request.slots:
                self._arrivals[slot] = None
                self._outside.add(slot.price)
                queue.wait(slot)
        else:
            for slot, begin, s, logits in zip(request.slots, begins, *decided, strict=True):
                cascade.begin(model.network, slot.work, begin, s, logits)
                self._go_on(slot)
        self._work_came.set()

    def _admit(
        self, name: str, prices: list[float], queued: float, remaining: float
    ) -> Refusal | None:
        here = len(self._buckets) + len(self._arrivals) + self._running
        rooms = [(here, self.options.max_queue_items)]
        if name in self.options.model_queue_items:
            queue = self._queues.get(name)
            rooms.append((queue.open if queue else 0, self.options.model_queue_items[name]))
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

    def _level(self, queued: float) -> QualityName:
        """Return the level that the load allows; tell the frontends when it has changed."""
        before = self.brownout.level
        level = self.brownout.observe(queued, self._clock())
        if level != before:
            self.broadcast(LevelChanged(level))
        return level

    def _best_within(
        self, message: Classify, usual: QualityName, queued: float, model: LoadedModel
    ) -> QualityName:
        """Return the best level at which a request is answered within its target, if it has one."""
        if message.target is None or not model.checkpoint.calibrated:
            return usual
        left = message.target - queued
        sizes = (
            sum(item.tokens for item in message.items),
            sum(item.exit_tokens for item in message.items),
            len(message.items),
        )
        levels: tuple[QualityName, ...] = ("best", "balanced")
        for level in levels:
            outlook = Outlook.of(model.rule(level, None, None))
            passes = sum(self.prices.constant(model.key, step) for step in outlook.steps)
            seconds = self.prices.expected(model.key, outlook, *sizes)
            if passes + seconds <= left:
                return level
        return "fast"

    # The loop

    async def run(self) -> None:
        """Serve until cancelled.

        Raises:
            DeviceLostError: the device computes nothing any more; this process must end.
        """
        self._compute.submit(int)  # starts the thread now: later there may be no room for one
        while True:
            if self._device_lost is not None:
                raise self._device_lost
            if not self._arrivals and not len(self._buckets):
                self._work_came.clear()
                await self._work_came.wait()
                continue
            began, self._priced = self._clock(), 0.0
            self._expire()
            await self._decide_arrivals()
            await self._run_batch()
            await asyncio.sleep(0)  # answers are written, and what has come is read
            self.drain.observe(self._clock() - began, self._priced)

    async def _decide_arrivals(self) -> None:
        count = decided_together(slot.work.exit_tokens for slot in self._arrivals)
        by_model: defaultdict[LoadedModel, list[_Slot]] = defaultdict(list)
        for _ in range(count):
            slot, _ = self._arrivals.popitem(last=False)
            slot.request.queue.leave(slot)
            by_model[slot.request.model].append(slot)
        self._running = count
        for model, slots in by_model.items():
            seconds = await self._on_device(cascade.arrive, model.network, slots)
            for slot in slots:
                slot.budget_seconds += seconds
                if slot.begin:  # what another engine has tried already is not tried again
                    slot.work.step, slot.work.steps, slot.work.logits = slot.begin, [], None
                self._settle(slot)
            exits = [slot for slot in slots if slot.work.done and not slot.error]
            if exits:
                self._report(model, 0, exits, seconds)

    async def _run_batch(self) -> None:
        self._buckets.batch_items = self._batch_limit.items
        batch = [span.owner for span in self._buckets.take()]
        if not batch:
            return
        for slot in batch:
            slot.entry = None
            slot.request.queue.leave(slot)
            self._outside.add(slot.price)
        self._running = len(batch)
        model, step = batch[0].request.model, batch[0].work.step
        seconds = await self._on_device(cascade.run, model.network, batch)
        self.prices.observe(model.key, step, _tokens(batch), len(batch), seconds)
        self._report(model, step, batch, seconds)
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
            room = salvage(
                lambda some: work(network, [s.work for s in some]), slots, _fail, self._check
            )
            return started, self._clock(), room

        loop = asyncio.get_running_loop()
        self._began = self._clock()
        started, ended, room = await loop.run_in_executor(self._compute, compute)
        self._began = None
        self.computed_seconds += ended - started
        self._adapt(len(slots), room, batch=work is cascade.run)
        if self.spans is not None:
            stage: Stage = "budget" if work is cascade.arrive else "compute"
            name, version = slots[0].request.model.key
            tokens = _tokens(slots, decision=work is cascade.arrive)
            self.spans.ran(
                PassRun(stage, f"{name}:{version}", step, tokens, _riders(slots), started, ended)
            )
        for slot in slots:
            slot.waits_since = ended
        return ended - started

    def _adapt(self, items: int, room: int | None, batch: bool) -> None:
        """Adapt the size of batches to a pass that had so many items, and to memory."""
        before, limit = self._batch_limit.items, self._batch_limit
        if room is not None:
            limit.shrink(room)
            log.warning("out of memory, batches shrink", batch_items=limit.items)
        elif batch:
            limit.succeeded(items)
            if limit.items > before:
                log.info("batches grow again", batch_items=limit.items, limit=limit.configured)

    def _settle(self, slot: _Slot) -> None:
        """After a pass: an item is finished, or waits in the bucket of its next step."""
        request, work = slot.request, slot.work
        self._running -= 1
        self._outside.subtract(slot.price)
        if request.gone:
            return
        if work.logits is not None and not all(map(math.isfinite, work.logits.tolist())):
            slot.error = "the network's answer is not a finite number"
        self._priced += slot.price
        if self._continues(slot):
            slot.price = self.prices.item(
                request.model.key, work.step, request.outlook, len(work.ids)
            )
            self._priced -= slot.price
        self._go_on(slot)

    def _go_on(self, slot: _Slot) -> None:
        """Let an item wait in the bucket of its next step, or finish it if there is none here."""
        request, work = slot.request, slot.work
        if self._continues(slot):
            bucket = (request.model, work.step)
            slot.entry = Span(
                slot, [0], [slot.price], bucket, request.arrived, request.deadline, request.lane
            )
            self._buckets.add(slot.entry)
            request.queue.wait(slot)
            return
        slot.finished = self._clock()
        request.open -= 1
        request.queue.open -= 1
        if not request.open:
            self._answer(request)

    def _continues(self, slot: _Slot) -> bool:
        """Say whether an item has a next step that this engine computes."""
        most = self.options.max_step
        return not slot.error and not slot.work.done and (most is None or slot.work.step <= most)

    def _answer(self, request: _Request) -> None:
        self._forget(request)
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
        while self._deadlines:
            deadline, request = self._deadlines.first()
            if deadline > now:
                return
            self._drop(request)
            request.reply(Expired(request.id))

    def _drop(self, request: _Request | None) -> None:
        """Forget a request, and remove its items from wherever they wait."""
        if request is None:
            return
        request.gone = True
        request.queue.open -= request.open
        self._forget(request)
        for slot in request.slots:
            if slot in self._arrivals:
                del self._arrivals[slot]
                self._outside.subtract(slot.price)
            elif slot.entry is not None:
                self._buckets.discard(slot.entry)
            else:
                continue  # it runs, or is finished
            request.queue.leave(slot)

    def _forget(self, request: _Request) -> None:
        del self._requests[request.reply, request.id]
        del request.queue.requests[request]
        self._deadlines.discard(request)
        if not request.queue.requests:
            del self._queues[request.model.checkpoint.name]

    def _report(self, model: LoadedModel, step: int, slots: list[_Slot], seconds: float) -> None:
        tokens = _tokens(slots, decision=step == 0)
        name, version = model.key
        budget = max(slot.work.step for slot in slots) if step == cascade.LAYERWISE else step
        checked, clipped = model.network.range_check.take()
        self.broadcast(
            BatchRan(name, version, budget, len(slots), tokens, 0.0, seconds, checked, clipped)
        )

    # Models

    async def _load(self, message: Load, reply: Reply) -> None:
        path = Path(message.path)

        def work() -> LoadedModel:
            _use(self.device)
            return load_model(path, self.device, self.precision, self.tables, self.shared)

        try:
            async with self._loading:  # one at a time; one that is given up is not waited for
                model = await self._threads.run(
                    path, work, discard=lambda late: late.network.forget_shared()
                )
        except asyncio.CancelledError:
            log.error("model load given up", path=message.path)
            raise
        except StillRunningError:
            reply(Failed(message.id, f"{path}: an earlier load of it has not ended yet"))
            return
        except CheckpointError as error:
            reply(Failed(message.id, str(error)))
            return
        except Exception as error:  # any error must be answered
            log.error("a model could not be loaded", path=message.path, exc_info=error)
            reply(Failed(message.id, f"{message.path}: {type(error).__name__}"))
            try:
                await self._threads.run(self._check, partial(self._check, error))
            except DeviceLostError as lost:
                self._device_lost = lost
                self._work_came.set()
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
        with contextlib.suppress(
            StillRunningError, RuntimeError
        ):  # there may be no room for a thread
            await self._threads.run(return_memory, return_memory)


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


def _work(item: ItemTokens, rule: BudgetRule) -> Work:
    ids, segments, whole, whole_segments = (
        protocol.unpack_ids(part) if part else None
        for part in (item.ids, item.segments, item.whole, item.whole_segments)
    )
    return Work(ids or (), segments, rule, whole=whole, whole_segments=whole_segments)


def _unpack(
    decisions: Decisions, network: PackedPass
) -> tuple[list[float], Sequence[Tensor | None]]:
    """Return f_o's verdicts, and step 0's logits of each item.

    Raises:
        FrameError: they are not as many numbers as the items of this network have.
    """
    s, exit_logits = map(protocol.unpack_floats, (decisions.s, decisions.exit_logits))
    count = len(decisions.steps)
    classes = 0 if network.model.exit_head is None else network.sizes.classes
    if (len(s), len(exit_logits)) != (count, count * classes):
        raise FrameError("there must be as many decisions as items")
    if not classes:
        return s.tolist(), [None] * count
    return s.tolist(), torch.from_numpy(exit_logits).view(count, classes).unbind()


def _tokens(slots: Sequence[_Slot], decision: bool = False) -> int:
    """Return the tokens that a pass reads: of the encoder, or of step 0 in the decision."""
    works = (slot.work for slot in slots)
    return sum(work.exit_tokens if decision else len(work.ids) for work in works)


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
        predicted=None if work.predicted == cascade.LAYERWISE else work.predicted,
        steps=work.steps,
        heads=work.heads,
        chosen=[list(heads) for heads in work.chosen] if return_heads else None,
        macs=work.macs,
        dense_macs=work.dense_macs,
    )
