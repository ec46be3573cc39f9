"""Train one network in a single process, or in several started by `accelerate launch`.

Each process runs its part of every batch, and gradients are summed over the processes. So all
processes make the same updates, and end with the weights of a single-process run up to rounding.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from budgetformer.errors import DataError
from budgetformer.model.modeling import BudgetFormerForSequenceClassification
from budgetformer.training.data import TokenBatch


class Processes:
    """A single training process, and the interface of `MultiProcess`.

    Attributes:
        count: number of processes.
        index: index of this process; process 0 writes files and logs.
    """

    count, index = 1, 0

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and logs."""
        return self.index == 0

    def log_of_main(self, log: Callable[[str], None]) -> Callable[[str], None]:
        """Return `log` in the first process, and a function that does nothing in the others."""
        return log if self.is_main else lambda _: None

    def local_batch(self, batch: TokenBatch) -> tuple[TokenBatch, float]:
        """Return this process's part of a batch, and a factor for its loss.

        If a batch has fewer items than there are processes, the others run the first part with a
        factor of 0, so that all processes have gradients for the same weights.
        """
        parts = batch.split(self.count)
        return (parts[self.index], 1.0) if self.index < len(parts) else (parts[0], 0.0)

    def sum_gradients(self, model: BudgetFormerForSequenceClassification, loss: float) -> float:
        """Sum gradients over the processes, in place, and return the sum of their losses."""
        del model
        return loss

    def broadcast_weights(self, model: BudgetFormerForSequenceClassification) -> None:
        """Copy the first process's weights and ladder to all others."""

    def wait(self) -> None:
        """Wait until all processes have called this."""

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Let the first process run a block before the others."""
        if not self.is_main:
            self.wait()
        yield
        if self.is_main:
            self.wait()


SINGLE_PROCESS = Processes()


class MultiProcess(Processes):
    """One of several training processes, connected by Accelerate.

    Args:
        accelerate: the package `accelerate`.
        device: requested device.
    """

    def __init__(self, accelerate: Any, device: torch.device) -> None:
        self._utils = accelerate.utils
        self._accelerator = accelerate.Accelerator(cpu=device.type == "cpu")
        self.count = self._accelerator.num_processes
        self.index = self._accelerator.process_index
        self.device: torch.device = self._accelerator.device

    def sum_gradients(self, model: BudgetFormerForSequenceClassification, loss: float) -> float:
        """Sum gradients over the processes, in place, and return the sum of their losses."""
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        flat = [gradient.reshape(-1) for gradient in gradients]
        value = torch.tensor([loss], device=self.device)
        total: Tensor = self._accelerator.reduce(torch.cat([*flat, value]), reduction="sum")
        sizes = [gradient.numel() for gradient in gradients]
        for gradient, part in zip(gradients, total[:-1].split(sizes), strict=True):
            gradient.copy_(part.view_as(gradient))
        return float(total[-1])

    def broadcast_weights(self, model: BudgetFormerForSequenceClassification) -> None:
        """Copy the first process's weights and ladder to all others."""
        for weight in model.state_dict().values():
            weight.copy_(self._utils.broadcast(weight.contiguous()))
        (model.config.ladder,) = self._utils.broadcast_object_list([model.config.ladder])

    def wait(self) -> None:
        """Wait until all processes have called this."""
        self._accelerator.wait_for_everyone()


def join_processes(device: torch.device) -> tuple[Processes, torch.device]:
    """Return the processes of this run, and the device of this process.

    Raises:
        DataError: there are several processes, and Accelerate is not installed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return SINGLE_PROCESS, device
    try:
        accelerate = importlib.import_module("accelerate")
    except ImportError as error:
        raise DataError(
            "training in several processes requires the package accelerate (extra: gpus)"
        ) from error
    processes = MultiProcess(accelerate, device)
    return processes, processes.device
