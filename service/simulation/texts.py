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
"""Number of texts in a pass of `measure_texts`."""
MIN_SHARE = 1e-9
"""Smaller shares of the texts are rounding errors."""


@dataclass(frozen=True, eq=False)
class Text:
    """A text.

    Attributes:
        tokens: number of tokens that the encoder reads.
        steps: steps that the text runs at each quality level.
        step_0_tokens: number of tokens that the frontend tokenizes and step 0 reads.
    """

    tokens: int
    steps: Mapping[QualityName, Steps]
    step_0_tokens: int

    def step_after(self, step: int, level: QualityName) -> int | None:
        """Return the text's next step after `step` at a level; None if `step` is its last."""
        steps = self.steps[level]
        following = steps.index(step) + 1
        return steps[following] if following < len(steps) else None

    @property
    def hard(self) -> bool:
        """Whether the text runs a step of the encoder at the level `balanced`."""
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
        """Share of the drawn texts that are hard, 0..1."""
        return float(np.average([text.hard for text in self.texts], weights=self.weights))

    @property
    def mean_tokens(self) -> float:
        """Mean number of tokens of the drawn texts."""
        return float(np.average([text.tokens for text in self.texts], weights=self.weights))

    def with_hard_share(self, share: float) -> Population:
        """Return the same texts, weighted so that this share of the drawn ones is hard.

        Raises:
            DataError: all texts are hard, or none is.
        """
        hard = np.array([text.hard for text in self.texts])
        if hard.all() or not hard.any():
            raise DataError("all texts are equally hard, so their mix cannot be changed")
        weights = np.where(hard, share / hard.sum(), (1 - share) / (~hard).sum())
        return replace(self, weights=weights)

    def draw(self, count: int, generator: np.random.Generator) -> np.ndarray:
        """Draw indices of `texts`."""
        if self.weights is None:
            return generator.integers(len(self.texts), size=count)
        return generator.choice(len(self.texts), size=count, p=self.weights)


def measure_texts(checkpoint: Checkpoint, texts: Sequence[str | tuple[str, str]]) -> Population:
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
                len(encoding if encoding.full_ids is None else encoding.full_ids),
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


def generate_texts(
    rules: Mapping[QualityName, BudgetRule],
    mean_tokens: float,
    max_tokens: int,
    tail: float | None = None,
    count: int = 4096,
    seed: int = 0,
    max_step_0_tokens: int = 0,
) -> Population:
    """Generate texts whose steps at each level have the shares of calibration.

    Texts have the same order of difficulty at every level. Length and difficulty are independent.

    Args:
        rules: budget rule of each level.
        mean_tokens: mean number of tokens of a text, before it is truncated.
        max_tokens: maximum number of tokens that the encoder reads.
        tail: index of a Pareto tail of the lengths, above 1; the nearer to 1, the heavier the tail.
            None: lengths are log-normal with a standard deviation of 0.5 of the logarithm.
        count: number of texts.
        seed: random seed.
        max_step_0_tokens: maximum number of tokens that step 0 reads, if above `max_tokens`.
    """
    generator = np.random.default_rng(seed)
    if tail is None:
        # The mean of exp(normal(-0.125, 0.5)) is 1, because -0.125 = -0.5**2 / 2.
        lengths = generator.lognormal(-0.125, 0.5, count) * mean_tokens
    else:
        lengths = (1 + generator.pareto(tail, count)) * mean_tokens * (tail - 1) / tail
    longest = max(max_tokens, max_step_0_tokens)
    step_0_tokens = np.clip(np.rint(lengths), 3, longest).astype(int)
    paths = {level: paths_with_shares(rule) for level, rule in rules.items()}
    # Evenly spaced instead of random, so that the shares are exactly those of calibration.
    difficulties = generator.permutation((np.arange(count) + 0.5) / count)
    return Population(
        [
            Text(
                min(tokens, max_tokens),
                {level: _path_at(difficulty, path) for level, path in paths.items()},
                tokens,
            )
            for tokens, difficulty in zip(step_0_tokens.tolist(), difficulties, strict=True)
        ]
    )


def paths_with_shares(rule: BudgetRule) -> list[tuple[float, Steps]]:
    """Return each path through the ladder under a rule, with the share of the texts that take it.

    Paths of easier texts come first. The share of the texts that run a step is the one that the
    scheduler expects. Assumes that whether a text continues after a step does not depend on the
    steps before it.
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


def _path_at(difficulty: float, paths: Sequence[tuple[float, Steps]]) -> Steps:
    """Return the path of a text whose difficulty is a quantile, 0..1."""
    bounds = accumulate(share for share, _ in paths)
    return next(
        (steps for bound, (_, steps) in zip(bounds, paths, strict=True) if difficulty < bound),
        paths[-1][1],
    )
