"""Check whether a device still works.

An illegal memory access or a failed assertion in a kernel, or an uncorrectable memory error, breaks
the CUDA context: every later operation of the process fails, and only a new process helps. Error
messages do not identify such errors reliably, so the device runs a small operation instead.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

EXIT_CODE = 69
"""Exit code of an engine whose device is lost (`EX_UNAVAILABLE` of sysexits.h)."""


class DeviceLostError(Exception):
    """The device no longer runs operations of this process."""


def use_device(device: str) -> None:
    """Make a GPU such as `cuda:1` the current device of this thread."""
    if ":" in device:
        torch.cuda.set_device(device)


def probe_device(device: str) -> None:
    """Run a small operation on a device, and wait for its result.

    Raises:
        RuntimeError: the operation failed.
    """
    torch.ones(1, device=device).add_(1).item()


def check_device(probe: Callable[[], None], error: Exception) -> None:
    """Check, after an error, that the device still works.

    Args:
        probe: runs a small operation, and raises if the device fails at it; see `probe_device`.
        error: the error that occurred.

    Raises:
        DeviceLostError: the probe failed, for a reason other than a lack of memory.
    """
    try:
        probe()
    except (torch.OutOfMemoryError, MemoryError):
        return
    except Exception as probe_error:
        # The probe's message is safe to log; the message of a pass may quote a text.
        message = str(probe_error).partition("\n")[0]
        raise DeviceLostError(f"{type(error).__name__}, then in a probe: {message}") from error
