"""An item on its way through the steps of its rule: decision, passes, answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from budgetformer.cost.macs import decision_macs, dense_macs, encoder_macs, scorer_macs
from budgetformer.inference.packed import PackedPass, PackedTokens, PassResult
from budgetformer.inference.policy import BudgetRule
from budgetformer.model import tfidf
from budgetformer.model.answers import confidence
from budgetformer.tokenization import Tokens

LAYERWISE = -1
"""The step of an item whose layers decide for themselves (scope "layer"), until it has run."""


@dataclass(eq=False)
class Work:
    """One item: its tokens, the rule for its budget, and what has been decided and computed so far.

    Attributes:
        ids, segments: token and segment ids.
        rule: how its budget is decided.
        step: ladder step to run next; once `logits` is set, the step that answered.
        predicted: step at which f_o expects the answer, decided on arrival; 0 if step 0 answers;
            LAYERWISE where layers decide for themselves.
        steps: all that have been run, in order, step 0 included where it was asked.
        s: f_o's verdict, None before arrival and with layer-wise budgets.
        exit_logits: step 0's logits [C], if the network has a step 0.
        ranking: g_d's order of heads [L, H], if heads are picked per input.
        heads: heads computed so far in each layer, summed over the passes.
        chosen: head indices of the last pass, by layer.
        macs, dense_macs: multiply-adds spent so far, and what the dense network would spend.
        logits: the answer [C], once there is one.
        whole, whole_segments: token and segment ids as step 0 reads them; None: `ids` and
            `segments`.
    """

    ids: Sequence[int]
    segments: Sequence[int] | None
    rule: BudgetRule
    step: int = LAYERWISE
    predicted: int = LAYERWISE
    steps: list[int] = field(default_factory=list)
    s: float | None = None
    exit_logits: Tensor | None = None
    ranking: Tensor | None = None
    heads: list[int] = field(default_factory=list)
    chosen: list[tuple[int, ...]] = field(default_factory=list)
    macs: int = 0
    dense_macs: int = 0
    logits: Tensor | None = None
    whole: Sequence[int] | None = None
    whole_segments: Sequence[int] | None = None

    @classmethod
    def of(cls, tokens: Tokens, rule: BudgetRule) -> Work:
        """Return the work that a tokenized text or pair asks for."""
        return cls(
            tokens.ids,
            tokens.type_ids,
            rule,
            whole=tokens.whole,
            whole_segments=tokens.whole_type_ids,
        )

    @property
    def done(self) -> bool:
        """Whether the answer is there."""
        return self.logits is not None

    @property
    def exit_tokens(self) -> int:
        """Tokens that step 0 reads."""
        return len(self.ids if self.whole is None else self.whole)


def pack(items: Sequence[Work]) -> PackedTokens:
    """Pack the tokens of some items, as the encoder reads them."""
    return _pack([(item.ids, item.segments) for item in items])


def pack_whole(items: Sequence[Work]) -> PackedTokens | None:
    """Pack the tokens of some items, as step 0 reads them; None: it reads what the encoder does."""
    if all(item.whole is None for item in items):
        return None
    return _pack(
        [
            (item.ids, item.segments) if item.whole is None else (item.whole, item.whole_segments)
            for item in items
        ]
    )


def _pack(texts: Sequence[tuple[Sequence[int], Sequence[int] | None]]) -> PackedTokens:
    ids, segments = [own for own, _ in texts], None
    if any(own for _, own in texts):
        segments = [kinds or [0] * len(own) for own, kinds in texts]
    return PackedTokens.pack(ids, segments)


def arrive(network: PackedPass, items: Sequence[Work]) -> None:
    """Let f_o decide the first step of each item.

    An item whose step is 0 has its answer afterwards.
    """
    sizes, problem_type = network.sizes, network.config.problem_type
    arrival = network.arrive(pack(items), pack_whole(items))
    exits = None if arrival.exit_logits is None else arrival.exit_logits.cpu()
    budget = None if arrival.budget is None else arrival.budget.tolist()
    # NumPy, as in `Decider`: rounding must not lead to another decision.
    exit_confidence = (
        None if exits is None else tfidf.confidence(exits.numpy(), problem_type).tolist()
    )
    for place, item in enumerate(items):
        item.heads = [0] * sizes.layers
        item.chosen = [()] * sizes.layers
        item.steps = []
        item.macs = 0 if sizes.layerwise else decision_macs(sizes, len(item.ids))
        item.dense_macs = dense_macs(sizes, len(item.ids))
        item.exit_logits = None if exits is None else exits[place]
        item.ranking = None if arrival.ranking is None else arrival.ranking[place]
        if budget is None:
            constant = item.rule.constant
            item.step = item.predicted = LAYERWISE if constant is None else constant
            continue
        item.s = budget[place]
        item.step = item.rule.first_step(item.s)
        if item.step == 0 and exit_confidence is not None:
            item.steps = [0]
            item.step = item.rule.next_step(0, exit_confidence[place], item.s) or 0
        if item.step == 0:
            item.logits = item.exit_logits
        item.predicted = item.step


def begin(network: PackedPass, item: Work, step: int, s: float, exit_logits: Tensor | None) -> None:
    """Start an item at a step that the caller has decided with a `Decider`.

    The caller counts the multiply-adds of the decision.

    Args:
        network: what will run the item.
        item: nothing has been decided or computed of it yet.
        step: ladder step, 1 or more.
        s: f_o's verdict.
        exit_logits: step 0's logits [C]; None: the network has no step 0.
    """
    sizes = network.sizes
    item.step = item.predicted = step
    item.s, item.exit_logits = s, exit_logits
    item.heads, item.chosen = [0] * sizes.layers, [()] * sizes.layers
    item.dense_macs = dense_macs(sizes, len(item.ids))


def compute(network: PackedPass, items: Sequence[Work], steps: Sequence[int] | None) -> PassResult:
    """Run arrived items at the given ladder steps, or (None) as their layers decide."""
    exits = [item.exit_logits for item in items if item.exit_logits is not None]
    last = network.config.num_steps
    _rank(network, items)
    ranking = [item.ranking for item in items if item.ranking is not None]
    return network.run(
        pack(items),
        steps,
        torch.stack(exits) if exits else None,
        torch.stack(ranking) if ranking else None,
        [item.rule.ceiling or last for item in items] if steps is None else None,
    )


def _rank(network: PackedPass, items: Sequence[Work]) -> None:
    """Let g_d rank the heads of the items that have no ranking yet."""
    if not network.sizes.picks_heads or network.sizes.layerwise:
        return
    unranked = [item for item in items if item.ranking is None]
    if unranked:
        for item, ranking in zip(unranked, network.rank(pack(unranked)), strict=True):
            item.ranking = ranking


def run(network: PackedPass, items: Sequence[Work]) -> None:
    """Run each item at its step.

    Those that are not confident enough get their next step, the others an answer.
    """
    sizes = network.sizes
    steps = None if items[0].step == LAYERWISE else [item.step for item in items]
    result = compute(network, items, steps)
    logits = result.logits.cpu()
    sure = confidence(logits, network.config.problem_type).tolist()
    for place, item in enumerate(items):
        item.chosen = result.heads[place]
        counts = [len(head_set) for head_set in item.chosen]
        item.heads = [a + b for a, b in zip(item.heads, counts, strict=True)]
        item.macs += encoder_macs(sizes, counts, len(item.ids))
        if sizes.layerwise:
            item.macs += decision_macs(sizes) if steps is None else scorer_macs(sizes)
            if item.step == LAYERWISE:
                item.step = network.config.covering_step(counts)
        item.steps.append(item.step)
        following = None
        if item.s is not None:
            following = item.rule.next_step(item.step, sure[place], item.s)
        if following is None:
            item.logits = logits[place]
        else:
            item.step = following


def answer(
    network: PackedPass,
    items: Sequence[Work],
    batches: Callable[[Sequence[Work]], Iterable[Sequence[Work]]],
) -> None:
    """Take items all the way to their answers; those of one step run together.

    Args:
        network: what computes them.
        items: new ones.
        batches: how to cut items that run together into batches.
    """
    for batch in batches(items):
        arrive(network, batch)
    while waiting := [item for item in items if not item.done]:
        for step in sorted({item.step for item in waiting}):
            for batch in batches([item for item in waiting if item.step == step]):
                run(network, batch)
