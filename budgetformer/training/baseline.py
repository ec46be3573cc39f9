"""What budgets are measured against: the dense network, and early exits from its layers.

The dense network is the fine-tuned starting encoder, kept as it was before any budget changed it.
An early exit is a linear classifier on the mean token state after a layer, fitted on the training
texts while the encoder stays as it is (as in DeeBERT): a text leaves at the first layer whose
classifier is sure enough.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from budgetformer.errors import DataError
from budgetformer.modeling import BudgetFormerForSequenceClassification
from budgetformer.modules import masked_mean
from budgetformer.training.data import Examples, TokenizedTexts, drawn_rows
from budgetformer.training.trainer import inputs, progress_bar

EXITS = "exits.safetensors"
EXIT_ROWS = 10_000
"""Training texts that the early exits are fitted on, at most."""
EXIT_PENALTY = 1e-4
BATCH = 32


@dataclass(frozen=True)
class Baseline:
    """The dense network, and the classifiers after its first L - 1 layers.

    weight [L-1, C, D], bias [L-1, C].
    """

    model: BudgetFormerForSequenceClassification
    weight: Tensor
    bias: Tensor

    def layer_logits(self, tokens: TokenizedTexts) -> Tensor:
        """Return what each layer would answer, [L, N, C]; the last one is the network itself."""
        states, logits = _layer_states(self.model, tokens, "dense twin")
        early = torch.einsum("lnd,lcd->lnc", states[:-1], self.weight) + self.bias[:, None]
        return torch.cat([early, logits[None]])


def write_baseline(
    model: BudgetFormerForSequenceClassification,
    tokens: TokenizedTexts,
    examples: Examples,
    folder: Path,
    seed: int,
) -> None:
    """Fit early exits on a trained dense network and write both to `folder`."""
    rows = drawn_rows(len(examples), EXIT_ROWS, seed)
    states, _ = _layer_states(model, tokens.subset(rows), "early exits")
    labels = torch.from_numpy(examples.labels[rows])
    fitted = [_fit(model, layer, labels) for layer in states[:-1]]
    weights = {
        "weight": torch.stack([weight for weight, _ in fitted]),
        "bias": torch.stack([bias for _, bias in fitted]),
    }
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    save_file(weights, folder / EXITS)


def read_baseline(folder: Path) -> Baseline:
    """Read what `write_baseline` wrote.

    Raises:
        DataError: the folder holds no such network.
    """
    try:
        exits = load_file(folder / EXITS)
        model = BudgetFormerForSequenceClassification.from_pretrained(folder).eval()
        return Baseline(model, exits["weight"], exits["bias"])
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise DataError(f"{folder}: no dense network with early exits: {error}") from error


@contextmanager
def _tapped(model: BudgetFormerForSequenceClassification) -> Iterator[list[Tensor]]:
    """Collect the states [B, T, D] after each layer of the next forward passes."""
    taken: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _, __, states: taken.append(states))
        for layer in model.encoder.encoder_layers
    ]
    try:
        yield taken
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def _layer_states(
    model: BudgetFormerForSequenceClassification, tokens: TokenizedTexts, title: str
) -> tuple[Tensor, Tensor]:
    """Return mean states after each layer [L, N, D], and logits [N, C], at the full budget."""
    config = model.config
    training = model.training
    model.eval()
    count = len(tokens.ids)
    states = torch.zeros(config.num_hidden_layers, count, config.hidden_size)
    logits = torch.zeros(count, config.num_classes)
    with progress_bar() as bar, _tapped(model) as taken:
        task = bar.add_task(title, total=count, note="")
        for batch in tokens.batches(BATCH):
            taken.clear()
            encoded = model.encoder(**inputs(batch), steps=config.num_steps)
            logits[batch.rows] = model.classify(encoded.pooled)
            for index, layer in enumerate(taken):
                states[index, batch.rows] = masked_mean(layer, batch.attention_mask)
            bar.advance(task, len(batch.rows))
    model.train(training)
    return states, logits


def _fit(
    model: BudgetFormerForSequenceClassification, states: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Fit a linear classifier on states [N, D]: weight [C, D], bias [C]."""
    mean, scale = states.mean(0), states.std(0) + 1e-6
    inputs_ = (states - mean) / scale
    weight = torch.zeros(model.config.num_classes, states.shape[1], requires_grad=True)
    bias = torch.zeros(model.config.num_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = model.loss(inputs_ @ weight.T + bias, labels)
        value = value + EXIT_PENALTY * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        unscaled = weight / scale
        return unscaled.detach(), (bias - unscaled @ mean).detach()
