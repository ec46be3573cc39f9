"""Items that one pool of engines begins and another ends."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

import msgspec

from service.engine.client import Job
from service.engine.protocol import Answer

Ask = Callable[[int, Job, list[int] | None], Awaitable[Answer]]
"""Ask a pool that computes a step to do a job; the items begin at the steps given, if any are."""


async def through_pools(ask: Ask, job: Job) -> Answer:
    """Have a job done by the pool of the smallest steps, and by others where an item needs more."""
    answer = await ask(job.heads or 0, job, None)
    while unfinished := [i for i, item in enumerate(answer.items) if item.next_step]:
        steps = [answer.items[i].next_step for i in unfinished]
        # The level that the first engine chose stays: the rule decides what comes next.
        rest = replace(job, items=[job.items[i] for i in unfinished], quality=answer.quality)
        answer = joined(answer, unfinished, await ask(max(steps), rest, steps))
    return answer


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
