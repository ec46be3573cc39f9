"""Admit a request only if the queue has room for it and its deadline can be met."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

MARGIN = 1.2
"""Factor on the queue's expected time. Without it, requests admitted just in time could expire
after most of their work is done."""


@dataclass(frozen=True)
class Refusal:
    """Reason why a request was not admitted, and the seconds after which a retry may succeed."""

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
    """Admit a request as a whole, or return why it is refused.

    Args:
        items: number of texts in the request.
        queued_items: number of texts that wait or run.
        max_items: most texts that may wait or run.
        queued_seconds: device time of the queued texts.
        price: device time of the request.
        remaining: seconds until its deadline.

    Returns:
        None if the request is admitted. A request larger than `max_items` is admitted only when the
        queue is empty.
    """
    if queued_items and queued_items + items > max_items:
        # There is room for the request once this share of the queue has drained.
        share = min(1.0, (queued_items + items - max_items) / queued_items)
        return Refusal("queue_full", max(1, math.ceil(share * queued_seconds)))
    needed = MARGIN * queued_seconds + price
    if needed > remaining:
        return Refusal("deadline", max(1, math.ceil((needed - remaining) / MARGIN)))
    return None
