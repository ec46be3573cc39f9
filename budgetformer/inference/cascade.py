"""Run texts through the steps of a budget rule: decision, passes, answer.

The state of the texts is kept in columns and updated by array arithmetic after each pass, so that
there is hardly any work per text besides the passes.

Shapes: B texts, C labels, H heads, L layers, S steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import torch
from torch import Tensor

from budgetformer.cost.macs import decision_macs, encoder_macs, scorer_macs
from budgetformer.inference.decider import Decided
from budgetformer.inference.packed import PackedPass, PackedTokens, PassResult
from budgetformer.inference.policy import BudgetRule
from budgetformer.inference.texts import Texts, TokenColumns
from budgetformer.inference.weights import HeadSet
from budgetformer.model import tfidf
from budgetformer.model.answers import confidence
from budgetformer.model.tfidf import Array

LAYERWISE = -1
"""Step of texts whose layers decide the budgets (scope "layer"), until they have run."""

Index = slice | list[int]


class Items:
    """Columns of B texts with the same rule.

    Attributes:
        texts: tokens of the texts.
        rule: rule that decides their budgets.
        step: ladder step to run next, int32 [B]; once done, the step that answered.
        predicted: step at which f_o expects the answer, int32 [B]; 0 if step 0 answers; LAYERWISE
            if the layers decide.
        s: f_o's output, float32 [B].
        exit_logits: step 0's logits, float32 [B, C]; None: there is no step 0, or nothing is
            decided yet.
        ran: which steps ran, bool [B, S + 1]; step 0 if the rule used its answer.
        total_heads: heads computed so far, over all layers and passes, int32 [B].
        macs: multiply-adds computed so far, int64 [B].
        dense_macs: multiply-adds of the dense network, int64 [B].
        logits: latest answer of each text, float32 [B, C].
        done: whether that answer is final, bool [B].
        selected_heads: heads that each text computed in each layer of its last pass, [B][L].
        rankings: heads ordered by g_d [L, H], by text index, if heads are picked per text.
        non_finite: indices of the texts whose answer has a NaN or infinite number.
    """

    def __init__(self, network: PackedPass, texts: Texts, rule: BudgetRule) -> None:
        count, sizes = len(texts), network.sizes
        self.count = count
        self.texts = texts
        self.rule = rule
        self.step = np.full(count, LAYERWISE, np.int32)
        self.predicted = self.step.copy()
        self.s = np.zeros(count, np.float32)
        self.exit_logits: Array | None = None
        self.ran = np.zeros((count, network.num_steps + 1), bool)
        self.total_heads = np.zeros(count, np.int32)
        self.macs = np.zeros(count, np.int64)
        dense = map(network.macs.dense, texts.window.counts)
        self.dense_macs = np.fromiter(dense, np.int64, count)
        self.logits = np.zeros((count, sizes.classes), np.float32)
        self.done = np.zeros(count, bool)
        self.selected_heads: list[Sequence[HeadSet]] = [((),) * sizes.layers] * count
        self.rankings: dict[int, Tensor] = {}
        self.non_finite: set[int] = set()

    def __len__(self) -> int:
        return self.count

    def index(self, places: list[int]) -> Index:
        """Return an array index for rising text indices: a slice if these are all texts."""
        return slice(None) if len(places) == self.count else places

    def note_non_finite(self, places: list[int], logits: Array) -> None:
        """Record which of these texts have answers with NaN or infinite numbers."""
        broken = np.flatnonzero((~np.isfinite(logits)).any(-1))
        self.non_finite.update([places[row] for row in broken.tolist()])

    def steps(self, place: int) -> list[int]:
        """Return the steps that a text ran, in order; step 0 if the rule used its answer."""
        steps: list[int] = np.flatnonzero(self.ran[place]).tolist()
        return steps

    def begin(self, decided: Decided, index: Index = slice(None)) -> None:
        """Set the decision about texts, without its multiply-adds; texts at step 0 are done."""
        self.step[index] = self.predicted[index] = decided.steps
        self.s[index] = decided.s
        self.ran[index, 0] = decided.asked
        if decided.exit_logits is not None:
            if self.exit_logits is None:
                self.exit_logits = np.zeros_like(self.logits)
            self.exit_logits[index] = self.logits[index] = decided.exit_logits
            self.done[index] = decided.steps == 0

    def restart(self, steps: Array, places: list[int]) -> None:
        """Start decided texts at later steps, because another engine ran the earlier ones."""
        self.step[places] = steps
        self.ran[places] = self.done[places] = False


@dataclass(frozen=True)
class Part:
    """The texts of one request in a batch.

    Attributes:
        items: all texts of the request.
        places: indices into `items` of those in the batch, rising.
    """

    items: Items
    places: list[int]


class Batch:
    """Texts of one model that run in the same pass, one part per request.

    The length is the number of texts; a slice is a batch of the texts with these indices.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return sum([len(part.places) for part in self.parts])

    @overload
    def __getitem__(self, which: int) -> Part: ...

    @overload
    def __getitem__(self, which: slice) -> Batch: ...

    def __getitem__(self, which: int | slice) -> Part | Batch:
        if isinstance(which, int):
            return self[which : which + 1].parts[0]
        start, stop, _ = which.indices(len(self))
        parts = []
        for part in self.parts:
            places = part.places[max(start, 0) : max(stop, 0)]
            if places:
                parts.append(Part(part.items, places))
            start, stop = start - len(part.places), stop - len(part.places)
        return Batch(parts)

    @property
    def step(self) -> int:
        """Ladder step that all texts run next."""
        first = self.parts[0]
        return int(first.items.step[first.places[0]])

    def window(self) -> TokenColumns:
        """Return the texts' windows, which the encoder reads."""
        return TokenColumns.join([p.items.texts.window.take(p.places) for p in self.parts])

    def full_text(self) -> TokenColumns | None:
        """Return the full texts, which step 0 reads; None if all fit their windows."""
        if all(part.items.texts.full_text is part.items.texts.window for part in self.parts):
            return None
        return TokenColumns.join([p.items.texts.full_text.take(p.places) for p in self.parts])

    def exit_logits(self) -> Tensor | None:
        """Return step 0's logits [B, C]; None if there is no step 0."""
        columns = [
            part.items.exit_logits[part.items.index(part.places)]
            for part in self.parts
            if part.items.exit_logits is not None
        ]
        return torch.from_numpy(np.concatenate(columns)) if columns else None


def decide(network: PackedPass, batch: Batch) -> None:
    """Decide the first step of each text; texts that step 0 answers are done."""
    sizes = network.sizes
    window, full_text = batch.window(), batch.full_text()
    decision = network.decide(
        PackedTokens.of(window), None if full_text is None else PackedTokens.of(full_text)
    )
    exits = None if decision.exit_logits is None else decision.exit_logits.cpu().numpy()
    s = None if decision.budget is None else decision.budget.cpu().numpy()
    # In NumPy, as in `Decider`, so that rounding cannot change a decision.
    confidences = None if exits is None else tfidf.confidence(exits, network.config.problem_type)
    all_finite = exits is None or bool(np.isfinite(exits).all())
    begin = 0
    for part in batch.parts:
        items, index = part.items, part.items.index(part.places)
        rows = slice(begin, begin := begin + len(part.places))
        logits = None if exits is None else exits[rows]
        if s is None:
            items.begin(_layerwise(items.rule, len(part.places), logits), index)
        else:
            exit_confidences = None if confidences is None else confidences[rows]
            steps, asked = items.rule.first_steps(s[rows], exit_confidences)
            items.begin(Decided(steps, asked, s[rows], logits), index)
        if not sizes.layerwise:
            counts = items.texts.window.counts
            items.macs[index] = [decision_macs(sizes, counts[place]) for place in part.places]
        if logits is not None and not all_finite:
            items.note_non_finite(part.places, logits)
        if decision.ranking is not None:
            items.rankings.update(zip(part.places, decision.ranking[rows], strict=True))


def _layerwise(rule: BudgetRule, count: int, exit_logits: Array | None) -> Decided:
    """Return the decision for texts whose layers decide the budgets."""
    step = LAYERWISE if rule.constant is None else rule.constant
    return Decided(
        np.full(count, step, np.int32),
        np.zeros(count, bool),
        np.zeros(count, np.float32),
        exit_logits,
    )


def compute(network: PackedPass, batch: Batch) -> PassResult:
    """Run decided texts at their step, or with the budgets that their layers decide."""
    count, step = len(batch), batch.step
    tokens = PackedTokens.of(batch.window())
    ranking = ceilings = None
    if network.sizes.picks_heads and not network.sizes.layerwise:
        ranking = _ranking(network, batch)
    if step == LAYERWISE:
        last = network.num_steps
        ceilings = [p.items.rule.ceiling or last for p in batch.parts for _ in p.places]
    steps = None if step == LAYERWISE else [step] * count
    return network.run(tokens, steps, batch.exit_logits(), ranking, ceilings)


def _ranking(network: PackedPass, batch: Batch) -> Tensor:
    """Return the heads ordered by g_d, [B, L, H]; compute and store missing orders."""
    for part in batch.parts:
        rankings = part.items.rankings
        places = [place for place in part.places if place not in rankings]
        if places:
            tokens = PackedTokens.of(part.items.texts.window.take(places))
            rankings.update(zip(places, network.rank(tokens), strict=True))
    return torch.stack([p.items.rankings[place] for p in batch.parts for place in p.places])


def run(network: PackedPass, batch: Batch) -> None:
    """Run texts at their step; then give uncertain texts their next step, and finish the others."""
    step = batch.step
    result = compute(network, batch)
    answers = result.logits.float().cpu()
    # Thresholds are compared in double precision, as in `BudgetRule`.
    confidences = confidence(answers, network.config.problem_type).double().numpy()
    logits = answers.numpy()
    all_finite = bool(np.isfinite(logits).all())
    begin = 0
    for part in batch.parts:
        items, index = part.items, part.items.index(part.places)
        rows = slice(begin, begin := begin + len(part.places))
        selected_heads = result.selected_heads[rows]
        items.logits[index] = logits[rows]
        if not all_finite:
            items.note_non_finite(part.places, logits[rows])
        for place, by_layer in zip(part.places, selected_heads, strict=True):
            items.selected_heads[place] = by_layer
        if network.sizes.layerwise:
            _count_layers(network, part, selected_heads, step)
        else:
            items.total_heads[index] += sum(map(len, selected_heads[0]))
            counts = items.texts.window.counts
            items.macs[index] += [network.macs.step(step, counts[place]) for place in part.places]
        items.ran[part.places, items.step[index]] = True
        following = None if network.sizes.layerwise else items.rule.next_link(step)
        if following is None:
            items.done[index] = True
        else:
            final = confidences[rows] >= items.rule.required_confidence(step)
            items.done[index] = final
            items.step[index] = np.where(final, step, following)


def _count_layers(
    network: PackedPass, part: Part, selected_heads: Sequence[Sequence[HeadSet]], step: int
) -> None:
    """Count heads and multiply-adds of a pass in which each layer chose its heads per text."""
    items, sizes = part.items, network.sizes
    decision = decision_macs(sizes) if step == LAYERWISE else scorer_macs(sizes)
    for place, sets in zip(part.places, selected_heads, strict=True):
        counts = [len(head_set) for head_set in sets]
        tokens = items.texts.window.counts[place]
        items.total_heads[place] += sum(counts)
        items.macs[place] += encoder_macs(sizes, counts, tokens) + decision
        if step == LAYERWISE:
            items.step[place] = network.config.covering_step(counts)


def answer(
    network: PackedPass,
    texts: Texts,
    rule: BudgetRule,
    batches: Callable[[list[int]], Iterable[list[int]]] = lambda places: [places],
) -> Items:
    """Classify texts: decide, then run steps until every answer is final.

    Args:
        network: compact pass of the network.
        texts: tokens of the texts.
        rule: rule that decides the budgets.
        batches: splits the indices of texts at the same step into batches of rising indices.
    """
    items = Items(network, texts, rule)
    for places in batches(list(range(len(items)))):
        decide(network, Batch([Part(items, places)]))
    while len(waiting := np.flatnonzero(~items.done)):
        for step in np.unique(items.step[waiting]).tolist():
            for places in batches(waiting[items.step[waiting] == step].tolist()):
                run(network, Batch([Part(items, places)]))
    return items
