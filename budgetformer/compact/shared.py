"""Weights that several processes hold once."""

from __future__ import annotations

import fcntl
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from budgetformer.errors import one_line

ALIGNMENT = 64
"""Bytes that a tensor begins at a multiple of, as torch's own do."""


def share(tensors: Sequence[Tensor], path: Path) -> None:
    """Let tensors lie in a file that every process maps which shares the same tensors.

    The first one writes it. Nobody may write to the tensors afterwards: only its own process would
    see it. Views that were taken before keep the memory as it was.

    Args:
        tensors: on a CPU, contiguous.
        path: of the file, in a folder that no other user can write to. It may be removed while it
            is mapped.

    Raises:
        OSError: it cannot be written or mapped, and the tensors stay as they are.
    """
    sizes = [-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors]
    *starts, total = accumulate(sizes, initial=0)
    with (path.parent / "weights.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            _write(tensors, sizes, path)
    try:
        held = torch.from_file(str(path), shared=False, size=total, dtype=torch.uint8)
    except RuntimeError as error:
        raise OSError(f"{path}: {one_line(error)}") from error
    for tensor, start in zip(tensors, starts, strict=True):
        there = held[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        if torch.equal(there, tensor):
            tensor.data = there


def _write(tensors: Sequence[Tensor], sizes: Sequence[int], path: Path) -> None:
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("wb") as file:
            for tensor, size in zip(tensors, sizes, strict=True):
                file.write(tensor.detach().view(-1).view(torch.uint8).numpy().tobytes())
                file.write(bytes(size - tensor.nbytes))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
