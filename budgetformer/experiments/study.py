"""Compare ways to decide budgets on one network: `python -m budgetformer.experiments.study`.

All ways use the same network, are fitted on the same held-out texts, and are scored on the same
test texts at the same limits on mean cost. So only the decision differs.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from budgetformer.checkpoint.store import Checkpoint, read_checkpoint
from budgetformer.cost.macs import encoder_macs
from budgetformer.inference.policy import EntryBand
from budgetformer.inference.precision_choice import load_pass
from budgetformer.model.answers import confidence
from budgetformer.model.embeddings import masked_mean
from budgetformer.model.modeling import BudgetFormerForSequenceClassification, load_model
from budgetformer.model.step0 import exit_evidence
from budgetformer.training.calibration import AnswerTable, run_every_step
from budgetformer.training.chains import CANDIDATES, Goal, Route, Steps, chains, search
from budgetformer.training.data import Examples, TokenizedTexts, read_examples
from budgetformer.training.evaluation import read_test
from budgetformer.training.exits import pooled_states
from budgetformer.training.pages import markdown_table
from budgetformer.training.recipe import Recipe
from budgetformer.training.trainer import inputs, rows_by_length, split_rows

CAPS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5)
"""Limits on the mean multiply-adds, as shares of the dense network's."""
FOLDS = 2
EPOCHS = 12
HIDDEN = 64
PROBE_STEP = 1


@dataclass(frozen=True)
class Choice:
    """The result of one setting for N texts.

    Attributes:
        right: whether each answer is right [N].
        macs: multiply-adds of each text [N].
    """

    right: np.ndarray
    macs: np.ndarray


Setting = Callable[["TextSet"], Choice]
"""Function that applies thresholds and steps, chosen on the held-out texts, to a set of texts."""


@dataclass(frozen=True)
class TextSet:
    """N texts (held-out or test), and the data on which decisions are based.

    Attributes:
        table: answers of every step.
        right: whether each step's answer is right [S+1, N].
        features: inputs of f_o [N, F].
        probe: mean token states half-way through a small step [N, D].
        labels: class ids [N].
        signals: predictions of small networks by name, [N] each; "losses" [N, S+1].
    """

    table: AnswerTable
    right: np.ndarray
    features: Tensor
    probe: Tensor
    labels: Tensor
    signals: dict[str, np.ndarray]


def study(checkpoint: Checkpoint, held: Examples, test: Examples) -> dict[str, list[float]]:
    """Return the test accuracy of each way at every limit of `CAPS`.

    Args:
        checkpoint: checkpoint with ranked heads, scope "input" and a step 0.
        held: texts not used in training, on which decisions and thresholds are fitted.
        test: texts used for neither.
    """
    checkpoint.verify()
    model = load_model(checkpoint.path)
    sets = [_text_set(model, checkpoint, examples) for examples in (held, test)]
    _predict_signals(*sets)
    return {name: _at_caps(list(settings), *sets) for name, settings in _ways(sets[0]).items()}


def _text_set(
    model: BudgetFormerForSequenceClassification, checkpoint: Checkpoint, examples: Examples
) -> TextSet:
    network = load_pass(model, "auto")
    tokens = TokenizedTexts.of(checkpoint, examples)
    labels = torch.from_numpy(examples.labels)
    outputs = run_every_step(network, tokens)
    table = AnswerTable(network.config, outputs)
    pooled = pooled_states(model, tokens)[0]
    evidence = exit_evidence(outputs.logits[0], network.config.problem_type)
    features = torch.cat([pooled, evidence], dim=1)
    probe, right = _probe_states(model, tokens), table.right(labels)
    return TextSet(table, right, features, probe, labels, {"f_o": table.s})


@torch.no_grad()
def _probe_states(model: BudgetFormerForSequenceClassification, tokens: TokenizedTexts) -> Tensor:
    """Return mean token states after the first half of the layers at a small step [N, D]."""
    states = torch.zeros(len(tokens.ids), model.config.hidden_size)
    half = model.config.num_hidden_layers // 2
    for rows in rows_by_length(tokens, 32, "probe"):
        batch = tokens.batch(rows)
        probed = model.encoder.run_at(PROBE_STEP, **inputs(batch), layers=half)
        states[rows] = masked_mean(probed, batch.attention_mask)
    return states


def _predict_signals(held: TextSet, test: TextSet) -> None:
    """Fit small networks on the held-out texts, and store their predictions for both sets.

    Predictions for held-out texts are out-of-fold.
    """
    table = held.table
    full = table.logits[-1].argmax(-1)
    losses = torch.stack([F.cross_entropy(x, held.labels, reduction="none") for x in table.logits])
    right = torch.from_numpy(held.right).float()
    smallest_right = torch.where(right.any(0), right.argmax(0), 0)  # 0 if no step is right
    targets = {
        "teacher agreement": (held.features, test.features, table.logits[0].argmax(-1) != full),
        "losses": (held.features, test.features, losses.T),
        "smallest right step": (held.features, test.features, smallest_right / len(right)),
        "probe": (held.probe, test.probe, 1 - right[PROBE_STEP]),
    }
    for name, (features, test_features, target) in targets.items():
        target = target.float()
        folds = np.random.default_rng(0).permutation(len(features)) % FOLDS
        predicted = torch.zeros(target.shape)
        for fold in range(FOLDS):
            seen, unseen = torch.from_numpy(folds != fold), torch.from_numpy(folds == fold)
            predicted[unseen] = _fit(features[seen], target[seen])(features[unseen])
        held.signals[name] = predicted.numpy()
        test.signals[name] = _fit(features, target)(test_features).numpy()
    for texts in (held, test):
        confidences = confidence(texts.table.logits[0], texts.table.config.problem_type)
        texts.signals["step 0's confidence"] = (1 - confidences).numpy()


def _fit(features: Tensor, target: Tensor) -> Callable[[Tensor], Tensor]:
    """Fit a network like f_o to targets [N] in 0..1, or to positive losses [N, K].

    Returns:
        The function that predicts targets from features.
    """
    torch.manual_seed(0)
    mean, scale = features.mean(0), features.std(0) + 1e-6
    several = target.ndim == 2
    size = target.shape[1] if several else 1
    net = nn.Sequential(nn.Linear(features.shape[1], HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, size))
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=0.05)

    def forward(x: Tensor) -> Tensor:
        raw: Tensor = net((x - mean) / scale)
        return F.softplus(raw) if several else raw.squeeze(-1).sigmoid()

    for _ in range(EPOCHS):
        for rows in torch.randperm(len(features)).split(128):
            criterion = F.smooth_l1_loss if several else F.binary_cross_entropy
            loss = criterion(forward(features[rows]), target[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    @torch.no_grad()
    def predict(x: Tensor) -> Tensor:
        return forward(x)

    return predict


def _ways(held: TextSet) -> dict[str, Iterator[Setting]]:
    ways: dict[str, Iterator[Setting]] = {
        "fixed step, step 0 among them": _fixed(held, 0),
        "fixed step >= 1": _fixed(held, 1),
        "cascade of two steps by confidence, no step 0": _cascades(held),
    }
    for name in ("f_o", "step 0's confidence", "teacher agreement", "smallest right step"):
        label = "step 0 errs (f_o)" if name == "f_o" else name
        ways[f"{label}, one decision"] = _banded(held, name, False)
        ways[f"{label}, with escalation"] = _banded(held, name, True)
        ways[f"{label}, a chain"] = _chained(held, name)
    ways["loss regressed per step, one decision"] = _regressed()
    ways["f_o, then a probe half-way through step 1"] = _probed(held)
    return ways


def _fixed(held: TextSet, first: int) -> Iterator[Setting]:
    for step in range(first, held.table.config.num_steps + 1):
        yield _rule(Route((), (EntryBand(upto=1, step=step),)), 0.0, "f_o")


def _cascades(held: TextSet) -> Iterator[Setting]:
    last = held.table.config.num_steps
    for low in range(1, last):
        for below in np.linspace(0.4, 0.99, 30):
            yield _rule(Route((last,), (EntryBand(upto=1, step=low),)), below, "f_o")


def _banded(held: TextSet, signal: str, escalate: bool) -> Iterator[Setting]:
    """Yield settings that choose the first step by bands over a signal, and perhaps escalate.

    The bounds of the bands are quantiles of the signal.
    """
    for bands in _bands(held, held.signals[signal]):
        yield _rule(Route((), bands), 0.0, signal)
        top, last = max(band.step for band in bands), held.table.config.num_steps
        larger = {step for step in (last // 3, last // 2, 2 * last // 3, last) if step > top}
        if escalate:
            for step in sorted(larger):
                for below in (0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95):
                    yield _rule(Route((step,), bands), below, signal)


def _bands(held: TextSet, signal: np.ndarray) -> Iterator[tuple[EntryBand, ...]]:
    def quantile(share: float) -> float:
        return round(float(np.quantile(signal, min(share, 1.0))), 5)

    last = held.table.config.num_steps
    small = sorted({1, min(2, last), *(max(1, last * i // 12) for i in (3, 4, 6, 8)), last})
    for share in (0.0, *(i / 20 for i in range(2, 19))):
        below = [EntryBand(upto=quantile(share), step=0)] if share else []
        for low in small:
            yield (*below, EntryBand(upto=1, step=low))
            for high in (step for step in small if step > low):
                for split in (0.3, 0.5, 0.7, 0.85):
                    at = quantile(share + split * (1 - share))
                    yield (*below, EntryBand(upto=at, step=low), EntryBand(upto=1, step=high))
    yield (EntryBand(upto=1, step=0),)


def _chained(held: TextSet, signal: str) -> Iterator[Setting]:
    """Yield chains that are searched as in calibration, with bands over any signal."""
    table = held.table
    value = table.probability_right()
    cost = table.macs / table.dense.mean()
    steps = Steps(table.confidence, value, cost, held.signals[signal])
    for cap in CAPS:
        route = search(steps, chains(table.config), [Goal(cost=cap)])
        used = table.confidence[list(route.chain)]
        for threshold in np.quantile(used, np.linspace(0, 1, CANDIDATES // 10)):
            yield _rule(route, float(threshold), signal)


def _rule(route: Route, threshold: float, signal: str) -> Setting:
    def apply(texts: TextSet) -> Choice:
        answers = texts.table.answer_on(route, threshold, texts.signals[signal])
        return Choice(texts.right[answers.step, texts.table.rows], answers.macs)

    return apply


def _regressed() -> Iterator[Setting]:
    """Yield settings that choose the step with the lowest predicted loss plus price * cost."""

    def setting(price: float) -> Setting:
        def apply(texts: TextSet) -> Choice:
            table = texts.table
            cost = table.macs / table.dense
            step = (texts.signals["losses"].T + price * cost).argmin(0)
            return Choice(texts.right[step, table.rows], table.macs[step, table.rows])

        return apply

    for price in np.geomspace(0.003, 3, 40):
        yield setting(float(price))


def _probed(held: TextSet) -> Iterator[Setting]:
    """Yield settings in which f_o decides on step 0, and a probe in step 1 on a larger step."""
    config = held.table.config
    half = config.num_hidden_layers // 2
    plan = config.heads_per_layer(PROBE_STEP)
    probe_plan = [heads if i < half else 0 for i, heads in enumerate(plan)]

    def setting(exit_below: float, stay_below: float, high: int) -> Setting:
        def apply(texts: TextSet) -> Choice:
            table = texts.table
            exits = texts.signals["f_o"] <= exit_below
            stays = texts.signals["probe"] <= stay_below
            step = np.where(exits, 0, np.where(stays, PROBE_STEP, high))
            wasted = np.array([encoder_macs(config, probe_plan, int(n)) for n in table.lengths])
            macs = table.macs[step, table.rows] + np.where(~exits & ~stays, wasted, 0)
            return Choice(texts.right[step, table.rows], macs)

        return apply

    for exit_below in np.quantile(held.signals["f_o"], np.linspace(0, 0.9, 19)):
        for stay_below in np.quantile(held.signals["probe"], (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)):
            for high in sorted({config.num_steps // 3, config.num_steps // 2, config.num_steps}):
                yield setting(float(exit_below), float(stay_below), high)


def _at_caps(settings: Sequence[Setting], held: TextSet, test: TextSet) -> list[float]:
    """Return the test accuracy, at each limit, of the best setting on the held-out texts."""
    tried: list[tuple[float, float, int]] = []
    for index, setting in enumerate(settings):
        choice = setting(held)
        cost = float(choice.macs.sum() / held.table.dense.sum())
        tried.append((float(choice.right.mean()), -cost, index))
    accuracies = []
    for cap in CAPS:
        affordable = [entry for entry in tried if -entry[1] <= cap]
        if affordable:
            best = settings[max(affordable)[2]]
            accuracies.append(float(best(test).right.mean()))
        else:
            accuracies.append(float("nan"))
    return accuracies


def main() -> None:
    """Print the table for a checkpoint and its training data."""
    parser = argparse.ArgumentParser(prog="python -m budgetformer.experiments.study")
    parser.add_argument("checkpoint", type=Path, help="checkpoint folder, <name>/<version>")
    parser.add_argument("--data", type=Path, required=True, help="folder of its training data")
    parser.add_argument("--limit", type=int, help="maximum rows of either file, evenly chosen")
    arguments = parser.parse_args()
    checkpoint = read_checkpoint(arguments.checkpoint)
    recipe = Recipe.read(None, **checkpoint.manifest.recipe)
    examples = read_examples(arguments.data / "train.parquet", list(checkpoint.manifest.labels))
    _, rows = split_rows(len(examples), recipe.hold_out, recipe.seed)
    held = examples.subset(rows).evenly(arguments.limit)
    test = read_test(checkpoint, arguments.data / "test.parquet", arguments.limit)
    lines = [
        [name, *("" if math.isnan(x) else f"{x:.4f}" for x in row)]
        for name, row in study(checkpoint, held, test).items()
    ]
    sys.stdout.write(markdown_table(["way", *(f"{cap:.0%}" for cap in CAPS)], lines) + "\n")


if __name__ == "__main__":
    main()
