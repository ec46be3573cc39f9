"""The frontier report: accuracy against cost of budgets and baselines on test texts.

Every text is run once at every ladder step and once through the dense network; every rule is then
evaluated by look-up in those answers. The chain and the thresholds of the quality levels come from
the checkpoint, which chose them on other texts. Those of the baselines (early exit, confidence
cascade) are chosen on the test texts themselves, so comparisons favour the baselines.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from budgetformer.checkpoint.loading import load_network
from budgetformer.checkpoint.manifest import Manifest
from budgetformer.checkpoint.store import Checkpoint
from budgetformer.cost.macs import encoder_macs, layer_macs
from budgetformer.cost.processor import processor_name
from budgetformer.errors import DataError
from budgetformer.experiments.baselines import Baseline
from budgetformer.experiments.routing import Routing, compare_lengths, compare_routing
from budgetformer.inference.packed import PackedPass
from budgetformer.inference.policy import BudgetRule, EntryBand, Interval, Measure
from budgetformer.model.answers import confidence, probabilities
from budgetformer.model.architecture import MULTI_LABEL
from budgetformer.training.calibration import AnswerTable, answer_all, run_every_step
from budgetformer.training.chains import Route
from budgetformer.training.data import Examples, TokenizedTexts, even_rows
from budgetformer.training.exits import wrong
from budgetformer.wilson import interval

ECE_BINS = 15
THRESHOLDS = tuple(np.linspace(0.3, 0.995, 140).tolist())
EQUAL_COSTS = (0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.5)
"""Shares of the dense network's multiply-adds at which baselines are compared."""
TIMED_BATCHES = {1: 16, 32: 64}
"""Number of timed texts by batch size."""
TIMED_ROUNDS = 3


@dataclass(frozen=True)
class MethodResult:
    """The accuracy and cost of one method (level, fixed step or baseline) on N texts.

    Attributes:
        name: name of the method.
        rows: number of texts.
        accuracy, low, high: accuracy and its 95 % interval.
        macro_f1, ece: see `macro_f1` and `calibration_error`.
        macs_share: multiply-adds as a share of the dense network's.
        mean_heads: mean heads per text, summed over layers and steps.
        budgets: share of the texts that ended at each step.
        milliseconds: milliseconds per text, by batch size.
    """

    name: str
    rows: int
    accuracy: float
    low: float
    high: float
    macro_f1: float
    ece: float
    macs_share: float
    mean_heads: float
    budgets: dict[int, float]
    milliseconds: dict[int, float]


@dataclass(frozen=True)
class StatedLevel:
    """What the calibration states about a level, and the same measured on N other texts.

    Attributes:
        name: name of the level.
        share, interval: stated accuracy or agreement (the report's measure), 95 % interval.
        measured: the same, measured.
        macs_share, macs_interval: stated mean multiply-adds as a share of the dense network's, and
            their 95 % interval.
        measured_macs: the same, measured.
    """

    name: str
    share: float
    interval: Interval
    measured: float
    macs_share: float
    macs_interval: Interval
    measured_macs: float


@dataclass(frozen=True)
class Comparison:
    """A level compared with one baseline at equal mean cost.

    Attributes:
        baseline, level: names of both; the level's name may be empty.
        macs_share: mean cost of both, as a share of the dense network's.
        accuracy, baseline_accuracy: accuracy of the level and of the baseline.
        gain, low, high: accuracy gained, in percentage points, and its paired 95 % interval.
    """

    baseline: str
    level: str
    macs_share: float
    accuracy: float
    baseline_accuracy: float
    gain: float
    low: float
    high: float


@dataclass(frozen=True)
class Difficulty:
    """Mean cost of a level on texts that the dense network classifies wrong, and right.

    Multiply-adds are shares of the dense network's on the same text.
    """

    level: str
    heads_if_wrong: float
    heads_if_right: float
    macs_if_wrong: float
    macs_if_right: float

    @property
    def ratio(self) -> float:
        """Multiply-adds on texts classified wrong, relative to those classified right."""
        return self.macs_if_wrong / self.macs_if_right


@dataclass(frozen=True)
class Curve:
    """Accuracy against the share of dense multiply-adds for one family of rules."""

    name: str
    cost: list[float]
    accuracy: list[float]


@dataclass(frozen=True)
class Report:
    """All figures of one checkpoint on one set of texts.

    Attributes:
        model: `name:version` of the checkpoint.
        rows: number of texts.
        processor, threads, precision: processor, torch threads and precision of the measurement.
        measure: what the levels were calibrated for.
        chain: ladder steps of the levels; empty: the checkpoint has no chain.
        ways: every level, fixed step and baseline.
        stated: what the calibration states about each level.
        routing, lengths: gain from f_o's choice of steps, and from more steps.
        comparisons: levels beside baselines at equal mean cost.
        difficulty: costs of texts that the dense network classifies wrong, and right.
        curves: accuracy against cost of each family of rules.
        heads_by_confidence, heads_by_class: mean heads of each level, by decile of the dense
            network's confidence, and by label.
    """

    model: str
    rows: int
    processor: str
    threads: int
    precision: str
    measure: Measure
    chain: list[int]
    ways: list[MethodResult]
    stated: list[StatedLevel]
    routing: list[Routing]
    lengths: list[Routing]
    comparisons: list[Comparison]
    difficulty: list[Difficulty]
    curves: list[Curve]
    heads_by_confidence: dict[str, list[float]]
    heads_by_class: dict[str, dict[str, float]]


@dataclass(frozen=True)
class _Outcome:
    """The answers of one method to N texts.

    Attributes:
        logits: logits [N, C].
        right: whether each answer is right [N].
        macs, heads: multiply-adds and heads computed [N].
        step: step that answered [N]; None: the method has no steps.
    """

    logits: Tensor
    right: np.ndarray
    macs: np.ndarray
    heads: np.ndarray
    step: np.ndarray | None = None


def report_checkpoint(
    checkpoint: Checkpoint, examples: Examples, baseline: Baseline | None, *, timed: bool = True
) -> Report:
    """Measure a checkpoint on labelled texts that neither training nor calibration saw.

    Args:
        checkpoint: checkpoint with scope "input".
        examples: labelled texts; each is run at every ladder step, which takes many passes.
        baseline: dense baseline of the checkpoint; None: the checkpoint at the full budget.
        timed: whether to measure milliseconds per text on this machine.

    Raises:
        DataError: there are no texts, or the checkpoint has scope "layer".
    """
    if not len(examples):
        raise DataError("a report requires at least one text")
    network = load_network(checkpoint, precision="auto")
    if network.config.budget_scope == "layer":
        raise DataError(
            'a report compares fixed steps, which checkpoints with budget_scope "layer" lack'
        )
    bench = _Bench(network, TokenizedTexts.of(checkpoint, examples), examples, baseline)
    return bench.report(checkpoint, bench.time(checkpoint) if timed else {})


class _Bench:
    """The answers of all steps, baselines and levels to the same texts."""

    def __init__(
        self,
        network: PackedPass,
        tokens: TokenizedTexts,
        examples: Examples,
        baseline: Baseline | None,
    ) -> None:
        self.network, self.tokens, self.examples = network, tokens, examples
        self.config = network.config
        self.labels = torch.from_numpy(examples.labels)
        self.table = AnswerTable(self.config, run_every_step(network, tokens))
        self.right = self.table.right(self.labels)
        self.full = self._step(self.config.num_steps)
        self.baseline = baseline
        self.layers = None if baseline is None else baseline.layer_logits(tokens)
        self.smaller = {} if baseline is None else self._smaller(baseline)
        logits = self.full.logits if self.layers is None else self.layers[-1]
        self.dense = self._outcome(logits, self.table.dense, self.full.heads)

    def report(self, checkpoint: Checkpoint, times: dict[str, dict[int, float]]) -> Report:
        manifest = checkpoint.manifest
        first = 0 if self.config.embedding_exit else 1
        steps = {f"step {i}": self._step(i) for i in range(first, self.config.num_steps + 1)}
        levels = [(rule, self._answers(rule)) for rule in checkpoint.level_rules]
        named = {name: self._answers(checkpoint.rule(name)) for name in manifest.named_levels}
        oracle = self._oracle(first)
        dense = self.smaller | {"dense": self.dense} if self.baseline else {}
        outcomes = {**named, **dense, **steps, "oracle": oracle}
        baselines = {
            "fixed step": self._best(list(steps.values())),
            "confidence cascade": self._best(self._cascades()),
        }
        if self.layers is not None:
            baselines["early exit"] = self._best(list(self._early_exits()))
            if self.config.embedding_exit:
                baselines["step 0, then dense"] = self._best(list(self._step0_then([self.dense])))
        if self.smaller:
            sizes = [*self.smaller.values(), self.dense]
            baselines["smaller dense"] = self._best(sizes)
            if self.config.embedding_exit:
                baselines["step 0, then smaller dense"] = self._best(list(self._step0_then(sizes)))
        curves = [
            Curve(
                "budget per text",
                [self._share(o) for _, o in levels],
                [_mean(o) for _, o in levels],
            )
        ]
        for name, best in baselines.items():
            curves.append(Curve(name, [self._share(o) for o in best], [_mean(o) for o in best]))
        both_kinds = self.dense.right.any() and not self.dense.right.all()
        difficulty = [self._difficulty(name, o) for name, o in named.items()] if both_kinds else []
        return Report(
            model=checkpoint.label,
            rows=len(self.examples),
            processor=processor_name(),
            threads=torch.get_num_threads(),
            precision=self.network.precision,
            measure=manifest.measure,
            chain=list(manifest.policy.chain if manifest.policy else ()),
            routing=compare_routing(self.table, self.labels),
            lengths=compare_lengths(self.table, self.labels),
            ways=[self._result(name, o, times.get(name, {})) for name, o in outcomes.items()],
            stated=list(self._stated(manifest, named)),
            comparisons=list(self._compare(levels, baselines, manifest.measure)),
            difficulty=difficulty,
            curves=curves,
            heads_by_confidence={n: self._by_confidence(o) for n, o in named.items()},
            heads_by_class={n: self._by_class(o) for n, o in named.items()},
        )

    def time(self, checkpoint: Checkpoint) -> dict[str, dict[int, float]]:
        """Return the median milliseconds per text of each level and fixed step, by batch size.

        The dense network is timed as the full step of this checkpoint.
        """
        last = self.config.num_steps
        rules = {name: checkpoint.rule(name) for name in checkpoint.manifest.named_levels}
        for step in range(1, last + 1):
            rules[f"step {step}"] = BudgetRule(num_steps=last, fixed=step)
        times: dict[str, dict[int, float]] = {name: {} for name in rules}
        for batch, count in TIMED_BATCHES.items():
            sample = self.tokens.subset(even_rows(len(self.tokens.ids), count))
            measured: dict[str, list[float]] = {name: [] for name in rules}
            for _ in range(TIMED_ROUNDS):  # interleaved, so that all rules meet the same noise
                for name, rule in rules.items():
                    begin = time.perf_counter()
                    answer_all(self.network, sample, rule, batch)
                    measured[name].append(time.perf_counter() - begin)
            for name, seconds in measured.items():
                times[name][batch] = 1000 * statistics.median(seconds) / len(sample.ids)
        times["dense"] = times[f"step {last}"]
        return times

    def _outcome(self, logits: Tensor, macs: np.ndarray, heads: np.ndarray) -> _Outcome:
        right = 1 - wrong(logits, self.labels, self.config.problem_type).numpy()
        return _Outcome(logits, right.astype(bool), macs, heads)

    def _at(self, step: np.ndarray, macs: np.ndarray, heads: np.ndarray) -> _Outcome:
        logits = self.table.logits[torch.from_numpy(step), torch.arange(len(step))]
        return _Outcome(logits, self.right[step, self.table.rows], macs, heads, step)

    def _answers(self, rule: BudgetRule) -> _Outcome:
        answers = self.table.answer(rule)
        return self._at(answers.step, answers.macs, answers.heads)

    def _step(self, step: int) -> _Outcome:
        return self._answers(BudgetRule(num_steps=self.config.num_steps, fixed=step))

    def _oracle(self, first: int) -> _Outcome:
        """Return the outcome if each text ran its smallest correct step, or else the smallest."""
        right = self.right[first:]
        step = np.where(right.any(0), right.argmax(0), 0) + first
        macs = self.table.macs[step, self.table.rows] + self.table.decision
        return self._at(step, macs, self.table.heads[step].astype(np.float64))

    def _cascades(self) -> list[_Outcome]:
        """Return cascades of a small step and, for uncertain answers, the last step."""
        last = self.config.num_steps
        routes = [Route((low, last), (EntryBand(upto=1, step=low),)) for low in range(1, last)]
        answers = [self.table.answer_on(route, t) for route in routes for t in THRESHOLDS]
        return [self._at(a.step, a.macs, a.heads) for a in answers]

    def _early_exits(self) -> Iterator[_Outcome]:
        """Yield the outcome of exits from the dense network after the first confident layer."""
        assert self.layers is not None
        count = len(self.layers)
        confidences = torch.stack(
            [confidence(x, self.config.problem_type) for x in self.layers]
        ).numpy()
        heads = self.config.num_attention_heads
        of_layer = np.array([layer_macs(self.config, heads, int(n)) for n in self.tokens.lengths])
        of_exit = self.config.hidden_size * self.config.num_classes
        for threshold in THRESHOLDS:
            exits = confidences >= threshold
            exits[-1] = True
            layer = exits.argmax(0)
            logits = self.layers[torch.from_numpy(layer), torch.arange(len(layer))]
            macs = ((layer + 1) * (of_layer + of_exit)).astype(np.float64)
            yield self._outcome(logits, macs, (layer + 1) * (self.table.heads[-1] / count))

    def _smaller(self, baseline: Baseline) -> dict[str, _Outcome]:
        """Return the outcome of each smaller dense network."""
        outcomes = {}
        answers = baseline.smaller_logits(self.tokens)
        for model, logits in zip(baseline.smaller, answers, strict=True):
            config, (plan,) = model.config, model.config.ladder
            macs = [encoder_macs(config, plan, int(n)) for n in self.tokens.lengths]
            heads = np.full(len(macs), sum(plan))
            name = f"dense, {len(plan)} of {self.config.num_hidden_layers} layers, {plan[0]} heads"
            outcomes[name] = self._outcome(logits, np.array(macs, dtype=np.float64), heads)
        return outcomes

    def _step0_then(self, dense: Sequence[_Outcome]) -> Iterator[_Outcome]:
        """Yield cascades of step 0 and, for uncertain answers, a dense network.

        Their logits are not combined, as with two independent models.
        """
        for network in dense:
            for threshold in (0.0, *THRESHOLDS):
                uncertain = self.table.confidence[0] < threshold
                rows = torch.from_numpy(uncertain)[:, None]
                logits = torch.where(rows, network.logits, self.table.logits[0])
                macs, heads = (np.where(uncertain, x, 0) for x in (network.macs, network.heads))
                yield self._outcome(logits, macs, heads)

    def _compare(
        self,
        outcomes: Sequence[tuple[BudgetRule, _Outcome]],
        baselines: dict[str, list[_Outcome]],
        measure: Measure,
    ) -> Iterator[Comparison]:
        levels = [(rule.level, outcome) for rule, outcome in outcomes if rule.level is not None]
        chosen = [
            max(affordable, key=lambda pair: pair[0].reached(measure)[0])
            for cost in EQUAL_COSTS
            if (affordable := [pair for pair in levels if pair[0].macs_share <= cost])
        ]
        unique = list({id(level): (level, outcome) for level, outcome in chosen}.values())
        for level, outcome in unique:
            cost = self._share(outcome)
            for name, best in baselines.items():
                baseline = self._at_cost(best, cost)
                if baseline is None:
                    continue
                gain, low, high = paired_gain(outcome.right, baseline)
                accuracy = float(baseline.mean())
                yield Comparison(
                    name, level.name or "", cost, _mean(outcome), accuracy, gain, low, high
                )

    def _best(self, family: Sequence[_Outcome]) -> list[_Outcome]:
        """Return the outcomes on the upper hull of accuracy over cost, by rising cost."""
        return [family[i] for i in _hull([(self._share(o), _mean(o)) for o in family])]

    def _at_cost(self, best: Sequence[_Outcome], cost: float) -> np.ndarray | None:
        """Return the expected correctness [N] of a hull's best mixture at exactly this mean cost.

        A mixture assigns texts at random to two neighbouring outcomes; None: all cost more.
        """
        costs = [self._share(outcome) for outcome in best]
        above = int(np.searchsorted(costs, cost, side="right"))
        if above == 0:
            return None
        low = best[above - 1].right.astype(float)
        if above == len(best):
            return low
        weight = (cost - costs[above - 1]) / (costs[above] - costs[above - 1])
        return (1 - weight) * low + weight * best[above].right

    def _share(self, outcome: _Outcome) -> float:
        return float(outcome.macs.sum() / self.table.dense.sum())

    def _result(self, name: str, outcome: _Outcome, milliseconds: dict[int, float]) -> MethodResult:
        low, high = interval(_mean(outcome), len(outcome.right))
        return MethodResult(
            name=name,
            rows=len(outcome.right),
            accuracy=_mean(outcome),
            low=low,
            high=high,
            macro_f1=macro_f1(outcome.logits, self.labels, self.config.problem_type),
            ece=calibration_error(outcome.logits, outcome.right, self.config.problem_type),
            macs_share=self._share(outcome),
            mean_heads=float(outcome.heads.mean()),
            budgets=_shares(outcome.step),
            milliseconds=milliseconds,
        )

    def _stated(self, manifest: Manifest, named: Mapping[str, _Outcome]) -> Iterator[StatedLevel]:
        """Compare the levels that state intervals, which those of older checkpoints lack."""
        measure = manifest.measure
        right = self.right if measure == "accuracy" else self.table.agrees(self.full.logits)
        for name, level in manifest.named_levels.items():
            share, interval = level.reached(measure)
            if level.macs_interval is not None:
                measured = float(right[named[name].step, self.table.rows].mean())
                macs = self._share(named[name])
                yield StatedLevel(
                    name, share, interval, measured, level.macs_share, level.macs_interval, macs
                )

    def _difficulty(self, name: str, outcome: _Outcome) -> Difficulty:
        right = self.dense.right
        share = outcome.macs / self.table.dense
        return Difficulty(
            name,
            float(outcome.heads[~right].mean()),
            float(outcome.heads[right].mean()),
            float(share[~right].mean()),
            float(share[right].mean()),
        )

    def _by_confidence(self, outcome: _Outcome) -> list[float]:
        """Return the mean heads per tenth of the texts, by rising confidence if dense."""
        parts = min(10, len(self.examples))
        order = confidence(self.dense.logits, self.config.problem_type).argsort().numpy()
        return [float(outcome.heads[part].mean()) for part in np.array_split(order, parts)]

    def _by_class(self, outcome: _Outcome) -> dict[str, float]:
        labels = self.examples.labels
        heads = {}
        for number, name in enumerate(self.examples.names):
            rows = labels[:, number] == 1 if labels.ndim == 2 else labels == number
            if rows.any():
                heads[name] = float(outcome.heads[rows].mean())
        return heads


def macro_f1(logits: Tensor, labels: Tensor, problem_type: str | None) -> float:
    """Return the mean F1 score of the classes that occur in labels or answers."""
    if problem_type == MULTI_LABEL:
        predicted, true = logits > 0, labels > 0
    else:
        classes = logits.shape[-1]
        predicted = torch.nn.functional.one_hot(logits.argmax(-1), classes) > 0
        true = torch.nn.functional.one_hot(labels, classes) > 0
    correct = (predicted & true).sum(0).double()
    total = predicted.sum(0).double() + true.sum(0).double()
    occurs = total > 0
    return float((2 * correct[occurs] / total[occurs]).mean())


def calibration_error(logits: Tensor, right: np.ndarray, problem_type: str | None) -> float:
    """Return the expected calibration error: |confidence - accuracy| over 15 equal bins."""
    p = probabilities(logits, problem_type)
    confidences = (
        torch.maximum(p, 1 - p).prod(-1) if problem_type == MULTI_LABEL else p.amax(-1)
    ).numpy()
    bins = np.minimum((confidences * ECE_BINS).astype(int), ECE_BINS - 1)
    gaps = [
        abs(confidences[rows].mean() - right[rows].mean()) * rows.sum()
        for b in range(ECE_BINS)
        if (rows := bins == b).any()
    ]
    return float(sum(gaps) / len(confidences))


def _shares(step: np.ndarray | None) -> dict[int, float]:
    if step is None:
        return {}
    used, counts = np.unique(step, return_counts=True)
    return {int(k): float(n / len(step)) for k, n in zip(used, counts, strict=True)}


def _mean(outcome: _Outcome) -> float:
    return float(outcome.right.mean())


def _hull(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the points (cost, accuracy) on the rising upper hull, by cost."""
    hull: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if hull and points[i][1] <= points[hull[-1]][1]:
            continue
        while len(hull) > 1 and _slope(points, hull[-2], i) >= _slope(points, hull[-2], hull[-1]):
            hull.pop()
        hull.append(i)
    return hull


def _slope(points: Sequence[tuple[float, float]], a: int, b: int) -> float:
    run = points[b][0] - points[a][0]
    return (points[b][1] - points[a][1]) / run if run else float("inf")


def paired_gain(right: np.ndarray, baseline: np.ndarray) -> tuple[float, float, float]:
    """Return the accuracy gained over a baseline and its paired 95 % interval (lower, upper end).

    All are in percentage points.

    Args:
        right: whether each answer is right, or its expected correctness [N].
        baseline: the same for the baseline's answers to the same texts [N].
    """
    difference = right.astype(float) - baseline.astype(float)
    half = 1.96 * float(difference.std()) / float(np.sqrt(len(difference)))
    gain = float(difference.mean())
    return 100 * gain, 100 * (gain - half), 100 * (gain + half)
