"""Load the compact pass of a checkpoint folder, without Transformers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from budgetformer.checkpoint.manifest import CONFIG, WEIGHTS
from budgetformer.checkpoint.store import Checkpoint
from budgetformer.errors import CheckpointError, one_line
from budgetformer.inference.packed import PackedPass
from budgetformer.inference.precision import Precision
from budgetformer.inference.precision_choice import load_pass
from budgetformer.model.architecture import Architecture
from budgetformer.model.encoder import Encoder, SequenceClassifier

_without_init_lock = threading.Lock()


def load_network(
    checkpoint: Checkpoint, device: str = "cpu", precision: Precision = "float32"
) -> PackedPass:
    """Load a checkpoint and return its compact pass.

    Args:
        checkpoint: checkpoint to load; its files are verified.
        device: torch device, such as "cpu" or "cuda".
        precision: precision of the matrix products, see `load_pass`.

    Raises:
        CheckpointError: a file is damaged; a weight is missing, unexpected or of another shape; or
            the precision is not available.
    """
    checkpoint.verify(but=WEIGHTS)
    network = _assemble(checkpoint)
    path = checkpoint.path / WEIGHTS
    # Read instead of mapped, because the file may change or shrink while it is used.
    content = checkpoint.read(WEIGHTS)
    try:
        weights = load(content)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: {one_line(error)}") from error
    del content
    _check_weights(path.as_posix(), network, weights)
    state = {name: w if _keeps_dtype(name, w) else w.float() for name, w in weights.items()}
    network.load_state_dict(state, assign=True)
    network.encoder.embeddings.states_dtype = torch.float32
    network.to(torch.device(device))
    try:
        compact = load_pass(network, precision, checkpoint.manifest.ranges)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from error
    compact.free_model_weights()
    return compact


def _keeps_dtype(name: str, weight: Tensor) -> bool:
    """Return whether a weight keeps its data type, such as float16, to save memory.

    Embedding tables do, because a text reads few of their rows, and matrices that are packed later.
    """
    if not weight.is_floating_point():
        return True
    table = name.startswith("encoder.embeddings.") or name == "exit_head.weight.weight"
    packed = ".attention." in name or ".feed_forward." in name
    return weight.dim() == 2 and (table or packed)


def _assemble(checkpoint: Checkpoint) -> SequenceClassifier:
    """Create the network's modules without initialising their weights."""
    try:
        architecture = Architecture.read(checkpoint.config)
        with _without_init():
            encoder, network = Encoder(), SequenceClassifier()
            encoder.build(architecture)
            network.build(encoder, architecture)
    except Exception as error:  # torch raises many types for invalid sizes
        reason = one_line(error) or type(error).__name__
        raise CheckpointError(f"{checkpoint.path / CONFIG}: {reason}") from error
    return network


@contextmanager
def _without_init() -> Iterator[None]:
    """Skip the initialisation of modules that this thread creates in this block.

    The memory of the weights is not allocated, because it is never written. The "meta" device would
    do the same, but it imports SymPy. Other threads initialise their modules as usual.
    """
    kinds: list[Any] = [nn.Linear, nn.Embedding, nn.LayerNorm]
    this_thread = threading.get_ident()

    def in_other_threads(init: Callable[[nn.Module], None]) -> Callable[[nn.Module], None]:
        return lambda module: None if threading.get_ident() == this_thread else init(module)

    with _without_init_lock:
        inits = [kind.reset_parameters for kind in kinds]
        try:
            for kind, init in zip(kinds, inits, strict=True):
                kind.reset_parameters = in_other_threads(init)
            yield
        finally:
            for kind, init in zip(kinds, inits, strict=True):
                kind.reset_parameters = init


def _check_weights(label: str, network: nn.Module, weights: dict[str, Tensor]) -> None:
    expected = {name: weight.shape for name, weight in network.state_dict().items()}
    actual = {name: weight.shape for name, weight in weights.items()}
    common = expected.keys() & actual.keys()
    problems = {
        "mismatched": [name for name in common if expected[name] != actual[name]],
        "missing": list(expected.keys() - actual.keys()),
        "unexpected": list(actual.keys() - expected.keys()),
    }
    for kind, names in problems.items():
        if names:
            first = one_line(", ".join(sorted(names)[:3]))
            raise CheckpointError(f"{label}: {kind}: {first}")
    if not all(bool(weight.isfinite().all()) for weight in weights.values()):
        raise CheckpointError(f"{label}: a weight is not a finite number")
