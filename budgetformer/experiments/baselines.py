"""Train the baselines of reports: dense networks of several sizes, and early exits.

`python -m budgetformer.experiments.baselines --data FOLDER --start ENCODER --recipe RECIPE --out
FOLDER` trains them with the data and the recipe of a checkpoint, in bfloat16 where the device has
instructions for it.

The dense network is the starting encoder, fine-tuned for as many epochs as the checkpoint. An early
exit is a linear classifier on the mean token state after a layer, fitted on the training texts with
the encoder frozen (as in DeeBERT); a text exits at the first layer whose classifier is confident
enough. A smaller network keeps some layers of the dense one, with their most important heads and
neurons, and is trained on the labels and the dense network's answers for as many epochs.
"""

from __future__ import annotations

import argparse
import copy
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from budgetformer.errors import BudgetFormerError, DataError
from budgetformer.experiments import terminal
from budgetformer.model.configuration import BudgetFormerConfig
from budgetformer.model.embeddings import masked_mean
from budgetformer.model.modeling import BudgetFormerForSequenceClassification
from budgetformer.training.data import Examples, TokenizedTexts, drawn_rows
from budgetformer.training.importance import order_by_importance
from budgetformer.training.pipeline import find_data, find_device, prepare
from budgetformer.training.processes import SINGLE_PROCESS, Processes, join_processes
from budgetformer.training.recipe import Recipe
from budgetformer.training.trainer import CPU, Log, Trainer, inputs, rows_by_length

EXITS = "exits.safetensors"
SMALLER = "smaller"
SMALLER_SIZES = ((1 / 6, 1 / 4), (1 / 6, 1 / 2), (1 / 3, 1 / 2), (1 / 3, 1))
"""Sizes of the smaller networks: shares of the dense network's layers, and of heads and neurons."""
EXIT_ROWS = 10_000
"""Maximum training texts on which early exits are fitted."""
EXIT_PENALTY = 1e-4
BATCH = 32


@dataclass(frozen=True)
class Baseline:
    """The baselines of a checkpoint.

    Attributes:
        model: dense network.
        weight, bias: weights [L-1, C, D] and biases [L-1, C] of the early exits after its first
            L - 1 layers.
        smaller: smaller dense networks, with one ladder step each.
    """

    model: BudgetFormerForSequenceClassification
    weight: Tensor
    bias: Tensor
    smaller: tuple[BudgetFormerForSequenceClassification, ...] = ()

    def layer_logits(self, tokens: TokenizedTexts) -> Tensor:
        """Return the logits after each layer [L, N, C]; the last are the dense network's."""
        states, logits = _layer_states(self.model, tokens, "dense network")
        early = torch.einsum("lnd,lcd->lnc", states[:-1], self.weight) + self.bias[:, None]
        return torch.cat([early, logits[None]])

    def smaller_logits(self, tokens: TokenizedTexts) -> list[Tensor]:
        """Return the logits [N, C] of each smaller network."""
        return [_layer_states(model, tokens, "smaller network")[1] for model in self.smaller]


def train_baselines(
    model: BudgetFormerForSequenceClassification,
    tokens: TokenizedTexts,
    examples: Examples,
    recipe: Recipe,
    work_dir: Path,
    folder: Path,
    log: Log,
    origin: str = "",
    *,
    device: torch.device = CPU,
    micro_batch: int | None = None,
    processes: Processes = SINGLE_PROCESS,
) -> None:
    """Train a dense network and smaller ones from a starting encoder, and write them to `folder`.

    The network of the checkpoint is no fair baseline, because it is trained to correct step 0. An
    interrupted run resumes when it is started again.

    Args:
        model: starting encoder, without a step 0; it is trained in place.
        tokens, examples: training texts of the checkpoint.
        recipe: recipe of the checkpoint.
        work_dir: folder for the states of the runs; the caller removes it.
        folder: folder to write, which `read_baseline` reads.
        log: function that is called with one line per event.
        origin: identifier of the starting weights.
        device, micro_batch, processes: see `Trainer`.
    """
    hardware: dict[str, Any] = {
        "device": device,
        "micro_batch": micro_batch,
        "processes": processes,
    }
    epochs = recipe.dense_epochs + recipe.budget_epochs
    dense_recipe = replace(recipe, dense_epochs=epochs, budget_epochs=0, ladder="uniform")
    log("training the dense baseline")
    dense = Trainer(model, tokens, examples, dense_recipe, work_dir, log, origin, **hardware)
    dense.train(lambda: _write_dense(model, tokens, examples, folder, recipe.seed, log))
    teacher = dense.predict(tokens, model.config.num_steps, "teacher")
    for layers, heads in sizes_of_smaller(model):
        name = f"{layers}x{heads}"
        log(f"training a dense baseline with {layers} layers and {heads} heads")
        small = keep_layers(model, layers)
        nn.Module.to(small, device)
        order_by_importance(small, dense.labelled_batches())
        small.config.ladder = [[heads] * layers]
        trainer = Trainer(
            *(small, tokens, examples, dense_recipe, work_dir / name, log, origin),
            teacher=teacher,
            **hardware,
        )
        trainer.train()
        if processes.is_main:
            small.save_pretrained(folder / SMALLER / name)


def sizes_of_smaller(model: BudgetFormerForSequenceClassification) -> list[tuple[int, int]]:
    """Return (layers, heads per layer) of the smaller networks."""
    layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    sizes = {(max(1, round(a * layers)), max(1, round(b * heads))) for a, b in SMALLER_SIZES}
    return sorted(sizes)


def keep_layers(
    model: BudgetFormerForSequenceClassification, count: int
) -> BudgetFormerForSequenceClassification:
    """Return a copy of a network with `count` of its layers, evenly spaced from the first."""
    config = cast(BudgetFormerConfig, copy.deepcopy(model.config))
    config.num_hidden_layers = count
    config.ladder = [[config.num_attention_heads] * count]
    small = BudgetFormerForSequenceClassification(config)
    layers = list(model.encoder.encoder_layers)
    kept = nn.ModuleList(layers[i * len(layers) // count] for i in range(count))
    in_layers = {f"encoder.layers.{name}": weight for name, weight in kept.state_dict().items()}
    others = {k: v for k, v in model.state_dict().items() if not k.startswith("encoder.layers.")}
    small.load_state_dict(others | in_layers)
    return small


def _write_dense(
    model: BudgetFormerForSequenceClassification,
    tokens: TokenizedTexts,
    examples: Examples,
    folder: Path,
    seed: int,
    log: Log,
) -> None:
    """Fit early exits on a trained dense network, and write both to `folder`."""
    log("fitting early exits on the dense baseline")
    rows = drawn_rows(len(examples), EXIT_ROWS, seed)
    states, _ = _layer_states(model, tokens.subset(rows), "early exits")
    labels = torch.from_numpy(examples.labels[rows])
    exits = [_fit_exit(model, layer, labels) for layer in states[:-1]]
    weights = {
        "weight": torch.stack([weight for weight, _ in exits]),
        "bias": torch.stack([bias for _, bias in exits]),
    }
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    save_file(weights, folder / EXITS)


def read_baseline(folder: Path) -> Baseline:
    """Read the baselines that `train_baselines` wrote.

    Raises:
        DataError: the folder has no such baselines.
    """
    try:
        exits = load_file(folder / EXITS)
        model = BudgetFormerForSequenceClassification.from_pretrained(folder).eval()
        smaller = [
            BudgetFormerForSequenceClassification.from_pretrained(path).eval()
            for path in sorted((folder / SMALLER).glob("*"))
        ]
        return Baseline(model, exits["weight"], exits["bias"], tuple(smaller))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise DataError(f"{folder}: no dense network with early exits: {error}") from error


@contextmanager
def _recorded_states(model: BudgetFormerForSequenceClassification) -> Iterator[list[Tensor]]:
    """Yield a list that collects the states [B, T, D] after each layer of forward passes."""
    recorded: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _, __, states: recorded.append(states))
        for layer in model.encoder.encoder_layers
    ]
    try:
        yield recorded
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
    with _recorded_states(model) as recorded:
        for rows in rows_by_length(tokens, BATCH, title):
            batch = tokens.batch(rows)
            recorded.clear()
            encoded = model.encoder(**inputs(batch), steps=config.num_steps)
            logits[rows] = model.classify(encoded.pooled)
            for index, layer in enumerate(recorded):
                states[index, rows] = masked_mean(layer, batch.attention_mask)
    model.train(training)
    return states, logits


def _fit_exit(
    model: BudgetFormerForSequenceClassification, states: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the weight [C, D] and bias [C] of a linear classifier, fitted on states [N, D]."""
    mean, scale = states.mean(0), states.std(0) + 1e-6
    standardised = (states - mean) / scale
    weight = torch.zeros(model.config.num_classes, states.shape[1], requires_grad=True)
    bias = torch.zeros(model.config.num_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = model.loss(standardised @ weight.T + bias, labels)
        value = value + EXIT_PENALTY * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        unscaled = weight / scale
        return unscaled.detach(), (bias - unscaled @ mean).detach()


def main(arguments: Sequence[str] | None = None) -> int:
    """Train the baselines of a checkpoint; an interrupted run resumes. Return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="training file, or its folder")
    parser.add_argument("--start", help="folder of an encoder, or `minilm-l6`; none: from scratch")
    parser.add_argument("--recipe", required=True, help="recipe of the checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="folder for the networks")
    parser.add_argument("--threads", type=int, help="threads; all cores unless given")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--micro-batch", type=int, help="items per pass, to save memory")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    recipe = replace(Recipe.read(options.recipe), embedding_exit=False, precision="auto")
    work_dir = options.out.parent / f".{options.out.name}.work"
    try:
        processes, device = join_processes(find_device(options.device))
        log = processes.log_of_main(terminal.log)
        train_file, _ = find_data(options.data)
        run = prepare(train_file, options.start, recipe, work_dir, processes, log)
        train_baselines(
            *(run.conversion.model, run.tokens, run.seen, recipe, work_dir, options.out, log),
            run.conversion.origin,
            device=device,
            micro_batch=options.micro_batch,
            processes=processes,
        )
    except BudgetFormerError as error:
        terminal.log(str(error))
        return 1
    if processes.is_main:
        shutil.rmtree(work_dir, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
