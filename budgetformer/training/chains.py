"""Search for the best chain of steps, f_o's bands over it, and confidence thresholds.

Every text has been run at every step, so the cost and the value of a chain at a threshold are array
arithmetic. Chains with the same last links share those results, which are computed once.
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
"""Tried exit margins; with the last one, step 0 never answers."""
MAX_LINKS = 4
"""Maximum links of a chain, step 0 not counted."""
THRESHOLDS = 48
"""Number of thresholds at which chains are compared."""
BINS = 24
"""Number of parts of the range of s, at whose bounds bands may begin."""
MIN_LINK_SHARE = 0.02
"""Share of the texts that a link must answer to count as in use."""
NOISE = 0.5
"""Two chains are different if their means differ by more than this many standard errors."""
CANDIDATES = 500
"""Number of candidate thresholds for a level."""
CHUNK = 4096
"""Texts summed at a time, to bound memory."""

Chain = tuple[int, ...]


def chains(config: Architecture) -> list[Chain]:
    """Return every chain of a network whose links together cost at most one full step.

    They begin with step 0 if there is one. Of steps with the same heads, only the first is used.
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
    """The goal for which a threshold is chosen.

    Attributes:
        cost: maximise the mean value at a mean cost of at most this; if every threshold costs more,
            minimise the cost.
        value: instead, minimise the mean cost at a mean value of at least this; if no threshold
            reaches it, maximise the value.
    """

    cost: float = math.inf
    value: float | None = None

    def score(self, value: np.ndarray, cost: np.ndarray) -> np.ndarray:
        """Return the score to maximise, from mean values and costs of any shape."""
        if self.value is None:
            return np.where(cost <= self.cost, value, -cost)
        return np.where(value >= self.value, -cost, value - 10)

    def per_text(self, value: np.ndarray, cost: np.ndarray) -> np.ndarray:
        """Return each text's contribution to the score, from its value and cost."""
        return value if self.value is None else -cost


@dataclass(frozen=True)
class Steps:
    """The answers of every step to N texts, [S+1, N] each (row 0 is step 0).

    Attributes:
        confidence: of the answer.
        value: of the answer, 0..1.
        cost: of running the step; row 0 is the decision, which every text needs.
        s: f_o's output [N].
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
        """Return the same steps with step 0's confidence reduced by a margin."""
        confidence = self.confidence.copy()
        confidence[0] -= margin
        return replace(self, confidence=confidence)

    @cached_property
    def thresholds(self) -> np.ndarray:
        """Thresholds at even quantiles of the confidences, rising, from 0 to 1, [Q]."""
        spread = np.quantile(self.confidence, np.linspace(0, 1, THRESHOLDS)[1:-1])
        return np.unique([0.0, *spread.clip(0, 1), 1.0]).astype(np.float32)


@dataclass(frozen=True)
class Walk:
    """The paths of N texts under a rule: the last step `ends` [N], the steps `ran` [S+1, N]."""

    ends: np.ndarray
    ran: np.ndarray


@dataclass(frozen=True)
class Route:
    """Chain, bands over s and exit margin of a `BudgetRule`, without its threshold."""

    chain: Chain
    entry: tuple[EntryBand, ...]
    exit_margin: float = 0.0

    def walk(self, confidence: np.ndarray, s: np.ndarray, threshold: float) -> Walk:
        """Return the paths of texts with these confidences [S+1, N] and s [N]."""
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

    def value_and_cost(self, steps: Steps, threshold: float) -> tuple[np.ndarray, np.ndarray]:
        """Return the value and cost of each text's answer at a threshold, [N] each."""
        walk = self.walk(steps.confidence, steps.s, threshold)
        spent = (walk.ran[1:] * steps.cost[1:]).sum(0) + steps.cost[0]
        return steps.value[walk.ends, np.arange(len(steps))], spent


@dataclass(frozen=True)
class Curve:
    """A route with its mean value and cost at each threshold on the texts that chose it, [Q] each.

    Differences in value up to `grain` do not justify a higher cost.
    """

    route: Route
    thresholds: np.ndarray
    value: np.ndarray
    cost: np.ndarray
    grain: float

    @classmethod
    def of(cls, route: Route, steps: Steps, grain: float = 0.0) -> Curve:
        """Evaluate a route at thresholds at even quantiles of its confidences."""
        used = steps.confidence[list(route.chain)]
        spread = np.quantile(used, np.linspace(0, 1, CANDIDATES)).round(5)
        thresholds = np.unique([0.0, *spread, 1.0])
        value_and_cost = [route.value_and_cost(steps, threshold) for threshold in thresholds]
        value, cost = (
            np.array([part.mean() for part in own]) for own in zip(*value_and_cost, strict=True)
        )
        return cls(route, thresholds, value, cost, grain)

    def threshold(self, goal: Goal) -> float:
        """Return the lowest threshold whose score for a goal is within `grain` of the best."""
        score = goal.score(self.value, self.cost)
        return float(self.thresholds[np.argmax(score >= score.max() - self.grain)])


def search(
    steps: Steps,
    options: Sequence[Chain],
    goals: Sequence[Goal],
    margins: Sequence[float] = EXIT_MARGINS,
) -> Route:
    """Return the chain, bands and exit margin with the best mean score over some goals.

    Each route is scored at its best threshold for each goal. Routes whose paired difference is
    within noise count as equal; among them, the one with the most links in use wins, then the best.

    Args:
        steps: answers to the texts on which the route is chosen.
        options: chains to try.
        goals: goals to score.
        margins: exit margins to try with chains that have step 0 and another step.
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
    """Return each text's mean contribution to the scores [N], and how many steps are in use."""
    texts = np.zeros(len(steps))
    shares = np.zeros(len(steps.confidence))
    for threshold, goal in zip(thresholds, goals, strict=True):
        walk = route.walk(steps.confidence, steps.s, threshold)
        texts += goal.per_text(*route.value_and_cost(steps, threshold)) / len(goals)
        counts = np.bincount(walk.ends, minlength=len(shares))
        shares = np.maximum(shares, counts / len(steps))
    return texts, int((shares >= MIN_LINK_SHARE).sum())


class _Search:
    """Sums of value and cost per bin of s and threshold, for every tail of a chain."""

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
        """Return the upper bounds of the bins of s, with equally many texts past step 0 in each."""
        order = np.argsort(steps.s, kind="stable")
        weight = (steps.confidence[0] < steps.thresholds[:, None]).mean(0)[order].cumsum()
        ends = np.searchsorted(weight, weight[-1] * np.arange(1, BINS) / BINS)
        inner = np.unique(steps.s[order][ends.clip(max=len(order) - 1)])
        return np.append(inner[inner < 1], 1.0)

    def _from(self, links: Chain, part: Steps, known: dict[Chain, np.ndarray]) -> np.ndarray:
        """Return value and cost [2, Q, N] of texts that start at the first of these links."""
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
        """Return every split of s into bands, with mean value and cost [2, splits, Q]."""
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
        else:  # only step 0, whose answers are all final, as at threshold 0
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
