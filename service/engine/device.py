"""Whether a device still computes.

A kernel that accesses memory illegally, a failed assertion in a kernel or an uncorrectable memory
error leaves a CUDA context broken: every later operation of the process fails. Nothing but a new
process helps. No list of error messages tells these errors from others reliably, so the device is
asked to run a small operation instead.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

EXIT_CODE = 69
"""Exit code of an engine whose device is lost (`EX_UNAVAILABLE` of sysexits.h)."""


class DeviceLostError(Exception):
    """The device runs no operation of this process any more."""


def use_device(device: str) -> None:
    """Let what this thread does on a GPU be done on the one that is named."""
    if ":" in device:
        torch.cuda.set_device(device)


def probe_device(device: str) -> None:
    """Run a small operation on a device, and wait for its result.

    Raises:
        RuntimeError: the device does not run it.
    """
    torch.ones(1, device=device).add_(1).item()


def check_device(probe: Callable[[], None], error: Exception) -> None:
    """Check, after an error, that the device still computes.

    Args:
        probe: `probe_device`, or another function that raises where it does not.
        error: what has happened.

    Raises:
        DeviceLostError: the probe failed, for a reason other than a lack of memory.
    """
    try:
        probe()
    except (torch.OutOfMemoryError, MemoryError):
        return
    except Exception as probed:
        # The probe's words are safe to log; those of the pass may quote a text.
        said = str(probed).partition("\n")[0]
        raise DeviceLostError(f"{type(error).__name__}, then in a probe: {said}") from error
