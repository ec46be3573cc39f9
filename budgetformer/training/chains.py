"""Search for the best chain of steps, its bands over f_o's s, and confidence thresholds.

Every text has been run at every step, so the cost and the value of a chain at a threshold are array
arithmetic. Chains with the same last links share the sums over those links.
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
"""Exit margins that are tried; with the last one, step 0 never answers."""
MAX_LINKS = 4
"""Maximum number of links (steps) of a chain, without step 0."""
THRESHOLDS = 48
"""Number of thresholds at which chains are compared."""
BINS = 24
"""Number of bins of s; bands begin at their bounds."""
MIN_LINK_SHARE = 0.02
"""Minimum share of the texts that a link answers if it is in use."""
NOISE = 0.5
"""Standard errors by which the mean scores of two chains must differ to count as different."""
CANDIDATES = 500
"""Number of candidate thresholds for a level."""
CHUNK = 4096
"""Number of texts summed at a time, to bound memory."""

Chain = tuple[int, ...]
"""Ladder steps that a text runs until one of its answers is confident enough, rising."""


def chains(config: Architecture) -> list[Chain]:
    """Return every chain of a network whose steps together cost at most one full step.

    Chains begin with step 0 if the network has it. Of steps with the same heads, only the first is
    used.
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
        cost: maximum mean cost, at which the mean value is maximised; if every threshold costs
            more, the cost is minimised.
        value: minimum mean value, at which the mean cost is minimised; if no threshold reaches it,
            the value is maximised. None: the goal is `cost`.
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
        confidence: confidence of the answer.
        value: value of the answer, 0..1: its expected correctness or its agreement.
        cost: cost of running the step; row 0 is the decision, which every text needs.
        s: f_o's output [N].
    """

    confidence: np.ndarray
    value: np.ndarray
    cost: np.ndarray
    s: np.ndarray

    def __len__(self) -> int:
        return len(self.s)

    def subset(self, rows: np.ndarray) -> Steps:
        """Return the answers to the texts in `rows`."""
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
    """The paths of N texts along a route.

    Attributes:
        ends: last step that ran, whose answer is returned [N].
        ran: whether each step ran [S+1, N].
    """

    ends: np.ndarray
    ran: np.ndarray


@dataclass(frozen=True)
class Route:
    """A `BudgetRule` without its threshold: chain, bands over s and exit margin."""

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
    """The mean value and cost of a route at Q thresholds, on the texts on which it was chosen.

    Attributes:
        route: the route.
        thresholds: thresholds, rising [Q].
        value, cost: mean value and mean cost at each threshold [Q].
        tolerance: difference in value that does not justify a higher cost.
    """

    route: Route
    thresholds: np.ndarray
    value: np.ndarray
    cost: np.ndarray
    tolerance: float

    @classmethod
    def of(cls, route: Route, steps: Steps, tolerance: float = 0.0) -> Curve:
        """Evaluate a route at thresholds at even quantiles of its confidences."""
        used = steps.confidence[list(route.chain)]
        spread = np.quantile(used, np.linspace(0, 1, CANDIDATES)).round(5)
        thresholds = np.unique([0.0, *spread, 1.0])
        value_and_cost = [route.value_and_cost(steps, threshold) for threshold in thresholds]
        value, cost = (
            np.array([of_texts.mean() for of_texts in at_thresholds])
            for at_thresholds in zip(*value_and_cost, strict=True)
        )
        return cls(route, thresholds, value, cost, tolerance)

    def threshold(self, goal: Goal) -> float:
        """Return the lowest threshold whose score for a goal is, within the tolerance, the best."""
        score = goal.score(self.value, self.cost)
        return float(self.thresholds[np.argmax(score >= score.max() - self.tolerance)])

    def above(self, threshold: float, share: float) -> float:
        """Return the threshold at this share of the ranks between `threshold` and the highest."""
        rank = np.searchsorted(self.thresholds, threshold)
        return float(self.thresholds[rank + math.ceil(share * (len(self.thresholds) - 1 - rank))])


def search(
    steps: Steps,
    options: Sequence[Chain],
    goals: Sequence[Goal],
    margins: Sequence[float] = EXIT_MARGINS,
) -> Route:
    """Return the chain, bands and exit margin with the best mean score over some goals.

    Each route is scored at its best threshold for each goal. Routes whose paired difference to the
    best is within noise count as equal; of these, the route with the most links in use is returned,
    and among those the one with the best score.

    Args:
        steps: answers to the texts on which the route is chosen.
        options: chains to try.
        goals: goals for which routes are scored.
        margins: exit margins to try with chains that have step 0 and another step.
    """
    routes: list[tuple[Route, list[float], float]] = []
    for margin in margins:
        tried = [option for option in options if not margin or (not option[0] and len(option) > 1)]
        if tried:
            best = _Search(steps.with_exit_margin(margin), tried).best(goals)
            routes += [(replace(route, exit_margin=margin), at, score) for route, at, score in best]
    by_text, links_in_use = zip(
        *(_score_texts(route, steps, thresholds, goals) for route, thresholds, _ in routes),
        strict=True,
    )
    scores = np.array([score for _, _, score in routes])
    top = int(scores.argmax())
    behind = by_text[top] - np.stack(by_text)
    noise = NOISE * behind.std(1) / np.sqrt(len(steps))
    equal = np.flatnonzero(scores >= scores[top] - noise)
    return routes[max(equal, key=lambda i: (links_in_use[i], scores[i]))][0]


def _score_texts(
    route: Route, steps: Steps, thresholds: Sequence[float], goals: Sequence[Goal]
) -> tuple[np.ndarray, int]:
    """Return each text's mean contribution to the scores [N], and the number of steps in use."""
    by_text = np.zeros(len(steps))
    shares = np.zeros(len(steps.confidence))
    for threshold, goal in zip(thresholds, goals, strict=True):
        walk = route.walk(steps.confidence, steps.s, threshold)
        by_text += goal.per_text(*route.value_and_cost(steps, threshold)) / len(goals)
        counts = np.bincount(walk.ends, minlength=len(shares))
        shares = np.maximum(shares, counts / len(steps))
    return by_text, int((shares >= MIN_LINK_SHARE).sum())


class _Search:
    """Sums of value and cost by threshold and bin of s, for the last links of every chain."""

    def __init__(self, steps: Steps, options: Sequence[Chain]) -> None:
        self.count, self.thresholds, self.options = len(steps), steps.thresholds, options
        self.bounds = self._bounds(steps)
        self.base = float(steps.cost[0].mean())
        bins = np.searchsorted(self.bounds, steps.s)
        order = np.argsort(bins, kind="stable")
        endings = {
            (option[start:], option[0] == 0)
            for option in options
            for start in range(int(option[0] == 0), len(option))
        }
        shape = (2, len(self.thresholds), len(self.bounds))
        self.sums = {ending: np.zeros(shape) for ending in endings}
        self.answered_at_0 = np.zeros(shape[:2])
        for begin in range(0, self.count, CHUNK):
            rows = order[begin : begin + CHUNK]
            part = steps.subset(rows)
            present, starts = np.unique(bins[rows], return_index=True)
            passes_0 = part.confidence[0] < self.thresholds[:, None]
            self.answered_at_0[0] += np.where(passes_0, 0, part.value[0]).sum(1)
            cache: dict[Chain, np.ndarray] = {}
            for (links, after_0), sums in self.sums.items():
                value_and_cost = self._value_and_cost(links, part, cache)
                if after_0:
                    value_and_cost = np.where(passes_0, value_and_cost, 0)
                sums[..., present] += np.add.reduceat(value_and_cost, starts, axis=-1)

    def best(self, goals: Sequence[Goal]) -> list[tuple[Route, list[float], float]]:
        """Return each chain's best route, its threshold for each goal, and its mean score."""
        routes = []
        for option in self.options:
            splits, (value, cost) = self._totals(option)
            scores = np.stack([goal.score(value, cost) for goal in goals])
            mean = scores.max(-1).mean(0)
            best = int(mean.argmax())
            thresholds = self.thresholds[scores[:, best].argmax(-1)].tolist()
            routes.append((self._route(option, splits[best]), thresholds, float(mean[best])))
        return routes

    @staticmethod
    def _bounds(steps: Steps) -> np.ndarray:
        """Return the upper bounds of bins of s that hold equal numbers of texts past step 0."""
        order = np.argsort(steps.s, kind="stable")
        weight = (steps.confidence[0] < steps.thresholds[:, None]).mean(0)[order].cumsum()
        ends = np.searchsorted(weight, weight[-1] * np.arange(1, BINS) / BINS)
        inner = np.unique(steps.s[order][ends.clip(max=len(order) - 1)])
        return np.append(inner[inner < 1], 1.0)

    def _value_and_cost(
        self, links: Chain, part: Steps, cache: dict[Chain, np.ndarray]
    ) -> np.ndarray:
        """Return value and cost [2, Q, N] of texts that start at the first of these links."""
        if links not in cache:
            step = links[0]
            of_step = np.stack([part.value[step], part.cost[step]])[:, None]
            if len(links) == 1:
                cache[links] = np.repeat(of_step, len(self.thresholds), axis=1)
            else:
                later = self._value_and_cost(links[1:], part, cache)
                is_final = part.confidence[step] >= self.thresholds[:, None]
                value = np.where(is_final, of_step[0], later[0])
                cost = of_step[1] + np.where(is_final, 0, later[1])
                cache[links] = np.stack([value, cost])
        return cache[links]

    def _totals(self, option: Chain) -> tuple[list[tuple[int, ...]], np.ndarray]:
        """Return every split of the bins into bands, and mean value and cost [2, splits, Q]."""
        after_0 = option[0] == 0
        links = option[1:] if after_0 else option
        if links:
            bins = len(self.bounds)
            cuts = list(combinations_with_replacement(range(bins + 1), len(links) - 1))
            ends = np.array([(0, *cut, bins) for cut in cuts])
            totals = np.zeros((2, len(cuts), len(self.thresholds)))
            totals += self.answered_at_0[:, None] if after_0 else 0
            for i in range(len(links)):
                sums = self.sums[links[i:], after_0].cumsum(-1)
                prefix = np.pad(sums, ((0, 0), (0, 0), (1, 0)))
                of_band = prefix[..., ends[:, i + 1]] - prefix[..., ends[:, i]]
                totals += of_band.swapaxes(1, 2)
        else:  # only step 0: all its answers are final, as at threshold 0
            cuts, totals = [()], np.zeros((2, 1, len(self.thresholds)))
            totals[0] = self.answered_at_0[0, 0]
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
