"""Time several contenders in turns, so that other load on the machine affects all equally."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch

from budgetformer.checkpoint.store import Checkpoint, load_encoder
from budgetformer.inference.backends.linear import int8_linear
from budgetformer.inference.ranges import StateRange

TokenIds = list[int]
LENGTHS = (12, 80)
"""Minimum and maximum tokens of random texts."""

MIN_ROUNDS = 10
"""Number of times that a product and a copy are timed; the fastest counts."""
INT8_RANGE = StateRange(low=-4, high=4)
"""State range of the random numbers in int8 products."""


@dataclass(frozen=True)
class Contender:
    """An implementation that classifies a batch.

    Attributes:
        name: name in tables.
        run: classifies items, given their token ids, and returns when they are done.
        limit: returns the minimum seconds that the hardware needs for the items, if known.
    """

    name: str
    run: Callable[[Sequence[TokenIds]], object]
    limit: Callable[[Sequence[TokenIds]], float] | None = None


@dataclass(frozen=True)
class Timing:
    """The times of one contender at one batch size.

    Attributes:
        name: name of the contender.
        batch: number of items per batch.
        rounds: seconds per batch, one per round.
        limit: mean of the minimum seconds that the hardware needs per batch, if known.
    """

    name: str
    batch: int
    rounds: tuple[float, ...]
    limit: float | None

    @cached_property
    def quartiles(self) -> tuple[float, float, float]:
        """Lower quartile, median and upper quartile of the rounds."""
        low, median, high = statistics.quantiles(self.rounds, n=4)
        return low, median, high

    @property
    def mean(self) -> float:
        """Mean seconds per batch, over rounds of different texts."""
        return statistics.fmean(self.rounds)


def time_in_turns(
    contenders: Sequence[Contender], batches: Sequence[Sequence[TokenIds]]
) -> list[Timing]:
    """Time every contender on at least two batches, in turns, after a warm-up on the first.

    Each batch is one round. Batches should have different texts, because texts differ in cost.
    """
    seconds: list[list[float]] = [[] for _ in contenders]
    for turn, items in enumerate([batches[0], *batches]):
        for contender, rounds in zip(contenders, seconds, strict=True):
            started = time.perf_counter()
            contender.run(items)
            if turn:
                rounds.append(time.perf_counter() - started)
    return [
        Timing(
            c.name,
            len(batches[0]),
            tuple(rounds),
            statistics.fmean(map(c.limit, batches)) if c.limit else None,
        )
        for c, rounds in zip(contenders, seconds, strict=True)
    ]


def token_ids(checkpoint: Checkpoint, texts: Sequence[str] | None, count: int) -> list[TokenIds]:
    """Return the tokens of real texts or, if `texts` is None, `count` items of random tokens."""
    if texts is not None:
        return [tokens.ids for tokens in load_encoder(checkpoint).encode(texts)]
    longest = min(LENGTHS[1], checkpoint.manifest.max_tokens)
    vocabulary = checkpoint.architecture.vocab_size
    return random_texts(count, min(LENGTHS[0], longest), longest, vocabulary)


def random_texts(count: int, shortest: int, longest: int, vocabulary: int) -> list[TokenIds]:
    """Return items of random tokens with lengths between two bounds; every call the same ones."""
    draw = random.Random(0)
    return [
        [draw.randrange(1, vocabulary) for _ in range(draw.randint(shortest, longest))]
        for _ in range(count)
    ]


@dataclass(frozen=True)
class Machine:
    """The measured peak rates of this processor.

    Attributes:
        macs: multiply-adds per second, by precision.
        bandwidth: bytes per second of a copy.
    """

    macs: dict[str, float]
    bandwidth: float

    @classmethod
    def measure(cls, precisions: Sequence[str]) -> Machine:
        """Time one large matrix product in each precision, and one large copy."""
        rows, inner, columns = 2048, 1024, 1024
        macs = {}
        for precision in precisions:
            a, b = torch.randn(rows, inner), torch.randn(inner, columns)
            if precision == "int8":
                product = partial(int8_linear(b.t(), None, INT8_RANGE), a)
            else:
                dtype: torch.dtype = getattr(torch, precision)
                product = partial(torch.mm, a.to(dtype), b.to(dtype))
            macs[precision] = rows * inner * columns / _min_seconds(product)
        source = torch.empty(64 * 2**20, dtype=torch.uint8)
        target = torch.empty_like(source)
        return cls(macs, source.numel() / _min_seconds(lambda: target.copy_(source)))

    def limit(self, precision: str, macs: float, nbytes: float) -> float:
        """Return the minimum seconds for `macs` multiply-adds and reading `nbytes` bytes."""
        return max(macs / self.macs[precision], nbytes / self.bandwidth)


def _min_seconds(run: Callable[[], object]) -> float:
    seconds = []
    for _ in range(MIN_ROUNDS):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
