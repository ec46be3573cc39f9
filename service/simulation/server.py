"""A server in virtual time: frontends, engines and the hub, which share its cores."""

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
    """What became of requests, in the order in which they were done with.

    Attributes:
        arrived: when each came, seconds.
        latency: seconds until its answer was written, whatever it was.
        outcome: place in `OUTCOMES`.
        texts: of each.
        level: place in `LEVELS` of the quality that it got.
        busy: seconds of processor time, by kind of process.
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
    """A frontend: it does one thing after the other, and holds what it has let in."""

    def __init__(self, engines: int) -> None:
        self.queue: deque[SimRequest] = deque()
        self.does: SimRequest | None = None
        self.shedding = LoadShedding()
        self.in_flight = [0] * engines


class SimServer:
    """One server, moved through time by whoever holds it.

    Its processes share the cores evenly: while more of them have work than there are cores, each
    runs at the same part of its speed. Half of what a request costs a frontend comes before the
    engine and half after it; a deadline counts from when the frontend begins. A request that is
    refused costs the frontend what it costs without texts; one that is turned away unread costs a
    real frontend less.
    The frontend decides budgets, and answers itself what step 0 answers.
    Load shedding is told tokens in place of bytes.

    Args:
        model: the only one that it serves.
        settings: frontends, engines (0: one per core), queues, deadline and quality.
        cores: that the processes share.
        costs: outside of the passes.
        records: where what becomes of requests is kept.
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
        """Requests that are here."""
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
        # Processor sharing in virtual time: `_served` grows with what each busy process gets, and
        # a process is done when it reaches what it began at plus its work.
        self._served = 0.0
        self._busy = 0
        self._hub = settings.fronts + engines
        self._done = [_NEVER] * (self._hub + 1)
        self._turn = 0

    def offer(self, texts: Sequence[Text]) -> None:
        """Let a request come now."""
        request = SimRequest(self.now, _NEVER, texts)
        request.frontend = self._turn
        self._turn = (self._turn + 1) % len(self._frontends)
        self.in_flight += 1
        self._queue(request)

    def advance(self, until: float) -> None:
        """Let time pass."""
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
        # Nothing counts from before an idle moment, so the numbers stay small and exact.
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
        if frontend.does is None:
            self._next_of(request.frontend)

    def _next_of(self, place: int, share: float = 1.0) -> None:
        """Begin what waits for a frontend, for some share of what it costs."""
        frontend = self._frontends[place]
        request = frontend.does = frontend.queue.popleft() if frontend.queue else None
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
        self._start(place, "frontend", share * work)

    def _sheds(self, shedding: LoadShedding, request: SimRequest) -> bool:
        count, size = len(request.texts), request.tokens
        shedding.note_delay(self.now - request.arrived, self.now)
        if shedding.sheds(size, self.now):
            return True
        full = bool(shedding.texts) and shedding.texts + count > self._room
        if full:
            shedding.learn_refusal(size, shedding.texts)
        return full

    def _frontend_done(self, place: int) -> None:
        request = self._frontends[place].does
        assert request is not None
        if request.outcome is None:
            self._ask_engine(request)
        else:
            self._leave(request)
        self._next_of(place, self._costs.among)

    def _ask_engine(self, request: SimRequest) -> None:
        in_flight = self._frontends[request.frontend].in_flight
        place = request.engine = in_flight.index(min(in_flight))
        request.level = self._engines[place].level(self.now)
        hard = sum([bool(text.steps[request.level]) for text in request.texts])
        request.sent = hard
        in_flight[place] += hard
        if not hard:
            self._return(request, "answered")
        elif self.now >= request.deadline:
            self._return(request, "expired")
        elif self._engines[place].receive(request, self.now) is not None:
            shedding = self._frontends[request.frontend].shedding
            shedding.learn_refusal(request.tokens, shedding.texts - len(request.texts))
            self._return(request, "refused")
        elif self._done[len(self._frontends) + place] == _NEVER:
            self._begin(place)

    def _return(self, request: SimRequest, outcome: Outcome) -> None:
        self._frontends[request.frontend].in_flight[request.engine] -= request.sent
        request.outcome = outcome
        self._queue(request)

    def _leave(self, request: SimRequest) -> None:
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

    def _begin(self, place: int) -> None:
        work = self._engines[place].begin(self.now)
        if work is not None:
            self._start(len(self._frontends) + place, "engine", work)

    def _engine_done(self, place: int) -> None:
        for request in self._engines[place].finish(self.now):
            self._return(request, "answered")
        self._begin(place)

    def _expired(self, request: SimRequest) -> None:
        self._return(request, "expired")
