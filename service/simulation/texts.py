"""Simulated texts: their tokens, and the ladder steps that they run at each quality level."""

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
"""Ladder steps that a text runs in this order; empty: step 0 answers it."""

BATCH_TEXTS = 32
"""Texts in a pass while they are measured."""
MIN_SHARE = 1e-9
"""Smaller shares of the texts are rounding errors."""


@dataclass(frozen=True, eq=False)
class Text:
    """A text.

    Attributes:
        tokens: number of tokens that the encoder reads.
        steps: its steps at each quality level.
        whole: number of tokens that step 0 reads; None: `tokens`.
    """

    tokens: int
    steps: Mapping[QualityName, Steps]
    whole: int | None = None

    @property
    def exit_tokens(self) -> int:
        """Number of tokens that step 0 reads and the frontend tokenizes."""
        return self.tokens if self.whole is None else self.whole

    def step_after(self, step: int, level: QualityName) -> int | None:
        """Return the step that follows one of its steps at a level; None: it was the last."""
        steps = self.steps[level]
        following = steps.index(step) + 1
        return steps[following] if following < len(steps) else None

    @property
    def hard(self) -> bool:
        """Whether it enters the encoder at the normal level."""
        return bool(self.steps["balanced"])


@dataclass(frozen=True)
class Population:
    """Texts from which requests are drawn.

    Attributes:
        texts: the texts.
        weights: probability of each text; None: all are equally likely.
    """

    texts: Sequence[Text]
    weights: np.ndarray | None = None

    @property
    def hard_share(self) -> float:
        """Share of the drawn texts that enter the encoder at the normal level."""
        return float(np.average([text.hard for text in self.texts], weights=self.weights))

    @property
    def mean_tokens(self) -> float:
        """Mean number of tokens of the drawn texts."""
        return float(np.average([text.tokens for text in self.texts], weights=self.weights))

    def with_hard_share(self, share: float) -> Population:
        """Return the same texts with weights so that this share of them enters the encoder.

        Raises:
            DataError: all texts enter the encoder, or none does.
        """
        hard = np.array([text.hard for text in self.texts])
        if hard.all() or not hard.any():
            raise DataError("all texts are equally hard, so their mix cannot be changed")
        weights = np.where(hard, share / hard.sum(), (1 - share) / (~hard).sum())
        return replace(self, weights=weights)

    def draw(self, count: int, seed: np.random.Generator) -> np.ndarray:
        """Draw indices of `texts`."""
        if self.weights is None:
            return seed.integers(len(self.texts), size=count)
        return seed.choice(len(self.texts), size=count, p=self.weights)


def measured_texts(checkpoint: Checkpoint, texts: Sequence[str | tuple[str, str]]) -> Population:
    """Run texts through the network at every level, and return their tokens and steps.

    Raises:
        DataError: there are no texts.
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
                {level: _steps(rows[index]) for level, rows in ran.items()},
                None if encoding.full_ids is None else len(encoding.full_ids),
            )
            for index, encoding in enumerate(encodings)
        ]
    )


def _batches(indices: list[int]) -> Iterator[list[int]]:
    starts = range(0, len(indices), BATCH_TEXTS)
    return (indices[start : start + BATCH_TEXTS] for start in starts)


def _steps(ran: np.ndarray) -> Steps:
    """Return the steps that ran; `ran` has one entry for each step from 1 on."""
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
    """Generate texts whose steps at each level have the shares of calibration.

    A text that is hard at one level is hard at the others too. Length and difficulty are
    independent.

    Args:
        rules: budget rule of each level.
        mean_tokens: mean tokens of a text, before it is cut to `most_tokens`.
        most_tokens: most tokens that the encoder reads.
        tail: index of a Pareto tail of the lengths, above 1; the nearer to 1, the heavier the tail.
            None: lengths are log-normal with a standard deviation of 0.5 of the logarithm.
        count: number of texts.
        seed: random seed.
        whole_tokens: most tokens that step 0 reads, at least `most_tokens`.
    """
    draw = np.random.default_rng(seed)
    if tail is None:
        lengths = draw.lognormal(-0.125, 0.5, count) * mean_tokens
    else:
        lengths = (1 + draw.pareto(tail, count)) * mean_tokens * (tail - 1) / tail
    wholes = np.clip(np.rint(lengths), 3, max(most_tokens, whole_tokens)).astype(int)
    paths = {level: steps_of(rule) for level, rule in rules.items()}
    # Evenly spaced instead of random, so that the shares are exactly those of calibration.
    difficulties = draw.permutation((np.arange(count) + 0.5) / count)
    return Population(
        [
            Text(min(n, most_tokens), {level: _at(at, path) for level, path in paths.items()}, n)
            for n, at in zip(wholes.tolist(), difficulties, strict=True)
        ]
    )


def steps_of(rule: BudgetRule) -> list[tuple[float, Steps]]:
    """Return the paths of steps under a rule with their shares of the texts, the easiest first.

    The shares of each step are those that the scheduler expects. Whether a text continues after a
    step does not depend on the steps before.
    """
    outlook = Outlook.of(rule)
    ended: list[tuple[float, Steps]] = []
    continuing: defaultdict[int, list[tuple[float, Steps]]] = defaultdict(list)
    entered = 0.0
    for step, share in sorted(outlook.steps.items()):
        entering = max(share - sum(part for part, _ in continuing[step]), 0.0)
        entered += entering
        following, onward = outlook.onward.get(step, (0, 0.0))
        for part, before in [(entering, ()), *continuing[step]]:
            ended.append((part * (1 - onward), (*before, step)))
            continuing[following].append((part * onward, (*before, step)))
    paths = [(1 - entered, ()), *sorted(ended, key=lambda path: (path[1][-1], path[1]))]
    return [(share, steps) for share, steps in paths if share > MIN_SHARE]


def _at(difficulty: float, paths: Sequence[tuple[float, Steps]]) -> Steps:
    """Return the path of a text whose difficulty is a quantile, 0..1."""
    bounds = accumulate(share for share, _ in paths)
    return next(
        (steps for bound, (_, steps) in zip(bounds, paths, strict=True) if difficulty < bound),
        paths[-1][1],
    )
