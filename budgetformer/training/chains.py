"""Search the chain of steps, f_o's bands over it, and confidence thresholds, by look-up.

Every text has been run at every step, so what a chain costs and reaches at a threshold is array
arithmetic. What happens from a link on is the same for all chains that end alike, so it is
computed once for each ending.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations, combinations_with_replacement

import numpy as np

from budgetformer.cost.macs import fits_in_full_pass
from budgetformer.inference.policy import EntryBand, threshold_at
from budgetformer.model.architecture import Architecture

EXIT_MARGINS = (0.0, 0.1, 0.2, 0.4, 1.0)
"""How much more confident than the others step 0 may have to be; with the last one it never is."""
MAX_LINKS = 4
"""Links of a chain, step 0 not counted."""
THRESHOLDS = 48
"""Thresholds at which chains are compared."""
BINS = 24
"""Parts of the range of s between which bands may begin."""
USED = 0.02
"""Share of the texts that a link must answer to count as one in use."""
NOISE = 0.5
"""Standard errors by which the means of two chains must differ to count as different."""
CANDIDATES = 500
"""Thresholds among which that of a level is chosen."""
CHUNK = 4096
"""Texts that are summed at a time: what is kept of each ending grows with them."""

Chain = tuple[int, ...]


def chains(config: Architecture) -> list[Chain]:
    """Return every chain of a network whose links together cost no more than its full step.

    They begin with step 0 where there is one. Of steps that compute the same heads, one is used.
    """
    first = (0,) if config.embedding_exit else ()
    steps = [
        step
        for step in range(1, config.num_steps + 1)
        if config.ladder[step - 1] not in config.ladder[: step - 1]
    ]
    found: list[Chain] = [first] if first else []
    for count in range(1, MAX_LINKS + 1):
        for links in combinations(steps, count):
            if fits_in_full_pass(config, links):
                found.append(first + links)
    return found


@dataclass(frozen=True)
class Goal:
    """What a threshold is to reach on average.

    Attributes:
        cost: the most value at a mean cost of at most this; if all cost more, the least cost.
        value: the least cost at a mean value of at least this, instead; if none has it, the most
            value.
    """

    cost: float = math.inf
    value: float | None = None

    def score(self, value: np.ndarray, cost: np.ndarray) -> np.ndarray:
        """Return what is to be as large as possible, from mean values and costs, of any shape."""
        if self.value is None:
            return np.where(cost <= self.cost, value, -cost)
        return np.where(value >= self.value, -cost, value - 10)

    def per_text(self, value: np.ndarray, cost: np.ndarray) -> np.ndarray:
        """Return the part of each text in the score, from its value and cost."""
        return value if self.value is None else -cost


@dataclass(frozen=True)
class Steps:
    """What every step gives each of N texts, [S+1, N] each (row 0 is step 0).

    Attributes:
        confidence: of its answer.
        value: what its answer is worth, 0..1.
        cost: of running it; row 0 is the decision, which every text pays.
        s: f_o's verdict [N].
    """

    confidence: np.ndarray
    value: np.ndarray
    cost: np.ndarray
    s: np.ndarray

    def __len__(self) -> int:
        return len(self.s)

    def subset(self, rows: np.ndarray) -> Steps:
        """Return the given texts."""
        return Steps(
            self.confidence[:, rows], self.value[:, rows], self.cost[:, rows], self.s[rows]
        )

    def with_exit_margin(self, margin: float) -> Steps:
        """Return the same steps with step 0's confidence lower by a margin."""
        confidence = self.confidence.copy()
        confidence[0] -= margin
        return replace(self, confidence=confidence)

    @cached_property
    def thresholds(self) -> np.ndarray:
        """Confidences that share the answers evenly, rising, from 0 to 1, [Q]."""
        spread = np.quantile(self.confidence, np.linspace(0, 1, THRESHOLDS)[1:-1])
        return np.unique([0.0, *spread.clip(0, 1), 1.0]).astype(np.float32)


@dataclass(frozen=True)
class Walk:
    """What N texts do under a rule: the step each ends at [N], and which it runs [S+1, N]."""

    ends: np.ndarray
    ran: np.ndarray


@dataclass(frozen=True)
class Route:
    """Chain, bands over s and exit margin, as a `BudgetRule` has; a threshold makes them a rule."""

    chain: Chain
    entry: tuple[EntryBand, ...]
    exit_margin: float = 0.0

    def walk(self, confidence: np.ndarray, s: np.ndarray, threshold: float) -> Walk:
        """Return what texts do whose answers have a confidence [S+1, N], and s [N]."""
        if self.entry:
            bounds = np.array([band.upto for band in self.entry])
            start = np.array([band.step for band in self.entry])[np.searchsorted(bounds, s)]
        else:
            last = len(confidence) - 1
            start = np.ceil(s * last).clip(1, last).astype(np.intp)
        ends = start.copy()
        ran = np.zeros(confidence.shape, dtype=bool)
        waiting = np.ones(len(s), dtype=bool)
        for step in sorted({*self.chain, *start.tolist()}):
            begins = start == step
            if step in self.chain:
                begins |= (start < step) | (step == 0)
            ran[step] = waiting & begins
            needed = threshold_at(step, threshold, self.exit_margin)
            stops = ran[step] & (confidence[step] >= needed)
            ends[ran[step]] = step
            waiting &= ~stops
        return Walk(ends, ran)

    def worth(self, steps: Steps, threshold: float) -> tuple[np.ndarray, np.ndarray]:
        """Return what each text's answer is worth, and costs, at a threshold: [N] each."""
        walk = self.walk(steps.confidence, steps.s, threshold)
        spent = (walk.ran[1:] * steps.cost[1:]).sum(0) + steps.cost[0]
        return steps.value[walk.ends, np.arange(len(steps))], spent


@dataclass(frozen=True)
class Curve:
    """A route, and what its thresholds give on the texts that chose it: means, [Q] each.

    Differences of value up to `grain` are no reason to pay more.
    """

    route: Route
    thresholds: np.ndarray
    value: np.ndarray
    cost: np.ndarray
    grain: float

    @classmethod
    def of(cls, route: Route, steps: Steps, grain: float = 0.0) -> Curve:
        """Measure a route at thresholds that share its answers evenly."""
        used = steps.confidence[list(route.chain)]
        spread = np.quantile(used, np.linspace(0, 1, CANDIDATES)).round(5)
        thresholds = np.unique([0.0, *spread, 1.0])
        worth = [route.worth(steps, threshold) for threshold in thresholds]
        value, cost = (np.array([part.mean() for part in own]) for own in zip(*worth, strict=True))
        return cls(route, thresholds, value, cost, grain)

    def threshold(self, goal: Goal) -> float:
        """Return the lowest threshold that reaches a goal as well as any, but for the grain."""
        score = goal.score(self.value, self.cost)
        return float(self.thresholds[np.argmax(score >= score.max() - self.grain)])


def search(
    steps: Steps,
    options: Sequence[Chain],
    goals: Sequence[Goal],
    margins: Sequence[float] = EXIT_MARGINS,
) -> Route:
    """Return the chain, the bands and the exit margin that reach some goals best, on average.

    Each route is judged at its best threshold for each goal. Routes whose paired difference is
    within noise are equal; of those, the one with most links in use is taken, then the best.

    Args:
        steps: of the texts that choose.
        options: chains to try.
        goals: see there.
        margins: exit margins to try with the chains that have a step 0 and another.
    """
    found = []
    for margin in margins:
        tried = [option for option in options if not margin or (not option[0] and len(option) > 1)]
        if tried:
            own = _Search(steps.with_exit_margin(margin), tried).best(goals)
            found += [(replace(route, exit_margin=margin), at, score) for route, at, score in own]
    judged = [_judge(route, steps, thresholds, goals) for route, thresholds, _ in found]
    scores = np.array([score for _, _, score in found])
    top = int(scores.argmax())
    behind = judged[top][0] - np.stack([texts for texts, _ in judged])
    noise = NOISE * behind.std(1) / np.sqrt(len(steps))
    equal = np.flatnonzero(scores >= scores[top] - noise)
    return found[max(equal, key=lambda i: (judged[i][1], scores[i]))][0]


def _judge(
    route: Route, steps: Steps, thresholds: Sequence[float], goals: Sequence[Goal]
) -> tuple[np.ndarray, int]:
    """Return each text's mean part in the goals [N], and how many steps answer texts."""
    texts = np.zeros(len(steps))
    shares = np.zeros(len(steps.confidence))
    for threshold, goal in zip(thresholds, goals, strict=True):
        walk = route.walk(steps.confidence, steps.s, threshold)
        texts += goal.per_text(*route.worth(steps, threshold)) / len(goals)
        counts = np.bincount(walk.ends, minlength=len(shares))
        shares = np.maximum(shares, counts / len(steps))
    return texts, int((shares >= USED).sum())


class _Search:
    """Sums over texts in parts of the range of s, by threshold, for every ending of a chain."""

    def __init__(self, steps: Steps, options: Sequence[Chain]) -> None:
        self.count, self.thresholds, self.options = len(steps), steps.thresholds, options
        self.bounds = self._bounds(steps)
        self.base = float(steps.cost[0].mean())
        bins = np.searchsorted(self.bounds, steps.s)
        order = np.argsort(bins, kind="stable")
        endings = {
            (option[place:], option[0] == 0)
            for option in options
            for place in range(int(option[0] == 0), len(option))
        }
        shape = (2, len(self.thresholds), len(self.bounds))
        self.sums = {ending: np.zeros(shape) for ending in endings}
        self.stopped = np.zeros(shape[:2])
        for begin in range(0, self.count, CHUNK):
            rows = order[begin : begin + CHUNK]
            part = steps.subset(rows)
            present, starts = np.unique(bins[rows], return_index=True)
            goes_on = part.confidence[0] < self.thresholds[:, None]
            self.stopped[0] += np.where(goes_on, 0, part.value[0]).sum(1)
            known: dict[Chain, np.ndarray] = {}
            for (links, after_0), sums in self.sums.items():
                both = self._from(links, part, known)
                both = np.where(goes_on, both, 0) if after_0 else both
                sums[..., present] += np.add.reduceat(both, starts, axis=-1)

    def best(self, goals: Sequence[Goal]) -> list[tuple[Route, list[float], float]]:
        """Return each chain's best route, its threshold for each goal, and its mean score."""
        found = []
        for option in self.options:
            cuts, (value, cost) = self._totals(option)
            scores = np.stack([goal.score(value, cost) for goal in goals])
            mean = scores.max(-1).mean(0)
            at = int(mean.argmax())
            thresholds = self.thresholds[scores[:, at].argmax(-1)].tolist()
            found.append((self._route(option, cuts[at]), thresholds, float(mean[at])))
        return found

    @staticmethod
    def _bounds(steps: Steps) -> np.ndarray:
        """Return the upper ends of the parts of s: equally many texts go on past step 0 in each."""
        order = np.argsort(steps.s, kind="stable")
        weight = (steps.confidence[0] < steps.thresholds[:, None]).mean(0)[order].cumsum()
        ends = np.searchsorted(weight, weight[-1] * np.arange(1, BINS) / BINS)
        inner = np.unique(steps.s[order][ends.clip(max=len(order) - 1)])
        return np.append(inner[inner < 1], 1.0)

    def _from(self, links: Chain, part: Steps, known: dict[Chain, np.ndarray]) -> np.ndarray:
        """Return value and cost [2, Q, N] of texts that start at the first of some links."""
        if links not in known:
            step = links[0]
            own = np.stack([part.value[step], part.cost[step]])[:, None]
            if len(links) == 1:
                known[links] = np.repeat(own, len(self.thresholds), axis=1)
            else:
                later = self._from(links[1:], part, known)
                stands = part.confidence[step] >= self.thresholds[:, None]
                value = np.where(stands, own[0], later[0])
                known[links] = np.stack([value, own[1] + np.where(stands, 0, later[1])])
        return known[links]

    def _totals(self, option: Chain) -> tuple[list[tuple[int, ...]], np.ndarray]:
        """Return every way to cut s into bands, and mean value and cost [2, ways, Q] of each."""
        after_0 = option[0] == 0
        links = option[1:] if after_0 else option
        if links:
            bins = len(self.bounds)
            cuts = list(combinations_with_replacement(range(bins + 1), len(links) - 1))
            ends = np.array([(0, *cut, bins) for cut in cuts])
            totals = np.zeros((2, len(cuts), len(self.thresholds)))
            totals += self.stopped[:, None] if after_0 else 0
            for place in range(len(links)):
                sums = self.sums[links[place:], after_0].cumsum(-1)
                prefix = np.pad(sums, ((0, 0), (0, 0), (1, 0)))
                own = prefix[..., ends[:, place + 1]] - prefix[..., ends[:, place]]
                totals += own.swapaxes(1, 2)
        else:  # step 0 alone, whose every answer stands, as at threshold 0
            cuts, totals = [()], np.zeros((2, 1, len(self.thresholds)))
            totals[0] = self.stopped[0, 0]
        return cuts, totals / self.count + np.array([0.0, self.base])[:, None, None]

    def _route(self, option: Chain, cuts: Sequence[int]) -> Route:
        links = [step for step in option if step] or [0]
        ends = [*cuts, len(self.bounds)]
        bands = [
            EntryBand(upto=float(self.bounds[end - 1]), step=link)
            for link, begin, end in zip(links, [0, *cuts], ends, strict=True)
            if end > begin
        ]
        return Route(option, tuple(bands))
