"""A BERT-shaped encoder or classifier becomes a BudgetFormer.

Same function, its heads and neurons put in order.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from budgetformer.configuration import BudgetFormerConfig
from budgetformer.errors import CheckpointError
from budgetformer.modeling import BudgetFormerForSequenceClassification
from budgetformer.modules import EncoderLayer, HeadScorer


@dataclass(frozen=True)
class _Family:
    """How one family of encoders names its weights and sizes, and what sits on its encoder.

    Attributes:
        prefix: of the encoder's weights inside a classifier.
        embeddings, layer: our names by theirs; `layers` is where its layers are.
        sizes: our configuration's names by theirs, where they differ.
        head, activation: the dense map before its classifier, and what follows it.
        classifier: its last map.
        first_position: rows of the position table that come before a text's first token.
    """

    prefix: str
    layers: str
    embeddings: dict[str, str]
    layer: dict[str, str]
    sizes: dict[str, str]
    head: str
    activation: str
    classifier: str
    first_position: int = 0


_BERT = _Family(
    prefix="bert.",
    layers="encoder.layer",
    embeddings={
        "embeddings.word_embeddings": "embeddings.word",
        "embeddings.position_embeddings": "embeddings.position",
        "embeddings.token_type_embeddings": "embeddings.segment",
        "embeddings.LayerNorm": "embeddings.norm",
    },
    layer={
        "attention.self.query": "attention.query",
        "attention.self.key": "attention.key",
        "attention.self.value": "attention.value",
        "attention.output.dense": "attention.output",
        "attention.output.LayerNorm": "attention_norm",
        "intermediate.dense": "feed_forward.up",
        "output.dense": "feed_forward.down",
        "output.LayerNorm": "feed_forward_norm",
    },
    sizes={},
    head="bert.pooler.dense",
    activation="tanh",
    classifier="classifier",
)
_FAMILIES = {
    "bert": _BERT,
    "roberta": replace(
        _BERT,
        prefix="roberta.",
        head="classifier.dense",
        classifier="classifier.out_proj",
        first_position=2,
    ),
    "distilbert": _Family(
        prefix="distilbert.",
        layers="transformer.layer",
        embeddings={
            "embeddings.word_embeddings": "embeddings.word",
            "embeddings.position_embeddings": "embeddings.position",
            "embeddings.LayerNorm": "embeddings.norm",
        },
        layer={
            "attention.q_lin": "attention.query",
            "attention.k_lin": "attention.key",
            "attention.v_lin": "attention.value",
            "attention.out_lin": "attention.output",
            "sa_layer_norm": "attention_norm",
            "ffn.lin1": "feed_forward.up",
            "ffn.lin2": "feed_forward.down",
            "output_layer_norm": "feed_forward_norm",
        },
        sizes={
            "hidden_size": "dim",
            "num_hidden_layers": "n_layers",
            "num_attention_heads": "n_heads",
            "intermediate_size": "hidden_dim",
            "hidden_act": "activation",
            "hidden_dropout_prob": "dropout",
            "attention_probs_dropout_prob": "attention_dropout",
        },
        head="pre_classifier",
        activation="relu",
        classifier="classifier",
    ),
}
_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "max_position_embeddings",
    "type_vocab_size",
    "layer_norm_eps",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "pad_token_id",
)


def convert_encoder(
    folder: Path, names: list[str], **choices: Any
) -> BudgetFormerForSequenceClassification:
    """Build a BudgetFormer that computes at its full budget what an encoder or classifier does.

    A fine-tuned classifier with as many labels as `names` keeps its head; otherwise the classifier
    on top is new, on the mean of the token states.

    Args:
        folder: `config.json` and `model.safetensors` of a BERT, MiniLM, RoBERTa or DistilBERT.
        names: label names.
        choices: further `BudgetFormerConfig` arguments.

    Raises:
        CheckpointError: the folder holds no such network.
    """
    try:
        source = json.loads((folder / "config.json").read_text())
        weights = load_file(folder / "model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: not an encoder folder: {error}") from error
    if not isinstance(source, dict):
        raise CheckpointError(f"{folder}: not an encoder folder: config.json holds no object")
    family = _FAMILIES.get(str(source.get("model_type")))
    if family is None:
        known = ", ".join(_FAMILIES)
        raise CheckpointError(
            f"{folder}: model_type {source.get('model_type')!r}, only {known} can be converted"
        )
    renamed = _rename(family, weights)
    head = _rename_head(family, weights)
    if len(head.get("classifier.bias", ())) == len(names):
        choices = {"pooling": "cls", "head_activation": family.activation} | choices
    else:
        head = {}
    model = BudgetFormerForSequenceClassification(_configure(family, source, names, choices))
    if "embeddings.segment.weight" not in renamed:
        renamed["embeddings.segment.weight"] = torch.zeros(1, model.config.hidden_size)
    try:
        result = model.encoder.load_state_dict(renamed, strict=False)
        model.load_state_dict(head, strict=False)
    except RuntimeError as error:  # torch's word for a weight of another shape
        raise CheckpointError(f"{folder}: {error}") from error
    missing = [key for key in result.missing_keys if "decision" not in key]
    if missing:
        raise CheckpointError(
            f"{folder}: the weights lack {missing[0]} and {len(missing) - 1} more"
        )
    return model


def _configure(
    family: _Family, source: dict[str, Any], names: list[str], choices: dict[str, Any]
) -> BudgetFormerConfig:
    theirs = {ours: family.sizes.get(ours, ours) for ours in _SIZES}
    sizes = {ours: source[name] for ours, name in theirs.items() if name in source}
    if "embeddings.token_type_embeddings" not in family.embeddings:
        sizes["type_vocab_size"] = 1
    if "max_position_embeddings" in sizes:
        sizes["max_position_embeddings"] -= family.first_position
    labels = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    return BudgetFormerConfig(**sizes | labels | choices)


def _rename(family: _Family, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give the encoder's weights our names, whether or not a classifier's prefix is on them."""
    renamed: dict[str, Tensor] = {}
    for full_name, tensor in weights.items():
        name, _, kind = full_name.removeprefix(family.prefix).rpartition(".")
        ours = family.embeddings.get(name)
        if name.startswith(f"{family.layers}."):
            index, _, part = name.removeprefix(f"{family.layers}.").partition(".")
            ours = f"layers.{index}.{family.layer[part]}" if part in family.layer else None
        if ours is not None:
            renamed[f"{ours}.{kind}"] = tensor.float()
    positions = renamed.get("embeddings.position.weight")
    if positions is not None:
        renamed["embeddings.position.weight"] = positions[family.first_position :].clone()
    return renamed


def _rename_head(family: _Family, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give the weights on top of a fine-tuned classifier our names; empty where one is missing."""
    head = {
        f"{ours}.{kind}": weights.get(f"{theirs}.{kind}")
        for ours, theirs in (("head", family.head), ("classifier", family.classifier))
        for kind in ("weight", "bias")
    }
    found = {name: tensor.float() for name, tensor in head.items() if tensor is not None}
    return found if len(found) == len(head) else {}


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
