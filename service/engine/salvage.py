"""Save what can be saved of a batch that fails: halve it, until only the guilty fail."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

T = TypeVar("T")


def salvage(
    run: Callable[[Sequence[T]], None],
    items: Sequence[T],
    failed: Callable[[T, Exception], None],
) -> int | None:
    """Run items together, and in halves where that fails.

    One item that no batch survives thus costs few passes, and a batch that is too large for the
    memory is run in parts that are not.

    Args:
        run: the pass; what it did to its items is nothing when it raises.
        items: one at least.
        failed: is told of each item that fails alone, and why.

    Returns:
        How many items memory had room for, if it was short of it; else None.
    """
    try:
        run(items)
    except (
        Exception
    ) as error:  # whatever it is, it is the failure of the item that is alone with it
        short = _out_of_memory(error)
        if len(items) == 1:
            failed(items[0], error)
            return 1 if short else None
        middle = len(items) // 2
        rooms = [salvage(run, half, failed) for half in (items[:middle], items[middle:])]
        found = [room for room in rooms if room is not None]
        return min(found) if found else middle if short else None
    return None


def _out_of_memory(error: Exception) -> bool:
    """Say whether memory ran out; what a failed pass held goes back to the device then."""
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
        return True
    return isinstance(error, MemoryError) or "can't allocate memory" in str(error)
