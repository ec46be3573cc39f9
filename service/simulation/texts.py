"""What texts ask of a device: their tokens, and the ladder steps that they run at each quality."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np

from budgetformer.checkpoint.store import Checkpoint, load_encoder
from budgetformer.errors import DataError
from budgetformer.inference.policy import QUALITY_NAMES, BudgetRule, QualityName
from budgetformer.inference.texts import Texts
from service.scheduling.price import Outlook

Steps = tuple[int, ...]
"""Ladder steps that a text runs one after the other, each once; none: step 0 answers it."""

TOGETHER = 32
"""Texts of a pass while they are measured."""
MIN_SHARE = 1e-9
"""A smaller share of the texts is a rounding error."""


@dataclass(frozen=True, eq=False)
class Text:
    """A text: its tokens, its steps at each quality level, and the tokens that step 0 reads.

    `whole` None: those are the same.
    """

    tokens: int
    steps: Mapping[QualityName, Steps]
    whole: int | None = None

    @property
    def exit_tokens(self) -> int:
        """Tokens that step 0 reads; the frontend makes as many."""
        return self.tokens if self.whole is None else self.whole

    def step_after(self, step: int, level: QualityName) -> int | None:
        """Return the step that follows one of its steps at a level; None: that was the last."""
        steps = self.steps[level]
        following = steps.index(step) + 1
        return steps[following] if following < len(steps) else None

    @property
    def hard(self) -> bool:
        """Whether it enters the encoder at the normal level."""
        return bool(self.steps["balanced"])


@dataclass(frozen=True)
class Population:
    """Texts that requests are made of.

    Attributes:
        texts: from which they are drawn.
        weights: how likely each is drawn, 1 in all; None: all alike.
    """

    texts: Sequence[Text]
    weights: np.ndarray | None = None

    @property
    def hard_share(self) -> float:
        """The share of what is drawn that enters the encoder at the normal level."""
        return float(np.average([text.hard for text in self.texts], weights=self.weights))

    @property
    def mean_tokens(self) -> float:
        """Tokens of what is drawn, on average."""
        return float(np.average([text.tokens for text in self.texts], weights=self.weights))

    def with_hard_share(self, share: float) -> Population:
        """Return the same texts, drawn so that this share of them enters the encoder.

        Raises:
            DataError: there are none of the one kind or the other.
        """
        hard = np.array([text.hard for text in self.texts])
        if hard.all() or not hard.any():
            raise DataError("all texts are equally hard, so their mix cannot be changed")
        weights = np.where(hard, share / hard.sum(), (1 - share) / (~hard).sum())
        return replace(self, weights=weights)

    def draw(self, count: int, seed: np.random.Generator) -> np.ndarray:
        """Draw places in `texts`."""
        if self.weights is None:
            return seed.integers(len(self.texts), size=count)
        return seed.choice(len(self.texts), size=count, p=self.weights)


def measured_texts(checkpoint: Checkpoint, texts: Sequence[str | tuple[str, str]]) -> Population:
    """Run real texts through the network at every level, and keep what each one needed.

    Raises:
        DataError: there is no text.
    """
    from budgetformer.checkpoint.loading import load_network
    from budgetformer.inference import cascade

    if not texts:
        raise DataError("there are no texts to measure")
    network = load_network(checkpoint, "cpu", "float32")
    encodings = load_encoder(checkpoint).encode(texts)
    columns = Texts.of(encodings)
    ran: dict[QualityName, np.ndarray] = {}
    for level in QUALITY_NAMES:
        items = cascade.answer(network, columns, checkpoint.rule(level), _batches)
        ran[level] = items.ran[:, 1:]
    return Population(
        [
            Text(
                len(encoding),
                {level: _passes(own[place]) for level, own in ran.items()},
                None if encoding.full_ids is None else len(encoding.full_ids),
            )
            for place, encoding in enumerate(encodings)
        ]
    )


def _batches(places: list[int]) -> Iterator[list[int]]:
    return (places[start : start + TOGETHER] for start in range(0, len(places), TOGETHER))


def _passes(ran: np.ndarray) -> Steps:
    """Return the steps from 1 on that ran."""
    return tuple((np.flatnonzero(ran) + 1).tolist())


def made_up_texts(
    rules: Mapping[QualityName, BudgetRule],
    mean_tokens: float,
    most_tokens: int,
    tail: float | None = None,
    count: int = 4096,
    seed: int = 0,
    whole_tokens: int = 0,
) -> Population:
    """Make up texts that need, at each level, what calibration saw.

    A text that is hard at one level is hard at the others too; length and difficulty have nothing
    to do with each other.

    Args:
        rules: by level.
        mean_tokens: of a text, before it is cut to `most_tokens`.
        most_tokens: the longest that the encoder reads.
        tail: lengths have a Pareto tail of this index, above 1 and heavier the nearer to it; None:
            they are log-normal with a spread of one half.
        count: texts to draw from.
        seed: of what is made up.
        whole_tokens: the longest that step 0 reads; up to `most_tokens` it reads no more than that.
    """
    draw = np.random.default_rng(seed)
    if tail is None:
        lengths = draw.lognormal(-0.125, 0.5, count) * mean_tokens
    else:
        lengths = (1 + draw.pareto(tail, count)) * mean_tokens * (tail - 1) / tail
    wholes = np.clip(np.rint(lengths), 3, max(most_tokens, whole_tokens)).astype(int)
    ways = {level: steps_of(rule) for level, rule in rules.items()}
    # Evenly spread instead of drawn: the shares are exactly those of calibration.
    difficulties = draw.permutation((np.arange(count) + 0.5) / count)
    return Population(
        [
            Text(min(n, most_tokens), {level: _at(at, way) for level, way in ways.items()}, n)
            for n, at in zip(wholes.tolist(), difficulties, strict=True)
        ]
    )


def steps_of(rule: BudgetRule) -> list[tuple[float, Steps]]:
    """Return how often texts run which steps under a rule, the easiest first.

    The shares of each step are those that the scheduler expects. Who goes on from a step does not
    depend on where it came from.
    """
    outlook = Outlook.of(rule)
    found: list[tuple[float, Steps]] = []
    coming: defaultdict[int, list[tuple[float, Steps]]] = defaultdict(list)
    entered = 0.0
    for step, share in sorted(outlook.steps.items()):
        begin = max(share - sum(some for some, _ in coming[step]), 0.0)
        entered += begin
        following, onward = outlook.onward.get(step, (0, 0.0))
        for some, before in [(begin, ()), *coming[step]]:
            found.append((some * (1 - onward), (*before, step)))
            coming[following].append((some * onward, (*before, step)))
    ways = [(1 - entered, ()), *sorted(found, key=lambda way: (way[1][-1], way[1]))]
    return [(share, steps) for share, steps in ways if share > MIN_SHARE]


def _at(difficulty: float, way: Sequence[tuple[float, Steps]]) -> Steps:
    bounds = accumulate(share for share, _ in way)
    return next(
        (steps for bound, (_, steps) in zip(bounds, way, strict=True) if difficulty < bound),
        way[-1][1],
    )
