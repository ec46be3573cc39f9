"""Simulation of a server in virtual time: frontends, engines and the hub share its cores."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from budgetformer.inference.policy import QUALITY_NAMES
from service.scheduling.load_shedding import LoadShedding
from service.settings import Settings
from service.simulation.costs import ServerCosts
from service.simulation.engine import Outcome, SimEngine, SimModel, SimRequest
from service.simulation.texts import Text

_NEVER = float("inf")
OUTCOMES: tuple[Outcome, ...] = ("answered", "refused", "expired")
LEVELS = QUALITY_NAMES


@dataclass
class Records:
    """Results of requests, in the order in which they ended.

    Attributes:
        arrived: arrival of each request, in seconds.
        latency: seconds from arrival until an answer or error was written.
        outcome: index of the outcome in `OUTCOMES`.
        texts: number of texts.
        level: index of the quality level in `LEVELS`.
        busy: processor time by kind of process, in seconds.
    """

    arrived: array[float] = field(default_factory=lambda: array("d"))
    latency: array[float] = field(default_factory=lambda: array("d"))
    outcome: array[int] = field(default_factory=lambda: array("b"))
    texts: array[int] = field(default_factory=lambda: array("l"))
    level: array[int] = field(default_factory=lambda: array("b"))
    busy: dict[str, float] = field(
        default_factory=lambda: {"frontend": 0.0, "engine": 0.0, "hub": 0.0}
    )


class _Frontend:
    """A frontend, which handles one request at a time.

    Attributes:
        queue: requests that wait for it, before or after their engine.
        current: request that it handles now.
        in_flight: number of its texts in each engine.
    """

    def __init__(self, engines: int) -> None:
        self.queue: deque[SimRequest] = deque()
        self.current: SimRequest | None = None
        self.shedding = LoadShedding()
        self.in_flight = [0] * engines


class SimServer:
    """One server; its owner advances its time.

    The processes share the cores evenly: while more processes than cores have work, all run at the
    same lower speed. Half of the cost of a request in the frontend comes before the engine, and
    half after it. A deadline counts from the time when the frontend begins. A refused request costs
    the frontend as much as a request without texts; a real frontend spends less on bodies that it
    does not read. The frontend decides budgets, and answers the texts that step 0 answers. Load
    shedding compares tokens instead of bytes.

    Args:
        model: its only model.
        settings: frontends, engines (0: one per core), queues, deadline and quality.
        cores: number of cores that the processes share.
        costs: costs outside of passes.
        records: receives the results of requests.
    """

    def __init__(
        self,
        model: SimModel,
        settings: Settings,
        cores: int,
        costs: ServerCosts,
        records: Records,
    ) -> None:
        engines = settings.engines or cores
        self.now = 0.0
        self.in_flight = 0
        """Number of requests that have not ended."""
        self._cores = cores
        self._costs = costs
        self._model = model
        self._records = records
        self._timeout = settings.timeout_ms / 1000
        self._room = settings.max_queue_items * engines
        self._frontends = [_Frontend(engines) for _ in range(settings.fronts)]
        self._engines = [
            SimEngine(model, settings, costs.engine, self._expired) for _ in range(engines)
        ]
        # Processor sharing in virtual time: `_served` is the processor time that each busy process
        # has had. A process ends its work when `_served` reaches its entry in `_done`.
        self._served = 0.0
        self._busy = 0
        self._hub = settings.fronts + engines
        self._done = [_NEVER] * (self._hub + 1)
        self._turn = 0

    def offer(self, texts: Sequence[Text]) -> None:
        """Receive a request now."""
        request = SimRequest(self.now, _NEVER, texts)
        request.frontend = self._turn
        self._turn = (self._turn + 1) % len(self._frontends)
        self.in_flight += 1
        self._queue(request)

    def advance(self, until: float) -> None:
        """Advance the time to `until`."""
        done = self._done
        while self._busy:
            soonest = min(done)
            speed = self._cores / self._busy if self._busy > self._cores else 1.0
            at = self.now + (soonest - self._served) / speed
            if at > until:
                self._served += (until - self.now) * speed
                self.now = until
                return
            self.now, self._served = at, soonest
            process = done.index(soonest)
            done[process] = _NEVER
            self._busy -= 1
            if process < len(self._frontends):
                self._frontend_done(process)
            elif process < self._hub:
                self._engine_done(process - len(self._frontends))
        # While the server is idle, `_served` can be reset, so the numbers stay small and exact.
        self._served = 0.0
        if until < _NEVER:
            self.now = until

    def _start(self, process: int, kind: str, work: float) -> None:
        self._done[process] = self._served + work
        self._busy += 1
        self._records.busy[kind] += work

    # Frontends

    def _queue(self, request: SimRequest) -> None:
        frontend = self._frontends[request.frontend]
        frontend.queue.append(request)
        if frontend.current is None:
            self._start_next(request.frontend)

    def _start_next(self, index: int, share: float = 1.0) -> None:
        """Start the next request of a frontend, at this share of its cost."""
        frontend = self._frontends[index]
        request = frontend.current = frontend.queue.popleft() if frontend.queue else None
        if request is None:
            return
        cost, count = self._costs.frontend, len(request.texts)
        if request.outcome == "answered":
            work = cost.seconds(count, request.tokens) / 2
        elif request.outcome is not None:
            work = cost.request / 2
        elif self._sheds(frontend.shedding, request):
            request.outcome = "refused"
            work = cost.request
        else:
            request.held = True
            request.deadline = self.now + self._timeout
            frontend.shedding.enter(count, self._timeout, self.now)
            work = cost.seconds(count, request.tokens) / 2
            work += self._model.table.batch(0, request.tokens, count)
        self._start(index, "frontend", share * work)

    def _sheds(self, shedding: LoadShedding, request: SimRequest) -> bool:
        count, size = len(request.texts), request.tokens
        shedding.note_delay(self.now - request.arrived, self.now)
        if shedding.sheds(size, self.now):
            return True
        full = bool(shedding.texts) and shedding.texts + count > self._room
        if full:
            shedding.learn_refusal(size, shedding.texts)
        return full

    def _frontend_done(self, index: int) -> None:
        request = self._frontends[index].current
        assert request is not None
        if request.outcome is None:
            self._send_to_engine(request)
        else:
            self._end(request)
        self._start_next(index, self._costs.among)

    def _send_to_engine(self, request: SimRequest) -> None:
        in_flight = self._frontends[request.frontend].in_flight
        engine = request.engine = in_flight.index(min(in_flight))
        request.level = self._engines[engine].level(self.now)
        hard = sum([bool(text.steps[request.level]) for text in request.texts])
        request.sent = hard
        in_flight[engine] += hard
        if not hard:
            self._return(request, "answered")
        elif self.now >= request.deadline:
            self._return(request, "expired")
        elif self._engines[engine].receive(request, self.now) is not None:
            shedding = self._frontends[request.frontend].shedding
            shedding.learn_refusal(request.tokens, shedding.texts - len(request.texts))
            self._return(request, "refused")
        elif self._done[len(self._frontends) + engine] == _NEVER:
            self._begin_pass(engine)

    def _return(self, request: SimRequest, outcome: Outcome) -> None:
        self._frontends[request.frontend].in_flight[request.engine] -= request.sent
        request.outcome = outcome
        self._queue(request)

    def _end(self, request: SimRequest) -> None:
        assert request.outcome is not None
        count, records = len(request.texts), self._records
        self.in_flight -= 1
        if request.held:
            self._frontends[request.frontend].shedding.leave(
                count, request.outcome == "answered", self.now
            )
        records.arrived.append(request.arrived)
        records.latency.append(self.now - request.arrived + self._costs.way)
        records.outcome.append(OUTCOMES.index(request.outcome))
        records.texts.append(count)
        records.level.append(LEVELS.index(request.level))
        work = self._costs.hub.seconds(count, request.tokens)
        if self._done[self._hub] == _NEVER:
            self._start(self._hub, "hub", work)
        else:
            work *= self._costs.among
            self._done[self._hub] += work
            records.busy["hub"] += work

    # Engines

    def _begin_pass(self, engine: int) -> None:
        work = self._engines[engine].begin(self.now)
        if work is not None:
            self._start(len(self._frontends) + engine, "engine", work)

    def _engine_done(self, engine: int) -> None:
        for request in self._engines[engine].finish(self.now):
            self._return(request, "answered")
        self._begin_pass(engine)

    def _expired(self, request: SimRequest) -> None:
        self._return(request, "expired")
