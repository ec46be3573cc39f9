"""Load the `Decider` of a checkpoint folder, without torch."""

from __future__ import annotations

import json
import mmap
import weakref
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from budgetformer.checkpoint.manifest import WEIGHTS
from budgetformer.checkpoint.store import Checkpoint
from budgetformer.cost.macs import Sizes
from budgetformer.errors import CheckpointError
from budgetformer.inference.decider import Decider
from budgetformer.inference.shared_file import SharedFile
from budgetformer.model.tfidf import STEP0_TENSORS, Array, StepZero

_TYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I8": "i1", "U8": "u1"}


def load_decider(checkpoint: Checkpoint, shared: Path | None = None) -> Decider | None:
    """Load step 0 and f_o of a checkpoint; None if its network decides from embeddings.

    Args:
        checkpoint: checkpoint, whose files need not have been verified.
        shared: folder through which processes share the tables in memory; None: this process loads
            its own copy, as it does if memory cannot be shared here.

    Raises:
        CheckpointError: the weights file differs from the manifest, or lacks a tensor.
    """
    architecture = checkpoint.architecture
    sizes = Sizes.of(architecture)
    if architecture.has_one_budget:
        return Decider(sizes, None)
    if not architecture.decides_from_step0 or architecture.budget_scope == "layer":
        return None
    name = f"{checkpoint.manifest.files[WEIGHTS].sha256}-step0"
    shared_file = None if shared is None else SharedFile(shared / name)
    try:
        tensors = _read(checkpoint) if shared_file is None else _map(checkpoint, shared_file)
        decider = Decider(sizes, StepZero.of(architecture, tensors))
    except (KeyError, ValueError, TypeError) as error:
        path = checkpoint.path / WEIGHTS
        raise CheckpointError(f"{path}: cannot read step 0: {error}") from error
    if shared_file is not None:
        weakref.finalize(decider, shared_file.forget)
    return decider


def _read(checkpoint: Checkpoint) -> dict[str, Array]:
    """Return the tensors of step 0 and f_o, 16-bit floats as float32."""
    tensors = _tensors(np.frombuffer(checkpoint.read(WEIGHTS), np.uint8))
    return {name: array.copy() for name, array in tensors.items()}


def _map(checkpoint: Checkpoint, file: SharedFile) -> dict[str, Array]:
    """Return the same tensors, mapped from a shared file that the first process creates."""
    try:
        with file.opened(lambda writer: writer.write(save(_read(checkpoint)))) as descriptor:
            content = np.frombuffer(mmap.mmap(descriptor, 0, prot=mmap.PROT_READ), np.uint8)
    except OSError:
        return _read(checkpoint)
    return _tensors(content)


def _tensors(content: Array) -> dict[str, Array]:
    """Return views of the tensors of step 0 and f_o in the content of a safetensors file.

    Raises:
        ValueError, KeyError, TypeError: the content is not in the safetensors format.
    """
    begin = 8 + int.from_bytes(content[:8].tobytes(), "little")
    entries = json.loads(content[8:begin].tobytes())
    tensors = {}
    for name, entry in entries.items():
        if name.startswith(STEP0_TENSORS):
            start, stop = entry["data_offsets"]
            array = content[begin + start : begin + stop].view(_TYPES[entry["dtype"]])
            if entry["dtype"] == "BF16":
                array = (array.astype(np.uint32) << 16).view(np.float32)
            elif entry["dtype"] == "F16":
                array = array.astype(np.float32)
            tensors[name] = array.reshape(entry["shape"])
    return tensors
