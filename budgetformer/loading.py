"""From a checkpoint folder to a network that is ready to run, without Transformers."""

from __future__ import annotations

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from budgetformer.architecture import Architecture
from budgetformer.checkpoint import CONFIG, WEIGHTS, Checkpoint
from budgetformer.compact import PackedPass, load_pass
from budgetformer.errors import CheckpointError
from budgetformer.modules import Encoder, SequenceClassifier
from budgetformer.precision import Precision


def load_network(
    checkpoint: Checkpoint, device: str = "cpu", precision: Precision = "float32"
) -> PackedPass:
    """Load a checkpoint's weights and return its compact pass, in a precision of `load_pass`.

    Raises:
        CheckpointError: a file is damaged, a weight is missing, left over or of another shape.
    """
    checkpoint.verify()
    network = _assemble(checkpoint)
    path = checkpoint.path / WEIGHTS
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    _check(path.as_posix(), network, weights)
    floats = {name: weight.to(torch.float32) for name, weight in weights.items()}
    network.load_state_dict(floats, assign=True)
    return load_pass(network.to(torch.device(device)), precision)


def _assemble(checkpoint: Checkpoint) -> SequenceClassifier:
    """Put the modules together, without weights."""
    try:
        architecture = Architecture.read(checkpoint.config)
        # Without a device no memory is taken and nothing drawn at random: the weights come anyway.
        with torch.device("meta"):
            encoder, network = Encoder(), SequenceClassifier()
            encoder.build(architecture)
            network.build(encoder, architecture)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{checkpoint.path / CONFIG}: {error}") from error
    return network


def _check(label: str, network: nn.Module, weights: dict[str, Tensor]) -> None:
    wanted = {name: weight.shape for name, weight in network.state_dict().items()}
    found = {name: weight.shape for name, weight in weights.items()}
    problems = {
        "mismatched": [n for n in wanted.keys() & found.keys() if wanted[n] != found[n]],
        "missing": list(wanted.keys() - found.keys()),
        "unexpected": list(found.keys() - wanted.keys()),
    }
    for kind, names in problems.items():
        if names:
            raise CheckpointError(f"{label}: {kind}: {', '.join(sorted(names)[:3])}")
    if not all(bool(weight.isfinite().all()) for weight in weights.values()):
        raise CheckpointError(f"{label}: a weight is not a finite number")
