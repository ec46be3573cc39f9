"""Items of one request that several pools of engines compute."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from service.ipc.answers import Answers
from service.ipc.engine_client import Submission

PoolCall = Callable[[int, Submission], Coroutine[Any, Any, Answers]]
"""Have the pool with this index answer a submission."""


async def through_pools(
    call: PoolCall, computes: Sequence[Callable[[int], bool]], submission: Submission
) -> Answers:
    """Answer a submission: each item in the first pool that computes its step.

    Items whose budgets are decided go straight to the pool of their step. The others begin in the
    first pool, which decides. An item that needs a higher step than its pool computes continues in
    a later pool.

    Args:
        call: see `PoolCall`.
        computes: for each pool, whether it computes a ladder step; the last one computes all.
        submission: texts to classify.

    Raises:
        BaseException: the error of `call`; the calls to other pools are cancelled.
    """

    def pool_of(step: int) -> int:
        return next(index for index, able in enumerate(computes) if able(step))

    if submission.decided is None:
        answers = await call(pool_of(submission.heads or 0), submission)
    else:
        answers = await _call_pools(
            call, list(map(pool_of, submission.decided.steps.tolist())), submission
        )
    while len(unfinished := np.flatnonzero(answers.next_step)):
        places, steps = unfinished.tolist(), answers.next_step[unfinished]
        # The level that the first engine chose stays: the rule decides what comes next.
        rest = replace(submission.part(places), quality=answers.quality)
        if rest.decided is None:
            rest = replace(rest, steps=steps)
        else:
            rest = replace(rest, decided=replace(rest.decided, steps=steps))
        # One call to one pool: few items are left after their first pool.
        later = await call(pool_of(int(steps.max())), rest)
        answers = answers.with_later(places, later)
    return answers


async def _call_pools(call: PoolCall, pools: Sequence[int], submission: Submission) -> Answers:
    """Call several pools with their texts at the same time, and merge their answers.

    Args:
        call: see `PoolCall`.
        pools: index of the pool of each text.
        submission: texts to classify.
    """
    places = defaultdict[int, list[int]](list)
    for place, pool in enumerate(pools):
        places[pool].append(place)
    if len(places) == 1:
        return await call(pools[0], submission)
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(call(pool, submission.part(own))) for pool, own in places.items()
            ]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    parts = [task.result() for task in tasks]
    answers = Answers.none(parts[0], len(pools))
    for own, part in zip(places.values(), parts, strict=True):
        answers = answers.with_later(own, part)
    slowest = max(parts, key=lambda part: part.queue_seconds + part.compute_seconds)
    return replace(
        answers,
        budget_seconds=slowest.budget_seconds,
        queue_seconds=slowest.queue_seconds,
        compute_seconds=slowest.compute_seconds,
    )
