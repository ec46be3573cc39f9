"""Calibrate a budget policy, and measure its accuracy and cost, on held-out texts.

Every held-out text is run once at every ladder step; any rule can then be evaluated by look-up. The
accuracy of a level is cross-fitted: the texts are split into folds, and for each fold the fusion
weights, f_o's bands and the thresholds come from the other folds. The shipped policy is chosen in
the same way on all texts. The chain, one of a few dozen, is chosen once, on all texts. If a level
misses its agreement on unseen texts, the best chain with each last step is tried too. The cost of
a level depends on no label, and hardly on the texts on which the rule was chosen, so it is measured
with the shipped rule.
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
from budgetformer.training.trainer import rows_by_length
from budgetformer.wilson import interval

FOLDS = 5
BATCH = 32
RANGE_TEXTS = 256
"""Number of texts, evenly chosen, on which state ranges are measured."""
UNNAMED_LEVELS = 17
"""Maximum number of levels without a name, for requests that state an accuracy drop."""
AGREEMENT = {"fast": 0.97, "balanced": 0.99}
"""Minimum agreement with the full network, by level, if levels are calibrated for agreement."""
SEARCHED_AGREEMENT = (0.95, 0.97, 0.99)
"""Agreements at which chains are compared."""
TYPICAL_BATCH = 8
"""Batch size that is assumed when costs are measured seconds."""
TIGHTENING, MAX_TRIES = 0.995, 6
"""Factor by which a goal is tightened if unseen texts miss it, and maximum number of tries."""
SHARES_ABOVE = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
"""Shares of the way to the highest threshold: tried if unseen texts still miss a value."""


@dataclass(frozen=True)
class StepOutputs:
    """The outputs of every step for N texts.

    Attributes:
        logits: logits before fusion [S+1, N, C]: those of step 0 in row 0, then the encoder's at
            each step.
        s: f_o's output [N].
        lengths: tokens of each text [N].
    """

    logits: Tensor
    s: Tensor
    lengths: np.ndarray

    def subset(self, rows: np.ndarray) -> StepOutputs:
        """Return the outputs for the texts in `rows`."""
        return StepOutputs(self.logits[:, rows], self.s[rows], self.lengths[rows])


@torch.inference_mode()
def ranges_of_states(model: SequenceClassifier, tokens: TokenizedTexts) -> tuple[LayerRanges, ...]:
    """Return the state ranges of each layer, measured on a sample of the texts."""
    count = len(tokens.ids)
    sample = np.unique(np.linspace(0, count - 1, min(count, RANGE_TEXTS)).astype(int))
    batches = [sample[start : start + BATCH] for start in range(0, len(sample), BATCH)]
    windows = (tokens.columns(rows).window for rows in batches)
    return measure_ranges(model, map(PackedTokens.of, windows))


@torch.inference_mode()
def run_every_step(network: PackedPass, tokens: TokenizedTexts) -> StepOutputs:
    """Return the outputs of N texts at every step of the ladder (scope "input")."""
    config = network.config
    count = len(tokens.ids)
    logits = torch.zeros(config.num_steps + 1, count, config.num_classes)
    s = torch.zeros(count)
    for rows in rows_by_length(tokens, BATCH, "every step"):
        texts = tokens.columns(rows)
        packed = PackedTokens.of(texts.window)
        decision = network.decide(packed, PackedTokens.of(texts.full_text))
        assert decision.budget is not None
        s[rows] = decision.budget
        if decision.exit_logits is not None:
            logits[0, rows] = decision.exit_logits
        for step in range(1, config.num_steps + 1):
            result = network.run(packed, [step] * len(rows), ranking=decision.ranking, fused=False)
            logits[step, rows] = result.logits
    return StepOutputs(logits, s, tokens.lengths)


@dataclass(frozen=True)
class Answers:
    """The result of a rule for N texts.

    Attributes:
        step: step that answered [N].
        macs, heads: multiply-adds and heads computed, over all steps that ran [N].
        ran: whether each step ran [S+1, N].
    """

    step: np.ndarray
    macs: np.ndarray
    heads: np.ndarray
    ran: np.ndarray


def answers_of(logits: Tensor, problem_type: str | None) -> Tensor:
    """Return the predicted class ids [N] of logits [N, C]; when multi-label, 0/1 rows [N, C]."""
    return (logits > 0).long() if problem_type == MULTI_LABEL else logits.argmax(-1)


class AnswerTable:
    """The answers of every step to N texts, with confidence and cost, [S+1, N] each.

    Args:
        config: configuration of the network.
        outputs: outputs of the network.
        fusion: fusion weights of each step 1..S; None: those of the configuration.
    """

    def __init__(
        self, config: Architecture, outputs: StepOutputs, fusion: Sequence[StepFusion] | None = None
    ) -> None:
        self.config, self.lengths = config, outputs.lengths
        weights = fusion or list(zip(config.encoder_weights, config.exit_weights, strict=True))
        encoder_weights, exit_weights = torch.tensor(weights).T[..., None, None]
        fused = fuse(outputs.logits[1:], outputs.logits[0], encoder_weights, exit_weights)
        self.logits = torch.cat([outputs.logits[:1], fused])
        self.confidence = confidence(self.logits, config.problem_type).numpy()
        self.s = outputs.s.numpy()
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
        errors = [wrong(step, labels, self.config.problem_type) for step in self.logits]
        return np.asarray(torch.stack(errors) == 0)

    def agrees(self, full: Tensor) -> np.ndarray:
        """Return whether each step's answer equals that of the full logits [N, C]: [S+1, N]."""
        return self.right(answers_of(full, self.config.problem_type))

    def probability_right(self) -> np.ndarray:
        """Return the probability that the full step gives to each step's answer, [S+1, N]."""
        full = probabilities(self.logits[-1], self.config.problem_type)
        if self.config.problem_type == MULTI_LABEL:
            return torch.where(self.logits > 0, full, 1 - full).prod(-1).numpy()
        return full.gather(-1, self.logits.argmax(-1).T).T.numpy()

    def answer(self, rule: BudgetRule, signal: np.ndarray | None = None) -> Answers:
        """Return the result of a rule.

        Args:
            rule: the rule.
            signal: values [N] to which the rule's bands apply; None: f_o's s.
        """
        if rule.fixed is not None:
            route, threshold = Route((), (EntryBand(upto=1, step=rule.fixed),)), 0.0
        else:
            route = Route(rule.chain, rule.entry, rule.exit_margin)
            threshold = 0.0 if rule.level is None else rule.level.threshold
        return self.answer_on(route, threshold, signal)

    def answer_on(
        self, route: Route, threshold: float, signal: np.ndarray | None = None
    ) -> Answers:
        """Return the result of a route at a threshold; see `answer`."""
        s = self.s if signal is None else signal
        walk = route.walk(self.confidence, s, threshold)
        macs = (walk.ran * self.macs).sum(0) + self.decision
        return Answers(walk.ends, macs, self.heads @ walk.ran, walk.ran)

    def fixed_steps(self, right: np.ndarray, measure: Measure) -> list[FixedStep]:
        """Return the accuracy or agreement of each step, and its cost, if all texts run it."""
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
class CalibrationResult:
    """The result of a calibration.

    Attributes:
        fusion: fusion weights of each step 1..S.
        fixed: results of each step if all texts run it, for comparison.
        policy: calibrated policy; None if the layers decide the budgets.
        points: levels if the layers decide the budgets, see `layerwise_points`; otherwise empty.
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

    def manifest_fields(self) -> dict[str, Any]:
        """Return the manifest fields that calibration sets."""
        return {
            "frontier": tuple(self.fixed),
            "policy": self.policy,
            "operating_points": tuple(self.points),
        }


def calibrate(
    config: Architecture,
    outputs: StepOutputs,
    labels: Tensor | None,
    level_costs: Sequence[float],
    costs: CostTable | None = None,
    original: Tensor | None = None,
) -> CalibrationResult:
    """Calibrate the policy of a network.

    With labels, levels maximise accuracy: `fast` and `balanced` at a mean cost of at most
    `level_costs` of the full step, `best` at any cost. Without labels, levels are calibrated for
    agreement with the full step or, if given, with `original`: `fast` and `balanced` reach
    `AGREEMENT` at the lowest cost, `best` has the highest agreement.

    Args:
        config: configuration of the network. Without labels and `original`, its fusion weights of
            the last step define the full answers.
        outputs: outputs of the network for N held-out texts at every step.
        labels: class ids [N], or 0/1 rows [N, C] when multi-label; None: calibrate for agreement.
        level_costs: maximum mean costs of `fast` and `balanced`.
        costs: measured seconds, used in the search instead of multiply-adds; None: multiply-adds.
        original: logits [N, C] of the classifier that the network was made from; calibrate for
            agreement with it. Labels are then only used to report accuracy.
    """
    return _Calibration(config, outputs, labels, costs, original).find(level_costs)


@dataclass(frozen=True)
class _Subset:
    """A subset of the texts, answered with one set of fusion weights.

    Attributes:
        rows: indices of the texts.
        table, steps: answers of every step.
        right: whether each answer is right by the policy's measure [S+1, N].
        agrees: whether each answer equals that of the full network or the original [S+1, N].
    """

    rows: np.ndarray
    table: AnswerTable
    steps: Steps
    right: np.ndarray
    agrees: np.ndarray


class _Calibration:
    """A calibration in progress: its texts, goals and folds.

    In the search for accuracy, the value of an answer is the probability that the full step gives
    to it, which estimates whether it is correct. With the labels of a few thousand texts as values,
    the search would pick a chain that is best by chance; so labels only calibrate the probabilities
    and measure the levels. In the search for agreement, the value is the agreement.
    """

    def __init__(
        self,
        config: Architecture,
        outputs: StepOutputs,
        labels: Tensor | None,
        costs: CostTable | None,
        original: Tensor | None,
    ) -> None:
        self.config, self.outputs, self.labels, self.costs = config, outputs, labels, costs
        self.original = original
        for_agreement = labels is None or original is not None
        self.measure: Measure = "agreement" if for_agreement else "accuracy"
        self.count = len(outputs.s)

    def find(self, level_costs: Sequence[float]) -> CalibrationResult:
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
        self.all_texts = self._subset(np.arange(self.count), fusion)
        folds = np.random.default_rng(0).permutation(self.count) % min(FOLDS, self.count)
        self.seen: list[_Subset] = []
        self.unseen: list[_Subset] = []
        for fold in range(folds.max() + 1):
            seen, unseen = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
            weights = self._fuse(seen, fusion)
            self.seen.append(self._subset(seen, weights))
            self.unseen.append(self._subset(unseen, weights))
        options, goals = chains(self.config), [*searched, Goal()]
        policy = self._policy(options, goals, named)
        if _shortfall(policy, named):
            last_steps = self._steps_reaching(max(goal.value or 0 for goal in named.values()))
            by_last = [[option for option in options if option[-1] == last] for last in last_steps]
            others = [self._policy(ends, goals, named, careful=True) for ends in by_last if ends]
            policy = min(
                [policy, *others], key=lambda one: (_shortfall(one, named), _spent(one, named))
            )
        fixed = self.all_texts.table.fixed_steps(self.all_texts.right, self.measure)
        return CalibrationResult(fusion, fixed, policy)

    def _steps_reaching(self, value: float) -> list[int]:
        """Return the steps that reach a mean value on unseen texts if all texts run them."""
        reached = sum(fold.right.sum(1) for fold in self.unseen) / self.count
        return [int(step) for step in np.flatnonzero(reached >= value)]

    def _policy(
        self,
        options: Sequence[Chain],
        goals: Sequence[Goal],
        named: dict[str, Goal],
        careful: bool = False,
    ) -> Policy:
        """Return the policy with the best of some chains.

        `careful` raises thresholds further if tightened goals do not suffice; see `_thresholds`.
        """
        shipped = self._choose(self.all_texts, options, goals)
        route = shipped.route
        curves = [shipped] + [
            self._choose(subset, [route.chain], goals, [route.exit_margin]) for subset in self.seen
        ]
        return Policy(
            measure=self.measure,
            chain=route.chain,
            entry=route.entry,
            exit_margin=route.exit_margin,
            levels=tuple(self._levels(curves, named, careful)),
        )

    def _fuse(self, rows: np.ndarray, start: list[StepFusion] | None = None) -> list[StepFusion]:
        kind, has_step_0 = self.config.problem_type, self.config.embedding_exit
        logits = self.outputs.logits[:, rows]
        if self.original is not None:
            truth = probabilities(self.original[rows], kind)
            return fit_fusion(logits, truth, kind, has_step_0, start)
        if self.labels is not None:
            return fit_fusion(logits, self.labels[rows], kind, has_step_0, start)
        # The full step's answers are the target, so its weights are not fitted.
        last = (self.config.encoder_weights[-1], self.config.exit_weights[-1])
        truth = probabilities(fuse(logits[-1], logits[0], *last), kind)
        return [*fit_fusion(logits[:-1], truth, kind, has_step_0, start), last]

    def _subset(self, rows: np.ndarray, fusion: list[StepFusion]) -> _Subset:
        table = AnswerTable(self.config, self.outputs.subset(rows), fusion)
        agrees = table.agrees(table.logits[-1] if self.original is None else self.original[rows])
        if self.measure == "agreement" or self.labels is None:
            value = right = agrees
        else:
            right, value = table.right(self.labels[rows]), table.probability_right()
        cost = self._costs(table)
        steps = Steps(table.confidence, value.astype(np.float32), cost, table.s)
        return _Subset(rows, table, steps, right, agrees)

    def _costs(self, table: AnswerTable) -> np.ndarray:
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
        subset: _Subset,
        options: Sequence[Chain],
        goals: Sequence[Goal],
        margins: Sequence[float] = EXIT_MARGINS,
    ) -> Curve:
        route = search(subset.steps, options, goals, margins)
        full = float(subset.right[-1].mean())
        # Gains below a tenth of the accuracy's standard error do not justify a higher cost.
        tolerance = 0.1 * math.sqrt(full * (1 - full) / len(subset.rows))
        return Curve.of(route, subset.steps, tolerance)

    def _levels(
        self, curves: Sequence[Curve], named: dict[str, Goal], careful: bool
    ) -> list[Level]:
        """Return the levels by rising threshold; `curves` are the shipped one, then the folds'."""
        levels: list[Level] = []
        previous = np.zeros(len(curves))
        for name in QUALITY_NAMES:
            thresholds = np.maximum(
                previous, self._thresholds(named.get(name, Goal()), curves, careful)
            )
            # Levels with the same shipped threshold must have the same rule and figures.
            if thresholds[0] > previous[0]:
                previous = thresholds
            levels.append(self._level(name, curves, previous))
        used = {level.threshold for level in levels}
        max_cost = float(curves[0].cost.max())
        for number in range(UNNAMED_LEVELS):
            goal = Goal(cost=max_cost * (number / (UNNAMED_LEVELS - 1)) ** 2)
            thresholds = np.array([curve.threshold(goal) for curve in curves])
            if thresholds[0] not in used:
                used.add(float(thresholds[0]))
                levels.append(self._level(None, curves, thresholds))
        return sorted(levels, key=lambda level: level.threshold)

    def _thresholds(self, goal: Goal, curves: Sequence[Curve], careful: bool) -> np.ndarray:
        """Return each curve's threshold for a goal, tightened until unseen texts reach it too.

        If no tightened goal suffices, `careful` tries higher thresholds (`SHARES_ABOVE`).
        """
        tightened = goal
        for _ in range(MAX_TRIES):
            thresholds = np.array([curve.threshold(tightened) for curve in curves])
            value, cost = self._value_and_cost(curves, thresholds)
            if goal.value is None and cost > goal.cost:
                tightened = Goal(cost=tightened.cost * TIGHTENING * goal.cost / cost)
            elif goal.value is not None and tightened.value is not None and value < goal.value:
                tightened = Goal(value=tightened.value + (goal.value - value) / TIGHTENING)
            else:
                return thresholds
        if careful and goal.value is not None:
            for share in SHARES_ABOVE:
                pairs = zip(curves, thresholds, strict=True)
                higher = np.array([curve.above(threshold, share) for curve, threshold in pairs])
                if self._value_and_cost(curves, higher)[0] >= goal.value:
                    return higher
        return thresholds

    def _value_and_cost(
        self, curves: Sequence[Curve], thresholds: np.ndarray
    ) -> tuple[float, float]:
        """Return the mean value of the folds' rules, and the mean cost of the shipped rule."""
        value = cost = 0.0
        for fold, curve, threshold in zip(self.unseen, curves[1:], thresholds[1:], strict=True):
            value += float(curve.route.value_and_cost(fold.steps, threshold)[0].sum()) / self.count
            spent = curves[0].route.value_and_cost(fold.steps, thresholds[0])[1]
            cost += float(spent.sum()) / self.count
        return value, cost

    def _level(
        self, name: QualityName | None, curves: Sequence[Curve], thresholds: np.ndarray
    ) -> Level:
        """Return a level with the accuracy of each fold's rule and the cost of the shipped rule."""
        measured, full, agrees, right = (np.zeros(self.count, dtype=bool) for _ in range(4))
        macs, dense, heads = (np.zeros(self.count) for _ in range(3))
        ends, runs = (np.zeros(self.config.num_steps + 1) for _ in range(2))
        for fold, curve, threshold in zip(self.unseen, curves[1:], thresholds[1:], strict=True):
            table, rows = fold.table, fold.rows
            step = table.answer_on(curve.route, threshold).step
            measured[rows] = fold.right[step, table.rows]
            full[rows] = fold.right[-1]
            agrees[rows] = fold.agrees[step, table.rows]
            if self.labels is not None:
                right[rows] = table.right(self.labels[rows])[step, table.rows]
            shipped = table.answer_on(curves[0].route, thresholds[0])
            macs[rows], dense[rows] = shipped.macs, table.dense
            heads[rows] = shipped.heads
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


def _shortfall(policy: Policy, named: dict[str, Goal]) -> float:
    """Return the sum of the amounts by which levels miss the minimum values of their goals."""
    return sum(
        max(goal.value - policy.level(name).reached(policy.measure)[0], 0.0)
        for name, goal in named.items()
        if goal.value is not None
    )


def _spent(policy: Policy, named: dict[str, Goal]) -> float:
    """Return the sum of the multiply-adds of levels with goals, as shares of dense."""
    return sum(policy.level(name).macs_share for name in named)


def answer_all(
    network: PackedPass, tokens: TokenizedTexts, rule: BudgetRule, batch: int = BATCH
) -> Items:
    """Answer N texts under one rule, in passes of up to `batch` texts at the same step."""

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
