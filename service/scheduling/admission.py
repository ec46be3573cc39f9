"""Whether a request may enter: bounded items, and deadlines that can be met."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

MARGIN = 1.2
"""What waits may take so much longer than it seems: whoever is let in at the last moment should not
expire at the very end, when most of its work is done."""


@dataclass(frozen=True)
class Refusal:
    """Why a request was not admitted, and after how many seconds it is worth trying again."""

    reason: Literal["queue_full", "deadline", "draining"]
    retry_after: int


def admit(
    items: int,
    queued_items: int,
    max_items: int,
    queued_seconds: float,
    price: float,
    remaining: float,
) -> Refusal | None:
    """Decide for a whole request at once.

    Args:
        items: texts in the request.
        queued_items: texts that wait or run already.
        max_items: room in the queue.
        queued_seconds: device time that they will take.
        price: device time that the request will take.
        remaining: seconds until the answer is worthless.

    Returns:
        None when admitted. A request larger than the whole queue is admitted when the queue is
        empty, since no later moment would suit it better.
    """
    if queued_items and queued_items + items > max_items:
        # Room for it opens when this share of what is queued has drained.
        share = min(1.0, (queued_items + items - max_items) / queued_items)
        return Refusal("queue_full", max(1, math.ceil(share * queued_seconds)))
    needed = MARGIN * queued_seconds + price
    if needed > remaining:
        return Refusal("deadline", max(1, math.ceil((needed - remaining) / MARGIN)))
    return None
