"""Calibrate a policy for budgets, and measure its accuracy and cost, on held-out texts.

Every held-out text is run once at every ladder step; any rule can then be evaluated by look-up. The
accuracy of a level is cross-fitted: the texts are split into folds, and for each fold the fusion
weights, f_o's bands and the thresholds come from the other folds. The shipped policy is chosen in
the same way on all texts; only the chain, one of a few dozen, is chosen once. The cost of a level
depends on no label and hardly on the texts that chose it, so it is measured with the shipped rule.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from budgetformer.checkpoint.manifest import FixedStep
from budgetformer.cost.macs import decision_macs, dense_macs, encoder_macs
from budgetformer.cost.table import CostTable
from budgetformer.inference import cascade
from budgetformer.inference.cascade import Items
from budgetformer.inference.packed import PackedPass, PackedTokens
from budgetformer.inference.policy import (
    QUALITY_NAMES,
    BudgetRule,
    EntryBand,
    Level,
    Measure,
    OperatingPoint,
    Policy,
    QualityName,
)
from budgetformer.inference.range_observer import measure_ranges
from budgetformer.inference.ranges import LayerRanges
from budgetformer.model.answers import confidence, fuse, probabilities
from budgetformer.model.architecture import MULTI_LABEL, Architecture
from budgetformer.model.encoder import SequenceClassifier
from budgetformer.training.chains import (
    EXIT_MARGINS,
    Chain,
    Curve,
    Goal,
    Route,
    Steps,
    chains,
    search,
)
from budgetformer.training.data import TokenizedTexts
from budgetformer.training.exits import wrong
from budgetformer.training.fusion import StepFusion, fit_fusion
from budgetformer.training.trainer import progress_bar
from budgetformer.wilson import interval

FOLDS = 5
BATCH = 32
RANGE_TEXTS = 256
"""Number of texts, evenly chosen, on which state ranges are measured."""
UNNAMED_LEVELS = 17
"""Maximum levels without a name, between which accuracy drops are interpolated."""
AGREEMENT = {"fast": 0.97, "balanced": 0.99}
"""Agreement with the full network at the levels of a policy for agreement."""
SEARCHED_AGREEMENT = (0.95, 0.97, 0.99)
"""Agreements at which chains are compared."""
TYPICAL_BATCH = 8
"""Batch size that is assumed when costs are measured seconds."""
TIGHTENING, MAX_TRIES = 0.995, 6
"""Factor by which a goal is tightened if unseen texts miss it, and how often at most."""


@dataclass(frozen=True)
class Runs:
    """The outputs of every step for N texts.

    logits [S+1, N, C]: the encoder's at each step, before fusion (row 0: step 0's); s [N]; lengths
    [N] in tokens.
    """

    logits: Tensor
    s: Tensor
    lengths: np.ndarray

    def subset(self, rows: np.ndarray) -> Runs:
        """Return the given texts."""
        return Runs(self.logits[:, rows], self.s[rows], self.lengths[rows])


@torch.inference_mode()
def ranges_of_states(model: SequenceClassifier, tokens: TokenizedTexts) -> tuple[LayerRanges, ...]:
    """Return the state ranges of each layer, measured on a sample of the texts."""
    count = len(tokens.ids)
    chosen = np.unique(np.linspace(0, count - 1, min(count, RANGE_TEXTS)).astype(int))
    batches = [chosen[start : start + BATCH] for start in range(0, len(chosen), BATCH)]
    windows = (tokens.columns(rows).window for rows in batches)
    return measure_ranges(model, map(PackedTokens.of, windows))


@torch.inference_mode()
def run_every_step(network: PackedPass, tokens: TokenizedTexts) -> Runs:
    """Run N texts at every step of the ladder (scope "input")."""
    config = network.config
    count = len(tokens.ids)
    logits = torch.zeros(config.num_steps + 1, count, config.num_classes)
    s = torch.zeros(count)
    order = np.argsort(tokens.lengths, kind="stable")
    with progress_bar() as bar:
        task = bar.add_task("every step", total=count, note="")
        for start in range(0, count, BATCH):
            rows = order[start : start + BATCH]
            texts = tokens.columns(rows)
            packed = PackedTokens.of(texts.window)
            decision = network.decide(packed, PackedTokens.of(texts.full_text))
            assert decision.budget is not None
            s[rows] = decision.budget
            if decision.exit_logits is not None:
                logits[0, rows] = decision.exit_logits
            for step in range(1, config.num_steps + 1):
                result = network.run(
                    packed, [step] * len(rows), ranking=decision.ranking, fused=False
                )
                logits[step, rows] = result.logits
            bar.advance(task, len(rows))
    return Runs(logits, s, tokens.lengths)


@dataclass(frozen=True)
class Answers:
    """The result of a rule for N texts.

    step, macs, heads [N] each: the step that answered, and the multiply-adds and heads spent in
    all; ran [S+1, N]: the steps that ran.
    """

    step: np.ndarray
    macs: np.ndarray
    heads: np.ndarray
    ran: np.ndarray


def answers_of(logits: Tensor, problem_type: str | None) -> Tensor:
    """Return the class ids [N] that logits [N, C] choose, or 0/1 rows [N, C] when multi-label."""
    return (logits > 0).long() if problem_type == MULTI_LABEL else logits.argmax(-1)


class Table:
    """The answers of every step to N texts, with confidence and cost, [S+1, N] each.

    Args:
        config: the network's.
        runs: the network's outputs.
        fusion: weights of each step 1..S; None: those of the configuration.
    """

    def __init__(
        self, config: Architecture, runs: Runs, fusion: Sequence[StepFusion] | None = None
    ) -> None:
        self.config, self.runs, self.lengths = config, runs, runs.lengths
        weights = fusion or list(zip(config.encoder_weights, config.exit_weights, strict=True))
        own, exits = torch.tensor(weights).T[..., None, None]
        fused = fuse(runs.logits[1:], runs.logits[0], own, exits)
        self.logits = torch.cat([runs.logits[:1], fused])
        self.confidence = confidence(self.logits, config.problem_type).numpy()
        self.s = runs.s.numpy()
        self.rows = np.arange(len(self.s))
        self.decision = np.array([decision_macs(config, int(n)) for n in self.lengths])
        plans = [[0] * config.num_hidden_layers, *config.ladder]
        self.heads = np.array([sum(plan) for plan in plans])

    @cached_property
    def macs(self) -> np.ndarray:
        """Multiply-adds of each step's pass; step 0 has none."""
        lengths, inverse = np.unique(self.lengths, return_inverse=True)
        by_length = [[0] * len(lengths)]
        by_length += [
            [encoder_macs(self.config, plan, int(n)) for n in lengths]
            for plan in self.config.ladder
        ]
        return np.array(by_length, dtype=np.float64)[:, inverse]

    @cached_property
    def dense(self) -> np.ndarray:
        """Multiply-adds of the dense network, [N]."""
        return np.array([dense_macs(self.config, int(n)) for n in self.lengths], dtype=np.float64)

    def right(self, labels: Tensor) -> np.ndarray:
        """Return whether each step's answer equals the labels [N] or [N, C]: [S+1, N]."""
        marks = [wrong(step, labels, self.config.problem_type) for step in self.logits]
        return np.asarray(torch.stack(marks) == 0)

    def agrees(self, full: Tensor) -> np.ndarray:
        """Return whether each step's answer equals that of the full logits [N, C]: [S+1, N]."""
        return self.right(answers_of(full, self.config.problem_type))

    def probability_right(self) -> np.ndarray:
        """Return the probability of each step's answer according to the full step: [S+1, N]."""
        full = probabilities(self.logits[-1], self.config.problem_type)
        if self.config.problem_type == MULTI_LABEL:
            return torch.where(self.logits > 0, full, 1 - full).prod(-1).numpy()
        return full.gather(-1, self.logits.argmax(-1).T).T.numpy()

    def answer(self, rule: BudgetRule, signal: np.ndarray | None = None) -> Answers:
        """Return the result of a rule, whose bands are over `signal` [N]; None: over f_o's s."""
        if rule.fixed is not None:
            route, threshold = Route((), (EntryBand(upto=1, step=rule.fixed),)), 0.0
        else:
            route = Route(rule.chain, rule.entry, rule.exit_margin)
            threshold = 0.0 if rule.level is None else rule.level.threshold
        return self.take(route, threshold, signal)

    def take(self, route: Route, threshold: float, signal: np.ndarray | None = None) -> Answers:
        """Return the result of a route at a threshold; see `answer`."""
        s = self.s if signal is None else signal
        walk = route.walk(self.confidence, s, threshold)
        macs = (walk.ran * self.macs).sum(0) + self.decision
        return Answers(walk.ends, macs, self.heads @ walk.ran, walk.ran)

    def fixed_steps(self, right: np.ndarray, measure: Measure) -> list[FixedStep]:
        """Return the score of each step if all texts run it."""
        first = 0 if self.config.embedding_exit else 1
        return [
            FixedStep.model_validate(
                {
                    "step": step,
                    measure: float(right[step].mean()),
                    "macs_share": float((self.macs[step] + self.decision).sum() / self.dense.sum()),
                }
            )
            for step in range(first, len(right))
        ]


@dataclass(frozen=True)
class Found:
    """The result of a calibration.

    Attributes:
        fusion: weights of each step 1..S.
        fixed: scores of each step if all texts run it, for comparison.
        policy: the policy; None if the layers decide the budgets, with `points` as levels.
        points: see `layerwise_points`.
    """

    fusion: list[StepFusion]
    fixed: list[FixedStep]
    policy: Policy | None = None
    points: list[OperatingPoint] = field(default_factory=list)

    @property
    def full_accuracy(self) -> float:
        """Accuracy of the full step on the calibration texts, which must have labels."""
        accuracy = (self.fixed or self.points)[-1].accuracy
        assert accuracy is not None
        return accuracy

    def of_manifest(self) -> dict[str, Any]:
        """Return the manifest fields that calibration sets."""
        return {
            "frontier": tuple(self.fixed),
            "policy": self.policy,
            "operating_points": tuple(self.points),
        }


def calibrate(
    config: Architecture,
    runs: Runs,
    labels: Tensor | None,
    level_costs: Sequence[float],
    costs: CostTable | None = None,
    original: Tensor | None = None,
) -> Found:
    """Return the calibrated policy of a network.

    With labels, levels maximise accuracy: `fast` and `balanced` at a mean cost of at most
    `level_costs` of the full step, `best` at any cost. Without labels, levels are calibrated for
    agreement with the full step or, if given, with `original`: `fast` and `balanced` reach
    `AGREEMENT` at the lowest cost, `best` has the highest agreement.

    Args:
        config: the network's. Without labels and original, its fusion weights of the last step
            define the full answers.
        runs: the network's outputs for N held-out texts at every step.
        labels: [N], or [N, C] when multi-label; None: calibrate for agreement.
        level_costs: maximum mean costs of `fast` and `balanced`.
        costs: measured seconds, used in the search instead of multiply-adds.
        original: logits [N, C] of the classifier that the network was made from; calibrate for
            agreement with it. Labels are then only used to report accuracy.
    """
    return _Calibration(config, runs, labels, costs, original).find(level_costs)


@dataclass(frozen=True)
class _Side:
    """A subset of the texts with their answers under one fit of the fusion.

    `right` [S+1, N] is by the policy's measure; `agrees` [S+1, N] with the full network or the
    original.
    """

    rows: np.ndarray
    table: Table
    steps: Steps
    right: np.ndarray
    agrees: np.ndarray


class _Calibration:
    """The folds of one calibration.

    In the search for accuracy, the value of an answer is its probability according to the full
    step, that is its expected correctness. Labels of a few thousand texts are so noisy that the
    search would pick the luckiest of many chains; they only calibrate the probabilities and measure
    the levels. In the search for agreement, the value is the agreement, which has no such noise.
    """

    def __init__(
        self,
        config: Architecture,
        runs: Runs,
        labels: Tensor | None,
        costs: CostTable | None,
        original: Tensor | None,
    ) -> None:
        self.config, self.runs, self.labels, self.costs = config, runs, labels, costs
        self.original = original
        for_agreement = labels is None or original is not None
        self.measure: Measure = "agreement" if for_agreement else "accuracy"
        self.count = len(runs.s)

    def find(self, level_costs: Sequence[float]) -> Found:
        """Return the calibrated policy; see `calibrate`."""
        fast, balanced = level_costs
        if self.measure == "agreement":
            named: dict[str, Goal] = {k: Goal(value=share) for k, share in AGREEMENT.items()}
            searched = [Goal(value=share) for share in SEARCHED_AGREEMENT]
        else:
            named = {"fast": Goal(cost=fast), "balanced": Goal(cost=balanced)}
            costs = (fast / 2, fast, math.sqrt(fast * balanced), balanced)
            searched = [Goal(cost=cost) for cost in costs]
        fusion = self._fuse(np.arange(self.count))
        folds = np.random.default_rng(0).permutation(self.count) % min(FOLDS, self.count)
        options = chains(self.config)
        self.all_texts = self._side(np.arange(self.count), fusion)
        self.unseen: list[_Side] = []
        choices = [self._choose(self.all_texts, options, [*searched, Goal()])]
        for fold in range(folds.max() + 1):
            seen, unseen = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
            weights = self._fuse(seen, fusion)
            self.unseen.append(self._side(unseen, weights))
            chosen = self._side(seen, weights)
            route = choices[0].route
            own = self._choose(chosen, [route.chain], [*searched, Goal()], [route.exit_margin])
            choices.append(own)
        return Found(
            fusion,
            self.all_texts.table.fixed_steps(self.all_texts.right, self.measure),
            Policy(
                measure=self.measure,
                chain=choices[0].route.chain,
                entry=choices[0].route.entry,
                exit_margin=choices[0].route.exit_margin,
                levels=tuple(self._levels(choices, named)),
            ),
        )

    def _fuse(self, rows: np.ndarray, start: list[StepFusion] | None = None) -> list[StepFusion]:
        kind, has_step_0 = self.config.problem_type, self.config.embedding_exit
        logits = self.runs.logits[:, rows]
        if self.original is not None:
            truth = probabilities(self.original[rows], kind)
            return fit_fusion(logits, truth, kind, has_step_0, start)
        if self.labels is not None:
            return fit_fusion(logits, self.labels[rows], kind, has_step_0, start)
        # The full step's answers are the target, so its weights are not fitted.
        last = (self.config.encoder_weights[-1], self.config.exit_weights[-1])
        truth = probabilities(fuse(logits[-1], logits[0], *last), kind)
        return [*fit_fusion(logits[:-1], truth, kind, has_step_0, start), last]

    def _side(self, rows: np.ndarray, fusion: list[StepFusion]) -> _Side:
        table = Table(self.config, self.runs.subset(rows), fusion)
        agrees = table.agrees(table.logits[-1] if self.original is None else self.original[rows])
        if self.measure == "agreement" or self.labels is None:
            value = right = agrees
        else:
            right, value = table.right(self.labels[rows]), table.probability_right()
        cost = self._costs(table)
        steps = Steps(table.confidence, value.astype(np.float32), cost, table.s)
        return _Side(rows, table, steps, right, agrees)

    def _costs(self, table: Table) -> np.ndarray:
        """Return the costs of steps [S+1, N], as shares of the full step's mean cost."""
        if self.costs is None:
            costs, full = table.macs.copy(), table.dense
            costs[0] += table.decision
        else:
            costs = np.array(
                [
                    TYPICAL_BATCH * step.token * table.lengths + step.constant
                    for step in self.costs.steps
                ]
            )
            costs = costs / TYPICAL_BATCH + np.array([[step.item] for step in self.costs.steps])
            full = costs[-1]
        return np.asarray(costs / full.mean(), dtype=np.float32)

    def _choose(
        self,
        side: _Side,
        options: Sequence[Chain],
        goals: Sequence[Goal],
        margins: Sequence[float] = EXIT_MARGINS,
    ) -> Curve:
        route = search(side.steps, options, goals, margins)
        full = float(side.right[-1].mean())
        # Gains below a tenth of the accuracy's standard error do not justify a higher cost.
        grain = 0.1 * math.sqrt(full * (1 - full) / len(side.rows))
        return Curve.of(route, side.steps, grain)

    def _levels(self, choices: Sequence[Curve], named: dict[str, Goal]) -> list[Level]:
        levels: list[Level] = []
        lowest = np.zeros(len(choices))
        for name in QUALITY_NAMES:
            own = np.maximum(lowest, self._reach(named.get(name, Goal()), choices))
            if (
                own[0] > lowest[0]
            ):  # levels with the same threshold must have the same rule and figures
                lowest = own
            levels.append(self._level(name, choices, lowest))
        taken = {level.threshold for level in levels}
        most = float(choices[0].cost.max())
        for place in range(UNNAMED_LEVELS):
            goal = Goal(cost=most * (place / (UNNAMED_LEVELS - 1)) ** 2)
            own = np.array([choice.threshold(goal) for choice in choices])
            if own[0] not in taken:
                taken.add(float(own[0]))
                levels.append(self._level(None, choices, own))
        return sorted(levels, key=lambda level: level.threshold)

    def _reach(self, goal: Goal, choices: Sequence[Curve]) -> np.ndarray:
        """Return each choice's threshold for a goal, tightened until unseen texts reach it too."""
        wanted = goal
        for _ in range(MAX_TRIES):
            thresholds = np.array([choice.threshold(wanted) for choice in choices])
            value, cost = self._mean_worth(choices, thresholds)
            if goal.value is None and cost > goal.cost:
                wanted = Goal(cost=wanted.cost * TIGHTENING * goal.cost / cost)
            elif goal.value is not None and wanted.value is not None and value < goal.value:
                wanted = Goal(value=wanted.value + (goal.value - value) / TIGHTENING)
            else:
                break
        return thresholds

    def _mean_worth(self, choices: Sequence[Curve], thresholds: np.ndarray) -> tuple[float, float]:
        """Return the mean value of the folds' rules, and the mean cost of the shipped one."""
        value = cost = 0.0
        for side, choice, threshold in zip(self.unseen, choices[1:], thresholds[1:], strict=True):
            value += float(choice.route.value_and_cost(side.steps, threshold)[0].sum()) / self.count
            spent = choices[0].route.value_and_cost(side.steps, thresholds[0])[1]
            cost += float(spent.sum()) / self.count
        return value, cost

    def _level(
        self, name: QualityName | None, choices: Sequence[Curve], thresholds: np.ndarray
    ) -> Level:
        """Return a level with the accuracy of each fold's rule and the cost of the shipped rule."""
        measured, full, agrees, right = (np.zeros(self.count, dtype=bool) for _ in range(4))
        macs, dense, heads = (np.zeros(self.count) for _ in range(3))
        ends, runs = (np.zeros(self.config.num_steps + 1) for _ in range(2))
        for side, choice, threshold in zip(self.unseen, choices[1:], thresholds[1:], strict=True):
            found = side.table.take(choice.route, threshold)
            measured[side.rows] = side.right[found.step, side.table.rows]
            full[side.rows] = side.right[-1]
            agrees[side.rows] = side.agrees[found.step, side.table.rows]
            if self.labels is not None:
                by_labels = side.table.right(self.labels[side.rows])
                right[side.rows] = by_labels[found.step, side.table.rows]
            shipped = side.table.take(choices[0].route, thresholds[0])
            macs[side.rows], dense[side.rows] = shipped.macs, side.table.dense
            heads[side.rows] = shipped.heads
            ends += np.bincount(shipped.step, minlength=len(ends))
            runs += shipped.ran.sum(1)
        accuracy, agreement = float(right.mean()), float(agrees.mean())
        share = float(macs.sum() / dense.sum())
        error = 1.96 * float((macs - share * dense).std() / dense.mean()) / math.sqrt(self.count)
        labelled = self.labels is not None
        return Level(
            name=name,
            threshold=float(thresholds[0]),
            accuracy=accuracy if labelled else None,
            interval=interval(accuracy, self.count) if labelled else None,
            agreement=agreement,
            agreement_interval=interval(agreement, self.count),
            points_lost=100 * (float(full.mean()) - float(measured.mean())),
            macs_share=share,
            macs_interval=(max(share - error, 0.0), share + error),
            mean_heads=float(heads.mean()),
            budgets={int(k): float(ends[k] / self.count) for k in np.flatnonzero(ends)},
            runs={int(k): float(runs[k] / self.count) for k in np.flatnonzero(runs) if k},
        )


def answer_all(
    network: PackedPass, tokens: TokenizedTexts, rule: BudgetRule, batch: int = BATCH
) -> Items:
    """Answer N texts under one rule, with up to `batch` texts at the same step per pass."""

    def batches(places: list[int]) -> Iterator[list[int]]:
        return (places[start : start + batch] for start in range(0, len(places), batch))

    return cascade.answer(network, tokens.columns(range(len(tokens.ids))), rule, batches)


def layerwise_points(
    network: PackedPass, tokens: TokenizedTexts, labels: Tensor
) -> list[OperatingPoint]:
    """Return the quality levels of a network whose layers decide the budgets.

    `fast` and `balanced` use the budgets of the layers' f_o, `best` the full budget.
    """
    config = network.config
    entries = {"fast": (), "balanced": (), "best": (EntryBand(upto=1, step=config.num_steps),)}
    scored: dict[tuple[EntryBand, ...], OperatingPoint] = {}
    for entry in set(entries.values()):
        fixed = config.num_steps if entry else None
        items = answer_all(network, tokens, BudgetRule(num_steps=config.num_steps, fixed=fixed))
        used, counts = np.unique(items.step, return_counts=True)
        answers = torch.from_numpy(items.logits)
        accuracy = 1 - float(wrong(answers, labels, config.problem_type).mean())
        scored[entry] = OperatingPoint(
            entry=entry,
            accuracy=accuracy,
            interval=interval(accuracy, len(items)),
            points_lost=0,
            macs_share=float(items.macs.sum() / items.dense_macs.sum()),
            mean_heads=float(items.total_heads.mean()),
            budgets={int(k): float(n / len(items)) for k, n in zip(used, counts, strict=True)},
        )
    full = scored[entries["best"]].accuracy
    return [
        scored[entry].model_copy(
            update={"name": name, "points_lost": 100 * (full - scored[entry].accuracy)}
        )
        for name, entry in entries.items()
    ]
