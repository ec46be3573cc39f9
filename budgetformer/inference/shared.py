"""Share weights between processes, so that they occupy memory once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from budgetformer.errors import one_line
from budgetformer.inference.shared_file import SharedFile

ALIGNMENT = 64
"""Alignment of tensors in bytes, as in torch."""


class SharedTensors:
    """Tensors stored in a `SharedFile`.

    Args:
        link: see `SharedFile`.
    """

    def __init__(self, link: Path) -> None:
        self._file = SharedFile(link)

    def hold(self, tensors: Sequence[Tensor]) -> None:
        """Move tensors into the file; views that were taken earlier keep the old memory.

        The tensors must not be written to afterwards: other processes would not see the change.

        Args:
            tensors: contiguous tensors on a CPU.

        Raises:
            OSError: the file cannot be created or mapped; the tensors are unchanged.
        """
        sizes = [-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors]
        *starts, total = accumulate(sizes, initial=0)

        def write(writer: BinaryIO) -> None:
            for tensor, size in zip(tensors, sizes, strict=True):
                writer.write(tensor.detach().view(-1).view(torch.uint8).numpy().tobytes())
                writer.write(bytes(size - tensor.nbytes))

        with self._file.opened(write, total) as file:
            try:
                mapped = torch.from_file(
                    f"/proc/self/fd/{file}", shared=False, size=total, dtype=torch.uint8
                )
            except RuntimeError as error:
                raise OSError(one_line(error)) from error
        for tensor, start in zip(tensors, starts, strict=True):
            shared = mapped[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            if torch.equal(shared, tensor):
                tensor.data = shared

    def forget(self) -> None:
        """Release the file; see `SharedFile.forget`."""
        self._file.forget()
