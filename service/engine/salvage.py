"""Save what can be saved of a batch that fails: halve it, until only the faulty items fail."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch

from budgetformer.inference.cascade import Batch, Part


def salvage(
    run: Callable[[Batch], None],
    items: Batch,
    failed: Callable[[Part, Exception], None],
    check: Callable[[Exception], None],
) -> int | None:
    """Run items together, and in halves where that fails.

    An item that fails in every batch thus costs few passes, and a batch that is too large for the
    memory is run in smaller parts.

    Args:
        run: the pass; it leaves its items unchanged when it raises.
        items: one at least.
        failed: is called with each item that fails alone, and its error.
        check: is called with each error of a pass; raises if the device computes nothing any more.
            No item is to blame then, and no further pass is tried.

    Returns:
        How many items memory had room for, if it ran out; else None.
    """
    try:
        run(items)
    except Exception as error:  # any error of a pass with one item is the failure of that item
        short = _out_of_memory(error)
        check(error)
        if len(items) == 1:
            failed(items[0], error)
            return 1 if short else None
        middle = len(items) // 2
        rooms = [salvage(run, half, failed, check) for half in (items[:middle], items[middle:])]
        found = [room for room in rooms if room is not None]
        return min(found) if found else middle if short else None
    return None


def _out_of_memory(error: Exception) -> bool:
    """Return whether memory ran out; cached blocks then go back to the device."""
    if isinstance(error, torch.OutOfMemoryError):
        with contextlib.suppress(RuntimeError):  # a lost device; the check says so
            torch.cuda.empty_cache()
        return True
    return isinstance(error, MemoryError) or "can't allocate memory" in str(error)
