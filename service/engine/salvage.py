"""Retry a failed batch in halves, until only the faulty items fail."""

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
    """Run a batch; if it fails, run its halves in the same way.

    A faulty item thus costs only log2(items) extra passes, and a batch that needs too much memory
    is run in smaller parts.

    Args:
        run: runs a pass; if it raises, it leaves its items unchanged.
        items: batch of at least one item.
        failed: called with each item that fails alone, and its error.
        check: called with each error of a pass; raises if the device is lost, since then no item is
            the cause and no further pass can succeed.

    Returns:
        Number of items that fit into memory, if memory ran out; else None.
    """
    try:
        run(items)
    except Exception as error:  # any error of a pass with one item is the failure of that item
        out_of_memory = _out_of_memory(error)
        check(error)
        if len(items) == 1:
            failed(items[0], error)
            return 1 if out_of_memory else None
        middle = len(items) // 2
        halves = [salvage(run, half, failed, check) for half in (items[:middle], items[middle:])]
        limits = [limit for limit in halves if limit is not None]
        return min(limits) if limits else middle if out_of_memory else None
    return None


def _out_of_memory(error: Exception) -> bool:
    """Return whether memory ran out; then also free the cached blocks of the device."""
    if isinstance(error, torch.OutOfMemoryError):
        with contextlib.suppress(RuntimeError):  # the device is lost; `check` reports it
            torch.cuda.empty_cache()
        return True
    return isinstance(error, MemoryError) or "can't allocate memory" in str(error)
