"""Convert a BERT-shaped encoder or classifier into a BudgetFormer that computes the same function.

Its heads and neurons can then be ordered by importance.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from budgetformer.errors import CheckpointError
from budgetformer.model.budget import HeadScorer
from budgetformer.model.configuration import BudgetFormerConfig
from budgetformer.model.layer import EncoderLayer
from budgetformer.model.modeling import BudgetFormerForSequenceClassification
from budgetformer.training.encoders import Family, Source, read_encoder

TOLERANCE = 1e-4
"""Largest accepted difference between a converted network and its source, relative to the largest
value; rounding in float32 makes about 1e-6 of it."""
PROOF_LENGTHS = ((1, 5, 16), (64,))
"""Tokens of the sequences on which source and result are compared, in batches; the embeddings are
compared at every position."""
MIN_POSITIONS = 3
"""A text's beginning, one token and its end."""


@dataclass(frozen=True)
class Conversion:
    """A network that is ready to be trained.

    Attributes:
        model: the network.
        notes: what was kept, changed or left out, one line each.
        difference: measured between the source's outputs and the network's; None: from scratch.
        origin: digest of the source's weights; empty: from scratch.
    """

    model: BudgetFormerForSequenceClassification
    notes: tuple[str, ...] = ()
    difference: float | None = None
    origin: str = ""


def convert_encoder(
    folder: Path, names: list[str], numbered: bool = False, **choices: Any
) -> Conversion:
    """Build a BudgetFormer that computes at its full budget what an encoder or classifier does.

    The result is compared with Transformers' own network on random tokens. A fine-tuned classifier
    whose labels are `names`, in any order, keeps its head; otherwise the classifier on top is new,
    on the mean of the token states.

    Args:
        folder: see `read_encoder`.
        names: label names.
        numbered: whether the user chose the order of `names`, so that a head without names of its
            own (`LABEL_0`, ...) can be matched by number.
        choices: further `BudgetFormerConfig` arguments.

    Raises:
        CheckpointError: the folder holds no such network, or the result computes another function.
    """
    source = read_encoder(folder)
    rows, note = _match_head(source, names, numbered, choices.get("problem_type"))
    weights = _rename(source)
    if rows is not None:
        choices = {"pooling": "cls", "head_activation": source.family.activation} | choices
        head = {ours: source.weights[theirs] for ours, theirs in source.family.head_names.items()}
        head |= {name: head[name][rows] for name in ("classifier.weight", "classifier.bias")}
    try:
        config = _configure(source, weights, names, choices)
        model = BudgetFormerForSequenceClassification(config)
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    with torch.no_grad():
        state = model.encoder.state_dict()
        for name, weight in weights.items():
            state.pop(name).copy_(weight)
        if left := [name for name in state if "decision" not in name]:
            raise CheckpointError(f"{folder}: the conversion leaves out {left[0]}")
        if rows is not None:
            model.load_state_dict(head, strict=False)
    difference = measure_difference(source, model, rows)
    if not difference <= TOLERANCE:
        raise CheckpointError(
            f"{folder}: the converted network differs from the encoder by {difference:.2g} of its "
            f"largest output (allowed: {TOLERANCE:g}), so this encoder cannot be converted"
        )
    proof = (
        f"the converted network and the encoder differ by {difference:.1e} of the largest output"
    )
    return Conversion(model, (*source.notes, *note, proof), difference, _digest(source.weights))


def _digest(weights: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, weight in weights.items():
        digest.update(name.encode())
        digest.update(weight.contiguous().numpy().data)
    return digest.hexdigest()


def _configure(
    source: Source, weights: dict[str, Tensor], names: list[str], choices: dict[str, Any]
) -> BudgetFormerConfig:
    sizes = {
        ours: getattr(source.network.config, theirs) for ours, theirs in source.family.sizes.items()
    }
    # The embeddings say how many rows they have here: positions before the first are left out.
    sizes["max_position_embeddings"] = len(weights["embeddings.position.weight"])
    sizes["type_vocab_size"] = len(weights["embeddings.segment.weight"])
    if sizes["max_position_embeddings"] < MIN_POSITIONS:
        raise ValueError(f"fewer than {MIN_POSITIONS} positions")
    labels = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    return BudgetFormerConfig(**sizes | labels | choices)


def _rename(source: Source) -> dict[str, Tensor]:
    """Give the encoder's weights our names."""
    renamed: dict[str, Tensor] = {}
    for name, weight in source.weights.items():
        place, _, kind = name.removeprefix(source.family.prefix).rpartition(".")
        ours = _our_name(source.family, place)
        if ours is not None:
            renamed[f"{ours}.{kind}"] = weight
    position = renamed["embeddings.position.weight"]
    renamed["embeddings.position.weight"] = position[source.first_position :]
    # Tokenizers mark the second text of a pair, even for encoders that do not read the mark.
    types = renamed.get("embeddings.segment.weight", torch.zeros(1, position.shape[1]))
    renamed["embeddings.segment.weight"] = types.expand(2, -1) if len(types) == 1 else types
    return renamed


def _our_name(family: Family, place: str) -> str | None:
    if not place.startswith(f"{family.layers}."):
        return family.embeddings.get(place)
    index, _, part = place.removeprefix(f"{family.layers}.").partition(".")
    return f"layers.{index}.{family.layer[part]}" if part in family.layer else None


def _match_head(
    source: Source, names: list[str], numbered: bool, problem_type: str | None
) -> tuple[list[int] | None, list[str]]:
    """Return the row of the source's head for each of `names`, or None for a new head, and why."""
    if not source.has_head:
        return None, []
    config: Any = source.network.config
    theirs = [str(config.id2label.get(i)) for i in range(config.num_labels)]
    rows = {_plain(name): row for row, name in enumerate(theirs)}
    wanted = [_plain(name) for name in names]
    if config.problem_type not in (None, problem_type):
        reason = f"it is for {config.problem_type}, the data are not"
    elif len(rows) == len(theirs) == len(names) and set(wanted) == set(rows):
        matched = [rows[name] for name in wanted]
        moved = "" if matched == sorted(matched) else ", in the order of the data"
        return matched, [f"the classification head is kept, its labels matched by name{moved}"]
    elif len(theirs) != len(names):
        reason = f"it has {len(theirs)} labels, the data have {len(names)}"
    elif rows.keys() == {str(i) for i in range(len(names))}:
        if numbered:
            note = "the classification head is kept, its labels matched by number (labels.json)"
            return list(range(len(names))), [note]
        reason = (
            f"its labels have no names ({theirs[0]}, ...); "
            "name them in its config.json (id2label), or give labels.json in their order"
        )
    else:
        unknown = next((n for n, plain in zip(names, wanted, strict=True) if plain not in rows), "")
        reason = f"its labels are {', '.join(theirs[:5])[:120]}, the data have {unknown!r}"
    return None, [f"the classification head is not kept, a new one is trained: {reason}"]


def _plain(name: str) -> str:
    """Return a label's name without case and outer spaces; `LABEL_3` is what it says, number 3."""
    plain = name.strip().casefold()
    return re.sub(r"^label_(\d+)$", r"\1", plain)


@torch.no_grad()
def measure_difference(
    source: Source, model: BudgetFormerForSequenceClassification, rows: list[int] | None
) -> float:
    """Compare a converted network at its full budget with its source, on random tokens.

    Args:
        source: what was converted.
        model: the result.
        rows: the row of the source's head for each label; None: only states are compared.

    Returns:
        The largest difference of embeddings, states and logits, relative to the largest value.
    """
    training = model.training
    model.eval()
    limit = model.config.max_position_embeddings
    batch = _random_batch(source, [limit])
    embeddings: Any = source.network.base_model.embeddings
    compared = [
        (
            model.encoder.embed(batch["input_ids"], batch["token_type_ids"]),
            embeddings(**_for_source(source, batch)),
        )
    ]
    for lengths in PROOF_LENGTHS:
        batch = _random_batch(source, [min(length, limit) for length in lengths])
        mask = batch["attention_mask"]
        theirs = source.network(
            **_for_source(source, batch), attention_mask=mask, output_hidden_states=True
        )
        ours = model.encoder(**batch, steps=model.config.num_steps)
        mask = mask.bool()
        compared.append((ours.last_hidden_state[mask], theirs.hidden_states[-1][mask]))
        if rows is not None:
            compared.append((model.classify(ours.pooled), theirs.logits[:, rows]))
    model.train(training)
    differences = [
        (actual - expected).abs().max() / expected.abs().max().clamp(min=1e-2)
        for actual, expected in compared
    ]
    return torch.stack(differences).max().item()


def _random_batch(source: Source, lengths: list[int]) -> dict[str, Tensor]:
    """Draw ids other than padding, and two token types, for sequences of these lengths."""
    random = torch.Generator().manual_seed(0)
    pad, shape = source.network.config.pad_token_id or 0, (len(lengths), max(lengths))
    ids = torch.randint(source.network.config.vocab_size - 1, shape, generator=random)
    ids += ids >= pad
    mask = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
    return {
        "input_ids": ids.where(mask, pad),
        "attention_mask": mask.long(),
        "token_type_ids": torch.randint(2, shape, generator=random),
    }


def _for_source(source: Source, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return ids, and token types where the source knows more than one."""
    types = getattr(source.network.config, "type_vocab_size", 1) if source.family.has_types else 1
    return {name: batch[name] for name in ("input_ids", "token_type_ids")[: 1 + (types > 1)]}


class _UnitImportance:
    """First-order importance of the inputs of a linear map.

    |sum over tokens of value * gradient|.
    """

    def __init__(self, linear: nn.Linear, group: int) -> None:
        self.group = group
        self.total = torch.zeros(linear.in_features // group)
        self._inputs: Tensor | None = None
        self._hook = linear.register_forward_pre_hook(self._keep)

    def _keep(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._inputs = args[0]
        self._inputs.retain_grad()

    def collect(self) -> None:
        if self._inputs is None or self._inputs.grad is None:
            raise RuntimeError("collect() needs a backward pass first")
        product = (self._inputs * self._inputs.grad).detach().float()
        self.total += product.unflatten(-1, (-1, self.group)).sum((1, 3)).abs().sum(0)
        self._inputs = None

    def close(self) -> Tensor:
        self._hook.remove()
        return self.total


def order_by_importance(
    model: BudgetFormerForSequenceClassification, batches: Iterable[dict[str, Tensor]]
) -> Tensor:
    """Permute every layer's heads, and its neurons, so that the most important come first.

    The network computes the same function afterwards; a ladder step, which keeps the first heads
    and with them the first neurons, then keeps what matters most. Importance is the mean size of
    the first-order change in the loss when a head or neuron is removed (Michel et al., 2019).

    Args:
        model: any BudgetFormer.
        batches: arguments of `forward`, labels among them.

    Returns:
        The importance of every head, with the neurons in its place where they are coupled, [L, H],
        falling within each layer.
    """
    meters: list[tuple[EncoderLayer, _UnitImportance, _UnitImportance]] = []
    for layer in model.encoder.encoder_layers:
        heads = _UnitImportance(layer.attention.output, model.config.head_size)
        meters.append((layer, heads, _UnitImportance(layer.feed_forward.down, 1)))
    training = model.training
    model.eval()
    for batch in batches:
        model.zero_grad()
        loss = model(**batch, steps=model.config.num_steps).loss
        loss.backward()
        for _, head_meter, neuron_meter in meters:
            head_meter.collect()
            neuron_meter.collect()
    model.zero_grad()
    model.train(training)
    size = model.config.head_size
    units: list[Tensor] = []
    for index, (layer, head_meter, neuron_meter) in enumerate(meters):
        units_of_layer, order = head_meter.close().sort(descending=True, stable=True)
        neurons, neuron_order = neuron_meter.close().sort(descending=True, stable=True)
        if model.config.budget_ffn:
            units_of_layer = units_of_layer + neurons.unflatten(0, (len(order), -1)).sum(1)
        units.append(units_of_layer)
        shared = model.encoder.decision
        if shared is not None and shared.scorer is not None:
            _permute_scores(shared.scorer, index * len(order), order)
        if layer.decision is not None and layer.decision.scorer is not None:
            _permute_scores(layer.decision.scorer, 0, order)
        rows = (order[:, None] * size + torch.arange(size)).flatten()
        _permute(layer, rows, neuron_order)
    return torch.stack(units)


def ladder_by_importance(units: Tensor) -> list[list[int]]:
    """Return H steps of as many heads in all as the uniform ladder's, where they matter most.

    Args:
        units: importance of the heads [L, H], falling within each layer; step k keeps the k * L
            most important of them all.
    """
    layers, heads = units.shape
    order = units.flatten().argsort(descending=True, stable=True) // heads
    return [
        order[: step * layers].bincount(minlength=layers).tolist() for step in range(1, heads + 1)
    ]


@torch.no_grad()
def _permute_scores(scorer: HeadScorer, start: int, order: Tensor) -> None:
    rows = slice(start, start + len(order))
    scorer.out.weight[rows] = scorer.out.weight[rows][order].clone()
    scorer.out.bias[rows] = scorer.out.bias[rows][order].clone()


@torch.no_grad()
def _permute(layer: EncoderLayer, heads: Tensor, neurons: Tensor) -> None:
    attention, net = layer.attention, layer.feed_forward
    for linear in (attention.query, attention.key, attention.value):
        linear.weight.copy_(linear.weight[heads].clone())
        linear.bias.copy_(linear.bias[heads].clone())
    attention.output.weight.copy_(attention.output.weight[:, heads].clone())
    net.up.weight.copy_(net.up.weight[neurons].clone())
    net.up.bias.copy_(net.up.bias[neurons].clone())
    net.down.weight.copy_(net.down.weight[:, neurons].clone())
