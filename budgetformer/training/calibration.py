"""Find the rules for budgets that are worth naming, on texts that no weight has seen.

Every held-out text is run once at every ladder step. Any rule can then be priced and scored by
look-up, so thousands are; the best at each cost make the frontier, and three of those get the
quality levels' names.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from budgetformer import cascade
from budgetformer.cascade import Work
from budgetformer.checkpoint import FixedStep
from budgetformer.compact import PackedPass, PackedTokens, measure_ranges
from budgetformer.cost import decision_macs, dense_macs, encoder_macs
from budgetformer.modules import SequenceClassifier, confidence, fuse
from budgetformer.policy import (
    QUALITY_NAMES,
    BudgetRule,
    EntryBand,
    Escalation,
    OperatingPoint,
    QualityName,
)
from budgetformer.ranges import LayerRanges
from budgetformer.training.data import TokenizedTexts
from budgetformer.training.evaluation import interval
from budgetformer.training.exits import wrong
from budgetformer.training.trainer import progress_bar

BEST_SLACK = 0.0005
"""Accuracy that `best` may lose against the most accurate rule, for the sake of cost."""
BATCH = 32
RANGE_TEXTS = 256
"""Texts, evenly chosen, in which states are looked at: most of a range is in all of them."""
MOST_POINTS = 24


@dataclass(frozen=True)
class Runs:
    """What every step says of N texts.

    logits [S+1, N, C], the encoder's at each step before fusion (row 0 is step 0 itself); s [N];
    lengths [N] in tokens.
    """

    logits: Tensor
    s: Tensor
    lengths: np.ndarray


@torch.inference_mode()
def ranges_of_states(model: SequenceClassifier, tokens: TokenizedTexts) -> tuple[LayerRanges, ...]:
    """Measure what int8 products need to know of a network's states, on some of the texts."""
    count = len(tokens.ids)
    chosen = np.unique(np.linspace(0, count - 1, min(count, RANGE_TEXTS)).astype(int))
    ids, types = ([own[row].tolist() for row in chosen] for own in (tokens.ids, tokens.types))
    batches = [slice(start, start + BATCH) for start in range(0, len(chosen), BATCH)]
    return measure_ranges(model, (PackedTokens.pack(ids[rows], types[rows]) for rows in batches))


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
            rule = BudgetRule(num_steps=1)
            items = [_work(tokens, row, rule) for row in rows]
            packed = cascade.pack(items)
            arrival = network.arrive(packed, cascade.pack_whole(items))
            assert arrival.budget is not None
            s[rows] = arrival.budget
            if arrival.exit_logits is not None:
                logits[0, rows] = arrival.exit_logits
            for step in range(1, config.num_steps + 1):
                result = network.run(
                    packed, [step] * len(rows), ranking=arrival.ranking, fused=False
                )
                logits[step, rows] = result.logits
            bar.advance(task, len(rows))
    return Runs(logits, s, tokens.lengths)


def _work(tokens: TokenizedTexts, row: int, rule: BudgetRule) -> Work:
    ids, whole = tokens.ids[row], tokens.whole[row]
    work = Work(ids.tolist(), tokens.types[row].tolist(), rule)
    if len(whole) > len(ids):
        work.whole, work.whole_segments = whole.tolist(), tokens.whole_types[row].tolist()
    return work


@dataclass(frozen=True)
class Answers:
    """What a rule gives each of N texts, [N] each.

    The ladder step that answers, whether it is right, multiply-adds and heads spent on the way.
    """

    step: np.ndarray
    right: np.ndarray
    macs: np.ndarray
    heads: np.ndarray


class Calibration:
    """Score rules on the runs of N held-out texts.

    Args:
        network: whose configuration (with the fitted weights of its fusion) prices the steps.
        runs: its answers.
        labels: the right ones, [N] or [N, C].
    """

    def __init__(self, network: PackedPass, runs: Runs, labels: Tensor) -> None:
        config = network.config
        self.config = config
        own, exits = (
            torch.tensor(weights)[:, None, None]
            for weights in (config.encoder_weights, config.exit_weights)
        )
        fused = fuse(runs.logits[1:], runs.logits[0], own, exits)
        self.logits = torch.cat([runs.logits[:1], fused])
        self.right = np.stack(
            [1 - wrong(step, labels, config.problem_type).numpy() for step in self.logits]
        ).astype(bool)
        self.sure = confidence(self.logits, config.problem_type).numpy()
        self.s = runs.s.numpy()
        plans = [[0] * config.num_hidden_layers, *config.ladder]
        self.lengths = runs.lengths
        lengths, inverse = np.unique(runs.lengths, return_inverse=True)
        by_length = np.array(
            [
                [encoder_macs(config, plan, int(n)) if i else 0 for n in lengths]
                for i, plan in enumerate(plans)
            ]
        )
        self.macs = by_length[:, inverse].astype(np.float64)
        self.dense = np.array([dense_macs(config, int(n)) for n in lengths])[inverse].astype(
            np.float64
        )
        self.decision = decision_macs(config)
        self.heads = np.array([sum(plan) for plan in plans])
        self.rows = np.arange(len(self.s))
        self.full_accuracy = float(self.right[-1].mean())

    def fixed_steps(self) -> list[FixedStep]:
        """Score every step when it is given to all texts."""
        first = 0 if self.config.embedding_exit else 1
        return [
            FixedStep(
                step=step,
                accuracy=float(self.right[step].mean()),
                macs_share=float(
                    (self.macs[step].sum() + self.decision * len(self.rows)) / self.dense.sum()
                ),
            )
            for step in range(first, len(self.right))
        ]

    def score(self, entry: Sequence[EntryBand], escalation: Escalation | None) -> OperatingPoint:
        """Score one rule."""
        answers = self.answer(entry, escalation)
        accuracy = float(answers.right.mean())
        used, counts = np.unique(answers.step, return_counts=True)
        return OperatingPoint(
            entry=tuple(entry),
            escalation=escalation,
            accuracy=accuracy,
            points_lost=100 * (self.full_accuracy - accuracy),
            macs_share=float(answers.macs.sum() / self.dense.sum()),
            mean_heads=float(answers.heads.mean()),
            budgets={int(k): float(n / len(self.rows)) for k, n in zip(used, counts, strict=True)},
        )

    def answer(
        self,
        entry: Sequence[EntryBand],
        escalation: Escalation | None,
        signal: np.ndarray | None = None,
    ) -> Answers:
        """Look up what one rule gives each text; its bands are over `signal` [N], or f_o's s."""
        bounds = np.array([band.upto for band in entry])
        steps = np.array([band.step for band in entry])
        step = steps[
            np.searchsorted(bounds, self.s if signal is None else signal).clip(max=len(steps) - 1)
        ]
        macs = self.macs[step, self.rows] + self.decision
        heads = self.heads[step].astype(np.float64)
        if escalation is not None:
            unsure = (self.sure[step, self.rows] < escalation.below) & (step < escalation.step)
            step = np.where(unsure, escalation.step, step)
            macs += np.where(unsure, self.macs[escalation.step], 0)
            heads += np.where(unsure, self.heads[escalation.step], 0)
        return Answers(step, self.right[step, self.rows], macs, heads)

    def frontier(self, level_costs: Sequence[float]) -> list[OperatingPoint]:
        """Return the rules that no other beats at their cost, by rising cost, three of them named.

        `fast` and `balanced` are the most accurate rules whose mean multiply-adds are at most the
        share `level_costs` of the dense network's; `best` is the most accurate of all.
        Accuracy counts to a tenth of a standard error only; below that, the cheaper rule is the
        better one.
        """
        grain = 0.1 * float(np.sqrt(self.full_accuracy * (1 - self.full_accuracy) / len(self.rows)))
        scored = sorted(
            (self.score(*rule) for rule in self.rules(self.s)),
            key=lambda p: (p.macs_share, -p.accuracy),
        )
        kept: list[OperatingPoint] = []
        for point in scored:
            if not kept or point.accuracy > kept[-1].accuracy + grain:
                kept.append(point)
        rows = len(self.rows)
        return [
            point.model_copy(update={"interval": interval(point.accuracy, rows)})
            for point in _thin(_named(kept, level_costs))
        ]

    def rules(self, signal: np.ndarray) -> Iterator[tuple[list[EntryBand], Escalation | None]]:
        """Yield the rules that are tried: bands between quantiles of a signal [N] in 0..1."""
        for entry in self._entries(signal):
            yield entry, None
            top = max(band.step for band in entry)
            for step in self._larger_steps(top):
                for below in (0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95):
                    yield entry, Escalation(below=below, step=step)

    def _entries(self, signal: np.ndarray) -> Iterator[list[EntryBand]]:
        def quantile(share: float) -> float:
            return round(float(np.quantile(signal, min(share, 1.0))), 5)

        last = self.config.num_steps
        first = [0] if self.config.embedding_exit else []
        small = sorted({1, min(2, last), *(max(1, last * i // 12) for i in (3, 4, 6, 8)), last})
        exits = [0.0, *(i / 20 for i in range(2, 19))] if first else [0.0]
        for share in exits:
            below = [EntryBand(upto=quantile(share), step=0)] if share else []
            for low in small:
                yield [*below, EntryBand(upto=1, step=low)]
                for high in (step for step in small if step > low):
                    for split in (0.3, 0.5, 0.7, 0.85):
                        at = quantile(share + split * (1 - share))
                        yield [*below, EntryBand(upto=at, step=low), EntryBand(upto=1, step=high)]
        if first:
            yield [EntryBand(upto=1, step=0)]

    def _larger_steps(self, step: int) -> list[int]:
        last = self.config.num_steps
        return sorted({s for s in (last // 3, last // 2, 2 * last // 3, last) if s > max(step, 0)})


def _named(points: list[OperatingPoint], level_costs: Sequence[float]) -> list[OperatingPoint]:
    """Name three points of a frontier; where it has fewer, one point stands for several levels."""
    most = max(point.accuracy for point in points)
    places: dict[QualityName, int] = {}
    fast, balanced = level_costs
    caps: dict[QualityName, float] = {"best": float("inf"), "balanced": balanced, "fast": fast}
    for name, cost in caps.items():
        affordable = [i for i, p in enumerate(points) if p.macs_share <= cost] or [0]
        good = [i for i in affordable if points[i].accuracy >= most - BEST_SLACK]
        places[name] = good[0] if good else affordable[-1]
    named = [points[i].model_copy(update={"name": name}) for name, i in places.items()]
    unnamed = [p for i, p in enumerate(points) if i not in places.values()]
    return sorted(
        [*named, *unnamed], key=lambda p: (p.macs_share, QUALITY_NAMES.index(p.name or "fast"))
    )


def _thin(points: list[OperatingPoint]) -> list[OperatingPoint]:
    """Keep the named points and an even choice of the others."""
    spare = [p for p in points if p.name is None]
    room = MOST_POINTS - (len(points) - len(spare))
    places = {round(i) for i in np.linspace(0, len(spare) - 1, min(room, len(spare)))}
    unwanted = {id(p) for i, p in enumerate(spare) if i not in places}
    return [p for p in points if id(p) not in unwanted]


def answer_all(
    network: PackedPass, tokens: TokenizedTexts, rule: BudgetRule, batch: int = BATCH
) -> list[Work]:
    """Answer N texts under one rule, `batch` at a time; those of one step run together."""
    items = [_work(tokens, row, rule) for row in range(len(tokens.ids))]

    def batches(some: Sequence[Work]) -> Iterator[Sequence[Work]]:
        return (some[start : start + batch] for start in range(0, len(some), batch))

    cascade.answer(network, items, batches)
    return items


def layerwise_points(
    network: PackedPass, tokens: TokenizedTexts, labels: Tensor
) -> list[OperatingPoint]:
    """Return the quality levels of a network whose layers decide for themselves.

    f_o's own rule is the fast and the balanced level, the full budget the best one.
    """
    config = network.config
    entries = {"fast": (), "balanced": (), "best": (EntryBand(upto=1, step=config.num_steps),)}
    scored: dict[tuple[EntryBand, ...], OperatingPoint] = {}
    for entry in set(entries.values()):
        fixed = config.num_steps if entry else None
        items = answer_all(network, tokens, BudgetRule(num_steps=config.num_steps, fixed=fixed))
        logits = torch.stack([item.logits for item in items if item.logits is not None])
        used, counts = np.unique([item.step for item in items], return_counts=True)
        accuracy = 1 - float(wrong(logits, labels, config.problem_type).mean())
        scored[entry] = OperatingPoint(
            entry=entry,
            accuracy=accuracy,
            interval=interval(accuracy, len(items)),
            points_lost=0,
            macs_share=sum(item.macs for item in items) / sum(item.dense_macs for item in items),
            mean_heads=sum(sum(item.heads) for item in items) / len(items),
            budgets={int(k): float(n / len(items)) for k, n in zip(used, counts, strict=True)},
        )
    full = scored[entries["best"]].accuracy
    return [
        scored[entry].model_copy(
            update={"name": name, "points_lost": 100 * (full - scored[entry].accuracy)}
        )
        for name, entry in entries.items()
    ]
