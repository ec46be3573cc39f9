"""Items of one request that several pools of engines compute."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

import numpy as np

from service.ipc.answers import Answers
from service.ipc.engine_client import Job

Ask = Callable[[int, Job], Awaitable[Answers]]
"""Ask the pool at a place among the pools to do a job."""


async def through_pools(ask: Ask, computes: Sequence[Callable[[int], bool]], job: Job) -> Answers:
    """Have a job done by the first pools that compute the steps of its items.

    Items whose budgets are decided go to the pool of their step, each directly. The others begin in
    the first pool, which decides. Where an item needs a higher step than its pool computes, it goes
    on in a later one.

    Args:
        ask: see `Ask`.
        computes: for each pool, whether it computes a ladder step; the last one computes all.
        job: what is to be done.

    Raises:
        BaseException: what `ask` raises; the other pools are then not waited for.
    """

    def pool_of(step: int) -> int:
        return next(place for place, able in enumerate(computes) if able(step))

    if job.decided is None:
        answers = await ask(pool_of(job.heads or 0), job)
    else:
        answers = await _ask_each(ask, list(map(pool_of, job.decided.steps.tolist())), job)
    while len(unfinished := np.flatnonzero(answers.next_step)):
        places, steps = unfinished.tolist(), answers.next_step[unfinished]
        # The level that the first engine chose stays: the rule decides what comes next.
        rest = replace(job.part(places), quality=answers.quality)
        if rest.decided is None:
            rest = replace(rest, steps=steps)
        else:
            rest = replace(rest, decided=replace(rest.decided, steps=steps))
        # Together, as they have all been tried: there are few of them.
        later = await ask(pool_of(int(steps.max())), rest)
        answers = answers.with_later(places, later)
    return answers


async def _ask_each(ask: Ask, pools: Sequence[int], job: Job) -> Answers:
    """Ask several pools for their texts at the same time, and put their answers together."""
    places = defaultdict[int, list[int]](list)
    for place, pool in enumerate(pools):
        places[pool].append(place)
    if len(places) == 1:
        return await ask(pools[0], job)
    try:
        async with asyncio.TaskGroup() as group:
            asked = [
                group.create_task(_answer(ask, pool, job.part(own))) for pool, own in places.items()
            ]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    parts = [task.result() for task in asked]
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


async def _answer(ask: Ask, pool: int, job: Job) -> Answers:
    return await ask(pool, job)
