"""The core of an engine: admission, decisions, buckets, passes, answers.

One coroutine owns all state. It runs one pass at a time in a separate thread, which owns the
device. Requests that arrive during a pass form the next batch; an idle device never waits for a
batch to fill.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import structlog

from budgetformer.cost.table import CostTable
from budgetformer.errors import PolicyError
from budgetformer.inference import cascade
from budgetformer.inference.cascade import Batch, Items, Part
from budgetformer.inference.packed import PackedPass
from budgetformer.inference.policy import QualityName
from budgetformer.inference.precision import Precision
from budgetformer.inference.texts import Texts
from budgetformer.model.tfidf import Array
from service.engine.device import check_device, probe_device, use_device
from service.engine.loaded_model import LoadedModel, WarmUpSteps, load_model
from service.engine.model_loader import ModelKey, ModelLoader
from service.engine.requests import ModelQueue, Reply, Request
from service.engine.salvage import salvage
from service.ipc import engine_messages as protocol
from service.ipc.engine_messages import (
    BatchReport,
    Cancel,
    Classify,
    Expired,
    Failed,
    Heartbeat,
    LevelChanged,
    Load,
    Models,
    Refused,
    Unload,
)
from service.ipc.frames import FrameError
from service.scheduling.admission import Refusal, admit
from service.scheduling.batch_limit import BatchLimit
from service.scheduling.brownout import BrownOut, BrownOutLimits, kept_above, levels_down_to
from service.scheduling.buckets import Buckets, Span, lane_of
from service.scheduling.decision_batch import decided_together
from service.scheduling.drain import Drain
from service.scheduling.heap import Heap
from service.scheduling.price import Outlook, Prices
from service.scheduling.totals import TotalSeconds
from service.telemetry.context import RequestContext
from service.telemetry.pass_spans import PassItem, PassRun, PassSpans, Stage

log = structlog.get_logger()

Clock = Callable[[], float]


@dataclass(frozen=True)
class EngineOptions:
    """Limits of the queue and of batches, and the quality levels under overload.

    Attributes:
        max_queue_items: most items in the queue.
        batch_seconds, batch_items: see `Buckets`.
        quality_floor: lowest level of `auto` requests under overload.
        brownout_seconds: queue delay above which the level is lowered.
        model_queue_items: most items of one model in the queue, by name of the model.
        model_floors: lowest level of models with their own floor, by name.
        warm_up_steps: ladder steps to pack when a model loads, by name of the model.
        max_step: highest ladder step that this engine computes; None: all. An item that needs a
            higher step is returned unfinished with its next step, for another engine.
    """

    max_queue_items: int = 4096
    batch_seconds: float = 0.05
    batch_items: int = 256
    quality_floor: QualityName = "fast"
    brownout_seconds: float = 0.5
    model_queue_items: Mapping[str, int] = field(default_factory=dict)
    model_floors: Mapping[str, QualityName] = field(default_factory=dict)
    warm_up_steps: WarmUpSteps = field(default_factory=dict)
    max_step: int | None = None

    @property
    def levels(self) -> list[QualityName]:
        """Levels from the normal one down to the lowest that some model may have."""
        return levels_down_to(self.quality_floor, *self.model_floors.values())

    def level_of(self, model: str, level: QualityName) -> QualityName:
        """Return the level of a model, given the level that the load allows."""
        floor = self.model_floors.get(model, self.quality_floor)
        return kept_above(floor, level)


class EngineCore:
    """Answer requests on one device.

    Args:
        options: limits of the queue and of batches.
        device: device of the models.
        precision: precision of their passes.
        tables: measured cost tables, by `name:version`.
        shared: folder of the weights that engines share; None: this engine holds its own copy.
        clock: returns monotonic seconds.
        probe: called after a pass has failed; raises if the device is lost. None: `probe_device`.

    Attributes:
        options: options in force.
        prices: prices of items and batches.
        drain: measured speed of the queue.
        brownout: quality level that the load allows.
        broadcast: sends a message to all frontends and the hub.
        spans: records passes as trace spans; None: tracing is off.
        computed_seconds: total time of all passes.
        loader: the loaded models.
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
        self.options = options
        self.device = device
        self.prices = Prices()
        self.drain = Drain()
        limits = BrownOutLimits(options.brownout_seconds, options.brownout_seconds / 4)
        self.brownout = BrownOut(options.levels, limits)
        self.broadcast: Reply = lambda _: None
        self.spans: PassSpans | None = None
        self.computed_seconds = 0.0
        self._clock = clock
        self._buckets: Buckets[Request] = Buckets(
            options.batch_seconds, options.batch_items, self._constant
        )
        self._batch_limit = BatchLimit(options.batch_items)
        self._check = partial(check_device, probe or partial(probe_device, device))
        self._undecided: OrderedDict[Span[Request], None] = OrderedDict()
        self._undecided_items = 0
        self._running = 0
        self._outside_buckets = TotalSeconds()
        """Price of the items that are undecided or running."""
        self._priced = 0.0
        """Price of the work that the present turn of the loop has done."""
        self._pass_began: float | None = None
        self._requests: dict[tuple[Reply, int], Request] = {}
        self._deadlines: Heap[Request] = Heap()
        self._queues: dict[str, ModelQueue] = {}
        self._work_arrived = asyncio.Event()
        self._compute = ThreadPoolExecutor(1, "device", use_device, (device,))

        def load(path: Path, warm_up_steps: WarmUpSteps) -> LoadedModel:
            return load_model(path, device, precision, tables or {}, shared, warm_up_steps)

        self.loader = ModelLoader(load, self._check, self._changed)
        self.loader.warm_up_steps = options.warm_up_steps

    @property
    def models(self) -> dict[ModelKey, LoadedModel]:
        """Loaded models, by name and version."""
        return self.loader.models

    @property
    def queued_seconds(self) -> float:
        """Time until all present items are computed, at the present speed of the queue."""
        return self.drain.stretch * (self._buckets.seconds + self._outside_buckets.seconds)

    @property
    def batch_items(self) -> int:
        """Most items in a batch: the configured number, or fewer if memory ran out."""
        return self._batch_limit.items

    @property
    def busy_seconds(self) -> float:
        """Time since the start of the present pass; 0 while none runs."""
        return 0.0 if self._pass_began is None else self._clock() - self._pass_began

    # Messages of the frontends and the hub

    def receive(self, message: protocol.ToEngine, reply: Reply) -> None:
        """Handle one message; `reply` sends messages to its sender."""
        match message:
            case Classify():
                self._classify(message, reply)
            case Cancel():
                self._drop(self._requests.get((reply, message.id)))
                self.loader.cancel(message, reply)
            case Load():
                self.loader.load(message, reply)
            case Unload():
                self.loader.unload(message, reply)

    def _changed(self, loaded: LoadedModel | None) -> None:
        """Announce the loaded models; `loaded` is the new one, if there is one."""
        if loaded is not None:
            self.prices.set_table(loaded.key, loaded.costs)
        self.broadcast(Models(self.loader.infos))
        self._work_arrived.set()  # wakes the loop, which raises if the device is lost

    def configure(self, options: EngineOptions) -> None:
        """Apply new floors, queue limits of models and warm-up steps."""
        self.options = options
        self.brownout.change_levels(options.levels)
        self.loader.warm_up_steps = options.warm_up_steps

    def forget(self, reply: Reply) -> None:
        """Drop all requests of a frontend whose connection has ended."""
        for request in [r for (owner, _), r in self._requests.items() if owner == reply]:
            self._drop(request)

    def heartbeat(self, memory_bytes: int) -> Heartbeat:
        """Return a heartbeat, which describes the queue of each model."""
        now = self._clock()
        empty = ModelQueue()
        queues = {name: self._queues.get(name, empty) for name, _ in self.models} | self._queues
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
        try:
            self._admit(message, reply, model)
        except (PolicyError, FrameError) as error:
            reply(Failed(message.id, str(error)))

    def _admit(self, message: Classify, reply: Reply, model: LoadedModel) -> None:
        """Admit a request, or refuse it as a whole.

        Raises:
            PolicyError: the checkpoint does not have the requested quality or number of heads.
            FrameError: the columns of the message do not fit together.
        """
        queued = self.queued_seconds
        level = self.options.level_of(message.model, self._level(queued))
        texts = message.texts.read()
        if not len(texts):
            raise FrameError("there is no text")
        quality = message.quality
        if quality == "auto":
            quality = self._best_within(message, texts, level, queued, model)
        rule, outlook = model.rule(quality, message.heads, message.max_heads)
        classes = 0 if model.network.model.exit_head is None else model.network.sizes.classes
        decisions = message.decisions
        decided = None if decisions is None else decisions.read(len(texts), classes)
        begun = protocol.unpack(message.steps, "<i4") if message.steps else None
        if begun is not None and len(begun) != len(texts):
            raise FrameError("there must be as many steps as texts")
        outlook = outlook.up_to(self.options.max_step)
        steps = begun if decided is None else decided.steps
        prices = self._prices(model, outlook, texts, steps)
        refusal = self._refusal(model.checkpoint.name, prices, queued, message.remaining)
        if refusal is not None:
            reply(Refused(message.id, refusal.reason, refusal.retry_after))
            return
        now = self._clock()
        queue = self._queues.setdefault(model.checkpoint.name, ModelQueue())
        items = Items(model.network, texts, rule)
        request = Request(
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
            "bulk" if message.bulk else lane_of(len(texts)),
            items,
            begun,
        )
        queue.open += request.open
        queue.requests[request] = None
        self._requests[reply, message.id] = request
        self._deadlines.push(request.deadline, request)
        indices = list(range(len(texts)))
        if decided is None:
            span = self._wait(request, indices, prices, None)
            self._undecided[span] = None
            self._undecided_items += len(span)
            self._outside_buckets += span.total
        else:
            items.begin(decided)
            self._advance(request, indices, prices)
        self._work_arrived.set()

    def _prices(
        self, model: LoadedModel, outlook: Outlook, texts: Texts, steps: Array | None
    ) -> list[float]:
        """Return the expected seconds of each text; `steps` are its first steps, if decided."""
        tokens = texts.window.counts
        if steps is None:
            return self.prices.expected_each(model.key, outlook, tokens, texts.full_text.counts)
        first = steps.tolist()
        by_step = {step: self.prices.each(model.key, step, outlook, tokens) for step in set(first)}
        if len(by_step) == 1:
            return by_step[first[0]]
        return [by_step[step][index] for index, step in enumerate(first)]

    def _wait(
        self, request: Request, indices: list[int], prices: list[float], step: int | None
    ) -> Span[Request]:
        """Let texts of a request wait as a span: for a pass at a step, or for a decision (None)."""
        bucket = request.model, step
        span = Span(
            request, indices, prices, bucket, request.arrived, request.deadline, request.lane
        )
        request.spans[span] = None
        request.queue.wait(span)
        return span

    def _refusal(
        self, name: str, prices: list[float], queued: float, remaining: float
    ) -> Refusal | None:
        """Return why a request with these prices is refused; None: it is admitted."""
        present = len(self._buckets) + self._undecided_items + self._running
        limits = [(present, self.options.max_queue_items)]
        if name in self.options.model_queue_items:
            queue = self._queues.get(name)
            limits.append((queue.open if queue else 0, self.options.model_queue_items[name]))
        refusals = (
            admit(
                items=len(prices),
                queued_items=queued_items,
                max_items=max_items,
                queued_seconds=queued,
                price=sum(prices),
                remaining=remaining,
            )
            for queued_items, max_items in limits
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
        self,
        message: Classify,
        texts: Texts,
        level_in_force: QualityName,
        queued: float,
        model: LoadedModel,
    ) -> QualityName:
        """Return the best level at which a request meets its target time.

        A request without a target gets the level in force.
        """
        if message.target is None or not model.checkpoint.calibrated:
            return level_in_force
        left = message.target - queued
        sizes = len(texts.window.ids), len(texts.full_text.ids), len(texts)
        levels: tuple[QualityName, ...] = ("best", "balanced")
        for level in levels:
            _, outlook = model.rule(level, None, None)
            passes = sum(self.prices.constant(model.key, step) for step in outlook.steps)
            seconds = self.prices.expected(model.key, outlook, *sizes)
            if passes + seconds <= left:
                return level
        return "fast"

    # The loop

    async def run(self) -> None:
        """Answer requests until cancelled.

        Raises:
            DeviceLostError: the device is lost; this process must end.
        """
        self._compute.submit(int)  # starts the thread now: later the system may have no room for it
        while True:
            if self.loader.device_lost is not None:
                raise self.loader.device_lost
            if not self._undecided and not len(self._buckets):
                self._work_arrived.clear()
                await self._work_arrived.wait()
                continue
            began, self._priced = self._clock(), 0.0
            self._expire()
            await self._decide()
            await self._run_batch()
            await asyncio.sleep(0)  # lets connections write answers and read new requests
            self.drain.observe(self._clock() - began, self._priced)

    async def _decide(self) -> None:
        """Decide the budgets of texts that arrived undecided, in one pass for each model."""
        count = decided_together(
            tokens
            for span in self._undecided
            for tokens in map(span.owner.items.texts.full_text.counts.__getitem__, span.indices)
        )
        by_model: defaultdict[LoadedModel, list[Span[Request]]] = defaultdict(list)
        self._running = count
        self._undecided_items -= count
        while count:
            first = next(iter(self._undecided))
            span = first
            if len(first) > count:
                span = first.cut(count)
            else:
                del self._undecided[first]
                del first.owner.spans[first]
            first.owner.queue.leave(span)
            by_model[span.owner.model].append(span)
            count -= len(span)
        for model, spans in by_model.items():
            seconds = await self._on_device(cascade.decide, model, 0, spans)
            ended = []
            for span in spans:
                request, items = span.owner, span.owner.items
                for index in span.indices:
                    request.budget_seconds[index] += seconds
                decided = [index for index in span.indices if index not in request.errors]
                if request.begun is not None:  # steps that another engine ran are not run again
                    items.restart(request.begun[decided], decided)
                ended += [index for index in decided if items.done[index]]
                self._settle(span)
            if ended:
                tokens = _tokens(spans, decision=True)
                self._report(model, 0, spans, seconds, len(ended), tokens)

    async def _run_batch(self) -> None:
        self._buckets.batch_items = self._batch_limit.items
        spans = self._buckets.take()
        if not spans:
            return
        for span in spans:
            span.owner.spans.pop(span, None)  # absent if it was cut from a longer span
            span.owner.queue.leave(span)
            self._outside_buckets += span.total
        self._running = sum(map(len, spans))
        model, step = spans[0].owner.model, int(spans[0].owner.items.step[spans[0].indices[0]])
        seconds = await self._on_device(cascade.run, model, step, spans)
        tokens, items = _tokens(spans), self._running
        self.prices.observe(model.key, step, tokens, items, seconds)
        self._report(model, step, spans, seconds, items, tokens)
        for span in spans:
            for index in span.indices:
                span.owner.compute_seconds[index] += seconds
            self._settle(span)

    async def _on_device(
        self,
        work: Callable[[PackedPass, Batch], None],
        model: LoadedModel,
        step: int,
        spans: list[Span[Request]],
    ) -> float:
        """Run a pass (`cascade.decide` or `cascade.run`) in the device's thread.

        Returns:
            The seconds that it took.
        """
        owners = {span.owner.items: span.owner for span in spans}
        batch = Batch([Part(span.owner.items, span.indices) for span in spans])
        decides = work is cascade.decide

        def failed(text: Part, error: Exception) -> None:
            _fail(owners[text.items], text.places[0], error)

        def compute() -> tuple[float, float, int | None]:
            started = self._clock()
            room = salvage(partial(work, model.network), batch, failed, self._check)
            return started, self._clock(), room

        loop = asyncio.get_running_loop()
        self._pass_began = self._clock()
        started, ended, room = await loop.run_in_executor(self._compute, compute)
        self._pass_began = None
        self.computed_seconds += ended - started
        self._adapt(len(batch), room, batch=not decides)
        if self.spans is not None:
            stage: Stage = "budget" if decides else "compute"
            name = f"{model.key[0]}:{model.key[1]}"
            tokens = _tokens(spans, decision=decides)
            items = _pass_items(spans)
            self.spans.ran(PassRun(stage, name, step, tokens, items, started, ended))
            for span in spans:
                for index in span.indices:
                    span.owner.waits_since[index] = ended
        return ended - started

    def _adapt(self, items: int, room: int | None, batch: bool) -> None:
        """Adapt the largest batch size to the memory of the device.

        Args:
            items: number of items in the pass.
            room: number of items that fit into memory, if memory ran out.
            batch: whether the pass computed a batch; decisions do not show that memory suffices.
        """
        before, limit = self._batch_limit.items, self._batch_limit
        if room is not None:
            limit.shrink(room)
            log.warning("batch size reduced: out of memory", batch_items=limit.items)
        elif batch:
            limit.succeeded(items)
            if limit.items > before:
                log.info("batch size restored", batch_items=limit.items, limit=limit.configured)

    def _settle(self, span: Span[Request]) -> None:
        """After a pass: let texts wait for their next step, and finish the others."""
        request, items, indices = span.owner, span.owner.items, span.indices
        self._running -= len(span)
        self._outside_buckets -= span.total
        if request.dropped:
            return
        for index in items.non_finite.intersection(indices):
            request.errors[index] = "the network's answer is not a finite number"
            items.done[index] = True
        self._priced += span.seconds - self._advance(request, indices)

    def _advance(
        self, request: Request, indices: list[int], prices: list[float] | None = None
    ) -> float:
        """Let texts wait in the buckets of their next steps; finish texts without a next step here.

        Args:
            request: request of the texts.
            indices: indices of the texts in the request.
            prices: prices of all texts of the request; None: compute them.

        Returns:
            The price of the texts that wait.
        """
        items, max_step = request.items, self.options.max_step
        done, steps = (column[items.index(indices)].tolist() for column in (items.done, items.step))
        by_step: dict[int, list[int]] = {}
        for index, ended, step in zip(indices, done, steps, strict=True):
            if not ended and (max_step is None or step <= max_step):
                by_step.setdefault(step, []).append(index)
        price, finished = 0.0, len(indices)
        if by_step:
            counts = items.texts.window.counts
            for step, waiting in by_step.items():
                finished -= len(waiting)
                if prices is None:
                    tokens = [counts[index] for index in waiting]
                    each = self.prices.each(request.model.key, step, request.outlook, tokens)
                else:
                    each = [prices[index] for index in waiting]
                span = self._wait(request, waiting, each, step)
                self._buckets.add(span)
                price += span.seconds
        if finished:
            request.last = indices[-1], self._clock()
            request.open -= finished
            request.queue.open -= finished
            if not request.open:
                self._forget(request)
                request.reply(request.answer())
        return price

    def _expire(self) -> None:
        now = self._clock()
        while self._deadlines:
            deadline, request = self._deadlines.first()
            if deadline > now:
                return
            self._drop(request)
            request.reply(Expired(request.id))

    def _drop(self, request: Request | None) -> None:
        """Drop a request, and remove its waiting texts from the queue."""
        if request is None:
            return
        request.dropped = True
        request.queue.open -= request.open
        self._forget(request)
        for span in request.spans:
            if span in self._undecided:
                del self._undecided[span]
                self._undecided_items -= len(span)
                self._outside_buckets -= span.total
            else:
                self._buckets.discard(span)
            request.queue.leave(span)

    def _forget(self, request: Request) -> None:
        del self._requests[request.reply, request.id]
        del request.queue.requests[request]
        self._deadlines.discard(request)
        if not request.queue.requests:
            del self._queues[request.model.checkpoint.name]

    def _report(
        self,
        model: LoadedModel,
        step: int,
        spans: list[Span[Request]],
        seconds: float,
        items: int,
        tokens: int,
    ) -> None:
        name, version = model.key
        if step == cascade.LAYERWISE:
            step = max(int(span.owner.items.step[span.indices].max()) for span in spans)
        checked, clipped = model.network.range_check.take()
        self.broadcast(
            BatchReport(name, version, step, items, tokens, 0.0, seconds, checked, clipped)
        )


def _fail(request: Request, index: int, error: Exception) -> None:
    """Let one text of a request fail."""
    context = request.context
    log.warning(
        "item failed",
        reason=type(error).__name__,
        request_id=context.request_id,
        trace_id=context.trace_id,
    )
    request.errors[index] = "the item could not be computed"
    request.items.done[index] = True


def _tokens(spans: Sequence[Span[Request]], decision: bool = False) -> int:
    """Return the number of tokens that a pass reads; `decision`: the tokens that step 0 reads."""
    total = 0
    for span in spans:
        texts = span.owner.items.texts
        counts = (texts.full_text if decision else texts.window).counts
        total += sum([counts[index] for index in span.indices])
    return total


def _pass_items(spans: Sequence[Span[Request]]) -> list[PassItem]:
    return [
        PassItem(
            span.owner.context, span.owner.waits_since[index], int(span.owner.items.step[index])
        )
        for span in spans
        for index in span.indices
    ]
