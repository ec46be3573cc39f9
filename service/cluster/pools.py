"""Items of one request that several pools of engines compute."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

import msgspec

from service.ipc.engine_client import Job
from service.ipc.engine_messages import Answer, ItemAnswer

Ask = Callable[[int, Job], Awaitable[Answer]]
"""Ask the pool at a place among the pools to do a job."""


async def through_pools(ask: Ask, computes: Sequence[Callable[[int], bool]], job: Job) -> Answer:
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

    first = pool_of(job.heads or 0)
    decided = job.decisions.steps if job.decisions else None
    pools = [pool_of(step) for step in decided] if decided else [first] * len(job.items)
    answer = await _ask_each(ask, pools, job)
    while unfinished := [i for i, item in enumerate(answer.items) if item.next_step]:
        steps = [answer.items[i].next_step for i in unfinished]
        # The level that the first engine chose stays: the rule decides what comes next.
        rest = replace(job.part(unfinished), quality=answer.quality)
        if rest.decisions is None:
            rest = replace(rest, steps=steps)
        else:
            rest = replace(rest, decisions=msgspec.structs.replace(rest.decisions, steps=steps))
        # Together, as they have all been tried: there are few of them.
        ended = await ask(pool_of(max(steps)), rest)
        answer = joined(answer, unfinished, ended)
    return answer


async def _ask_each(ask: Ask, pools: Sequence[int], job: Job) -> Answer:
    """Ask several pools for their items at the same time, and put their answers together."""
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
    answers = [task.result() for task in asked]
    items: dict[int, ItemAnswer] = {}
    for own, answer in zip(places.values(), answers, strict=True):
        items |= zip(own, answer.items, strict=True)
    slowest = max(answers, key=lambda answer: answer.queue_seconds + answer.compute_seconds)
    return msgspec.structs.replace(slowest, items=[items[place] for place in range(len(pools))])


async def _answer(ask: Ask, pool: int, job: Job) -> Answer:
    return await ask(pool, job)


def joined(begun: Answer, places: Sequence[int], ended: Answer) -> Answer:
    """Return an answer with the items at some places ended by another engine.

    What both ran and spent on an item counts; stages add up, as one followed the other. f_o's
    prediction is the first engine's: the second began where the first ended.
    """
    items = list(begun.items)
    for place, item in zip(places, ended.items, strict=True):
        before = items[place]
        items[place] = msgspec.structs.replace(
            item,
            predicted=before.predicted,
            steps=[*before.steps, *item.steps],
            heads=[a + b for a, b in zip(before.heads, item.heads, strict=True)]
            if item.heads
            else before.heads,
            macs=before.macs + item.macs,
        )
    return msgspec.structs.replace(
        ended,
        items=items,
        budget_seconds=begun.budget_seconds + ended.budget_seconds,
        queue_seconds=begun.queue_seconds + ended.queue_seconds,
        compute_seconds=begun.compute_seconds + ended.compute_seconds,
    )
